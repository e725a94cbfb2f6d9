// What Python binds comes as addresses; here they become the tables that the kernels take.
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>

#include "midstream/advance.h"

namespace midstream::python {

using Address = std::uintptr_t;
using TableSizes = std::array<std::int64_t, 8>;
using SlotAddresses = std::array<Address, 18>;
using EvidenceAddresses = std::array<Address, 5>;
using ChainAddresses = std::array<Address, 6>;
using PolicyAddresses = std::array<Address, 5>;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

/// Tables whose sizes and addresses come in the order of the fields of kernels/tables.py.
inline Tables tables_at(const TableSizes& n, const SlotAddresses& slots,
                        const EvidenceAddresses& evidence, const ChainAddresses& chain,
                        const PolicyAddresses& policy) {
  Tables tables;
  tables.sizes = {n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7]};
  const Address* next = slots.data();
  const auto take = [&next](auto*& field) {
    field = pointer<std::remove_reference_t<decltype(*field)>>(*next++);
  };
  auto& s = tables.slots;
  take(s.position), take(s.start), take(s.policy), take(s.evidence), take(s.folds), take(s.ring);
  take(s.belief), take(s.risk), take(s.peak), take(s.verdict), take(s.cause), take(s.halted_at);
  take(s.scored), take(s.unscored), take(s.trace_position), take(s.trace_risk);
  take(s.trace_verdict), take(s.trace_logits);
  next = evidence.data();
  auto& e = tables.evidence;
  take(e.rule), take(e.parameter), take(e.window), take(e.center), take(e.phase);
  next = chain.data();
  auto& c = tables.chain;
  take(c.step_powers), take(c.emission), take(c.edges), take(c.prior), take(c.prompt_emission);
  take(c.prompt_edges);
  next = policy.data();
  auto& p = tables.policy;
  take(p.ahead), take(p.halt_at), take(p.hold_at), take(p.release_at), take(p.on_unscored);
  return tables;
}

}  // namespace midstream::python
