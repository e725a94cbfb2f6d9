// Python module midstream.kernels._cpu: bindings on raw addresses, no torch at build time. The
// callers in kernels/cpu.py have checked every shape, dtype and stride before they come here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>

#include "midstream/advance.h"
#include "midstream/isa.h"
#include "midstream/score.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

// Releasing the GIL costs about 0.1 us, more than 1 % of the call below this many multiply-adds
// (64 rows x 8 probes x 1024 take some 15 us on one AVX-512 core).
constexpr std::int64_t kReleaseGilAbove = 1 << 19;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

/// The probes of one tap.
struct Probes {
  Probes(Address weight, int weight_dtype, Address bias, std::int64_t probes, std::int64_t width,
         bool rms_norm, float eps)
      : args{nullptr,
             midstream::DType::float32,
             0,
             0,
             pointer<const void>(weight),
             static_cast<midstream::DType>(weight_dtype),
             pointer<const float>(bias),
             probes,
             width,
             nullptr,
             0,
             rms_norm,
             eps} {
    midstream::isa();  // a bad MIDSTREAM_CPU_ISA is refused here, not at the first token
  }

  void score(Address hidden, int hidden_dtype, std::int64_t rows, std::int64_t hidden_stride,
             Address out, std::int64_t out_stride) const {
    midstream::ScoreArgs call = args;
    call.hidden = pointer<const void>(hidden);
    call.hidden_dtype = static_cast<midstream::DType>(hidden_dtype);
    call.rows = rows;
    call.hidden_stride = hidden_stride;
    call.out = pointer<float>(out);
    call.out_stride = out_stride;
    if (rows * call.probes * call.width > kReleaseGilAbove) {
      const py::gil_scoped_release release;
      midstream::score(call);
    } else {
      midstream::score(call);
    }
  }

  midstream::ScoreArgs args;
};

/// Slot, evidence, chain and policy tables. Addresses come in the order of the fields.
struct Tables {
  Tables(const std::array<std::int64_t, 8>& n, const std::array<Address, 18>& slots,
         const std::array<Address, 5>& evidence, const std::array<Address, 6>& chain,
         const std::array<Address, 5>& policy) {
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
  }

  // Holds the GIL throughout: a slot is admitted and retired by Python code.
  void advance(Address logits, std::int64_t logits_stride, Address slot, Address position,
               std::int64_t count) const {
    const midstream::Rows rows{pointer<float>(logits), logits_stride,
                               pointer<const std::int32_t>(slot),
                               pointer<const std::int32_t>(position), count};
    const std::int64_t bad = midstream::first_bad_row(rows, tables);
    if (bad >= 0) {
      const std::int64_t s = rows.slot[bad];
      const std::string row = "row " + std::to_string(bad);
      if (s >= tables.sizes.slots) {
        throw py::index_error(row + " names slot " + std::to_string(s) + ", the table has " +
                              std::to_string(tables.sizes.slots));
      }
      if (rows.position[bad] >= midstream::kMaxPosition) {
        throw py::index_error(row + " has position " + std::to_string(rows.position[bad]) +
                              ", the limit is " + std::to_string(midstream::kMaxPosition));
      }
      throw py::index_error(row + ", slot " + std::to_string(s) + ", names policy row " +
                            std::to_string(tables.slots.policy[s]) + ", the table has " +
                            std::to_string(tables.sizes.policies));
    }
    midstream::advance(rows, tables);
  }

  midstream::Tables tables;
};

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ CPU backend of midstream.kernels.";
  m.attr("MAX_STATES") = midstream::kMaxStates;
  m.def(
      "isa", [] { return midstream::isa_name(midstream::isa()); },
      "Instruction set in use: generic, avx2 or avx512.");
  m.def(
      "detected_isa", [] { return midstream::isa_name(midstream::detected_isa()); },
      "Widest instruction set this machine can run.");
  m.def("set_isa_cap", &midstream::set_isa_cap, py::arg("name"),
        "Use at most this instruction set from now on, whatever MIDSTREAM_CPU_ISA says.");
  py::class_<Probes>(m, "Probes", "The probes of one tap.")
      .def(py::init<Address, int, Address, std::int64_t, std::int64_t, bool, float>(),
           py::arg("weight"), py::arg("weight_dtype"), py::arg("bias"), py::arg("probes"),
           py::arg("width"), py::arg("rms_norm"), py::arg("eps"))
      .def("score", &Probes::score, "Write the logits of `rows` rows.", py::arg("hidden"),
           py::arg("hidden_dtype"), py::arg("rows"), py::arg("hidden_stride"), py::arg("out"),
           py::arg("out_stride"));
  py::class_<Tables>(m, "Tables", "Addresses and sizes of all tables of a monitor.")
      .def(py::init<const std::array<std::int64_t, 8>&, const std::array<Address, 18>&,
                    const std::array<Address, 5>&, const std::array<Address, 6>&,
                    const std::array<Address, 5>&>(),
           py::arg("sizes"), py::arg("slots"), py::arg("evidence"), py::arg("chain"),
           py::arg("policy"))
      .def("advance", &Tables::advance, "Fold `count` rows.", py::arg("logits"),
           py::arg("logits_stride"), py::arg("slot"), py::arg("position"), py::arg("count"));
}
