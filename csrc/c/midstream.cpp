// The C interface over the C++ kernels: checks, and exceptions turned into a status and a message.
#include "midstream/midstream.h"

#include <algorithm>
#include <exception>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>

#include "midstream/add_rms_norm_score.h"
#include "midstream/advance.h"
#include "midstream/isa.h"
#include "midstream/score.h"
#include "midstream/score_advance.h"

struct midstream_probes {
  midstream::Probes packed;
};

namespace {

thread_local std::string last_error;

void demand(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

void demand_pointers(std::initializer_list<const void*> pointers, const char* of) {
  const bool all = std::none_of(pointers.begin(), pointers.end(),
                                [](const void* pointer) { return pointer == nullptr; });
  demand(all, std::string("a pointer in ") + of + " is null");
}

midstream::DType dtype(int code) {
  demand(code >= MIDSTREAM_FLOAT32 && code <= MIDSTREAM_BFLOAT16,
         "dtype is " + std::to_string(code) + "; use MIDSTREAM_FLOAT32, _FLOAT16 or _BFLOAT16");
  return static_cast<midstream::DType>(code);
}

/// Rows that are written must not share memory.
void demand_apart(std::int64_t rows, std::int64_t stride, std::int64_t width, const char* name) {
  demand(rows <= 1 || stride >= width, std::string(name) + " is " + std::to_string(stride) +
                                           ", its rows are " + std::to_string(width) +
                                           " wide and must not overlap");
}

void demand_threads(int threads) {
  demand(threads >= 1, "threads is " + std::to_string(threads) + ", expected 1 or more");
}

/// Run `body`, which returns a status, and turn what it throws into one.
template <class Body>
midstream_status guarded(const Body& body) {
  try {
    return body();
  } catch (const std::out_of_range& error) {
    last_error = error.what();
    return MIDSTREAM_OUT_OF_RANGE;
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";
    return MIDSTREAM_OUT_OF_MEMORY;
  } catch (const std::exception& error) {
    last_error = error.what();
    return MIDSTREAM_INVALID_ARGUMENT;
  }
}

void check(const midstream_tables* tables) {
  demand(tables != nullptr, "tables is null");
  const midstream_sizes& n = tables->sizes;
  demand(n.slots >= 1 && n.probes >= 1 && n.bins >= 1 && n.prompt_bins >= 1 && n.policies >= 1,
         "tables.sizes needs at least one slot, probe, bin, prompt bin and policy row");
  demand(n.window >= 0 && n.trace >= 0, "tables.sizes: window and trace are 0 or more");
  demand(n.states >= 1 && n.states <= MIDSTREAM_MAX_STATES,
         "tables.sizes.states is " + std::to_string(n.states) + ", expected 1 to " +
             std::to_string(MIDSTREAM_MAX_STATES));
  const midstream_slot_table& s = tables->slots;
  demand_pointers({s.position, s.start, s.policy, s.evidence, s.folds, s.belief, s.risk, s.peak,
                   s.verdict, s.cause, s.halted_at, s.scored, s.unscored},
                  "tables.slots");
  if (n.window > 0) demand_pointers({s.ring}, "tables.slots");
  if (n.trace > 0) {
    demand_pointers({s.trace_position, s.trace_risk, s.trace_verdict, s.trace_logits},
                    "tables.slots");
  }
  const midstream_evidence_table& e = tables->evidence;
  demand_pointers({e.rule, e.parameter, e.window, e.center, e.phase}, "tables.evidence");
  const midstream_chain_table& c = tables->chain;
  demand_pointers({c.step_powers, c.emission, c.prior, c.prompt_emission}, "tables.chain");
  if (n.bins > 1) demand_pointers({c.edges}, "tables.chain");
  if (n.prompt_bins > 1) demand_pointers({c.prompt_edges}, "tables.chain");
  const midstream_policy_table& p = tables->policy;
  demand_pointers({p.ahead, p.halt_at, p.hold_at, p.release_at, p.on_unscored}, "tables.policy");
}

void check(const midstream_rows* rows, std::int64_t probes) {
  demand(rows != nullptr, "rows is null");
  demand(rows->count >= 0, "rows.count is " + std::to_string(rows->count) + ", expected 0 or more");
  if (rows->count > 0) demand_pointers({rows->logits, rows->slot, rows->position}, "rows");
  demand_apart(rows->count, rows->logits_stride, probes, "rows.logits_stride");
}

const midstream::Probes& check(const midstream_probes* probes) {
  demand(probes != nullptr, "probes is null; make them with midstream_probes_create");
  return probes->packed;
}

midstream::Hidden check(const midstream_hidden* hidden) {
  demand(hidden != nullptr, "hidden is null");
  demand(hidden->rows >= 0,
         "hidden.rows is " + std::to_string(hidden->rows) + ", expected 0 or more");
  if (hidden->rows > 0) demand_pointers({hidden->data}, "hidden");
  return {hidden->data, dtype(hidden->dtype), hidden->rows, hidden->stride};
}

void refuse_bad_row(const midstream_rows& rows, const midstream_tables& tables) {
  const std::int64_t bad = midstream::first_bad_row(rows, tables);
  if (bad >= 0) throw std::out_of_range(midstream::explain_bad_row(rows, tables, bad));
}

}  // namespace

const char* midstream_last_error(void) { return last_error.c_str(); }

const char* midstream_isa(void) {
  const char* name = nullptr;
  guarded([&name] {
    name = midstream::isa_name(midstream::isa());
    return MIDSTREAM_OK;
  });
  return name;
}

midstream_status midstream_probes_create(const midstream_probe_table* table,
                                         midstream_probes** probes) {
  return guarded([=] {
    demand(table != nullptr && probes != nullptr, "table or probes is null");
    demand_pointers({table->weight, table->bias}, "the probe table");
    constexpr std::int64_t kMost = std::int64_t{1} << 40;  // elements; packing rounds both sizes up
    demand(table->probes >= 1 && table->width >= 1,
           "the probe table is [" + std::to_string(table->probes) + ", " +
               std::to_string(table->width) + "], expected at least [1, 1]");
    demand(table->probes <= kMost / table->width,
           "the probe table is [" + std::to_string(table->probes) + ", " +
               std::to_string(table->width) + "], expected at most 2^40 weights");
    *probes = new midstream_probes{
        midstream::Probes({table->weight, dtype(table->dtype), table->bias, table->probes,
                           table->width, table->rms_norm != 0, table->eps})};
    return MIDSTREAM_OK;
  });
}

void midstream_probes_destroy(midstream_probes* probes) { delete probes; }

midstream_status midstream_admit(const midstream_tables* tables, int64_t slot, int32_t start,
                                 int32_t policy) {
  return guarded([=] {
    check(tables);
    const midstream_sizes& n = tables->sizes;
    if (slot < 0 || slot >= n.slots || policy < 0 || policy >= n.policies) {
      throw std::out_of_range("slot " + std::to_string(slot) + " under policy row " +
                              std::to_string(policy) + ", the tables have " +
                              std::to_string(n.slots) + " and " + std::to_string(n.policies));
    }
    demand(start >= 0, "start is " + std::to_string(start) + ", expected 0 or more");
    const midstream_slot_table& s = tables->slots;
    s.position[slot] = 0, s.start[slot] = start, s.policy[slot] = policy;
    std::fill_n(s.evidence + slot * n.probes, n.probes, 0.0f);
    std::fill_n(s.folds + slot * n.probes, n.probes, 0);
    if (n.window > 0) std::fill_n(s.ring + slot * n.probes * n.window, n.probes * n.window, 0.0f);
    std::copy_n(tables->chain.prior, n.states, s.belief + slot * n.states);
    s.risk[slot] = s.peak[slot] = 0.0f;
    s.verdict[slot] = MIDSTREAM_CONTINUE;
    s.cause[slot] = MIDSTREAM_NO_CAUSE;
    s.halted_at[slot] = -1;
    s.scored[slot] = s.unscored[slot] = 0;
    if (n.trace > 0) {
      std::fill_n(s.trace_position + slot * n.trace, n.trace, -1);
      std::fill_n(s.trace_risk + slot * n.trace, n.trace, 0.0f);
      std::fill_n(s.trace_verdict + slot * n.trace, n.trace, std::uint8_t{0});
      std::fill_n(s.trace_logits + slot * n.trace * n.probes, n.trace * n.probes, 0.0f);
    }
    return MIDSTREAM_OK;
  });
}

midstream_status midstream_score(const midstream_probes* probes, const midstream_hidden* hidden,
                                 float* logits, int64_t logits_stride, int threads) {
  return guarded([=] {
    const midstream::Probes& packed = check(probes);
    const midstream::Hidden rows = check(hidden);
    demand_threads(threads);
    if (rows.rows == 0) return MIDSTREAM_OK;
    demand(logits != nullptr, "logits is null");
    demand_apart(rows.rows, logits_stride, packed.table().probes, "logits_stride");
    midstream::score(packed, rows, {logits, logits_stride}, threads);
    return MIDSTREAM_OK;
  });
}

midstream_status midstream_advance(const midstream_tables* tables, const midstream_rows* rows) {
  return guarded([=] {
    check(tables);
    check(rows, tables->sizes.probes);
    refuse_bad_row(*rows, *tables);
    midstream::advance(*rows, *tables);
    return MIDSTREAM_OK;
  });
}

midstream_status midstream_score_advance(const midstream_probes* probes,
                                         const midstream_hidden* hidden,
                                         const midstream_tables* tables, const midstream_rows* rows,
                                         int threads) {
  return guarded([=] {
    const midstream::Probes& packed = check(probes);
    const midstream::Hidden x = check(hidden);
    check(tables);
    check(rows, tables->sizes.probes);
    demand_threads(threads);
    demand(x.rows == rows->count, "hidden has " + std::to_string(x.rows) + " rows, rows has " +
                                      std::to_string(rows->count));
    demand(packed.table().probes == tables->sizes.probes,
           "there are " + std::to_string(packed.table().probes) + " probes, the tables are for " +
               std::to_string(tables->sizes.probes));
    refuse_bad_row(*rows, *tables);
    midstream::score_advance(packed, x, *rows, *tables, threads);
    return MIDSTREAM_OK;
  });
}

midstream_status midstream_add_rms_norm_score(const midstream_probes* probes,
                                              const midstream_norm_rows* rows, float* logits,
                                              int64_t logits_stride, int threads) {
  return guarded([=] {
    const midstream::Probes& packed = check(probes);
    demand(rows != nullptr, "rows is null");
    demand(rows->rows >= 0, "rows.rows is " + std::to_string(rows->rows) + ", expected 0 or more");
    demand_threads(threads);
    const midstream::NormRows converted{
        rows->x,     rows->x_stride,     rows->residual, rows->residual_stride,
        rows->gamma, dtype(rows->dtype), rows->rows,     rows->eps};
    if (rows->rows == 0) return MIDSTREAM_OK;
    demand_pointers({rows->x, rows->residual, rows->gamma, logits}, "rows, or logits,");
    const midstream::ProbeTable& table = packed.table();
    demand_apart(rows->rows, rows->x_stride, table.width, "rows.x_stride");
    demand_apart(rows->rows, rows->residual_stride, table.width, "rows.residual_stride");
    demand_apart(rows->rows, logits_stride, table.probes, "logits_stride");
    midstream::add_rms_norm_score(packed, converted, {logits, logits_stride}, threads);
    return MIDSTREAM_OK;
  });
}
