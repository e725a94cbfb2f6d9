#include "midstream/advance.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "hazard.h"

namespace midstream {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// Calls body with the number of states as a constant where it is a usual one, so that loops over
/// states become straight code.
template <class Body>
auto with_states(std::int64_t states, const Body& body) {
  switch (states) {
    case 3:
      return body(std::integral_constant<std::int64_t, 3>());
    case 4:
      return body(std::integral_constant<std::int64_t, 4>());
    case 5:
      return body(std::integral_constant<std::int64_t, 5>());
    case 6:
      return body(std::integral_constant<std::int64_t, 6>());
    case 8:
      return body(std::integral_constant<std::int64_t, 8>());
    default:
      return body(states);
  }
}

/// Divide by the sum; where it is `least` or less (underflow) nothing changes, the answer is false.
template <class States>
inline bool normalise(float* mass, States states, float least = 0.0f) {
  float total = 0.0f;
  for (std::int64_t j = 0; j < states; ++j) total += mass[j];
  if (!(total > least)) return false;
  for (std::int64_t j = 0; j < states; ++j) mass[j] /= total;
  return true;
}

/// Move the belief by 2^bit tokens; in two halves where that underflows.
void leap(float* belief, int bit, const ChainTable& chain, std::int64_t states) {
  const bool moved = with_states(states, [&](auto n) {
    const float* step = chain.step_powers + bit * n * n;
    float next[kMaxStates];
    for (std::int64_t j = 0; j < n; ++j) next[j] = 0.0f;
    for (std::int64_t i = 0; i < n; ++i) {
      for (std::int64_t j = 0; j < n; ++j) next[j] += belief[i] * step[i * n + j];
    }
    if (!normalise(next, n, bit > 0 ? kLeastMass : 0.0f)) return false;
    for (std::int64_t j = 0; j < n; ++j) belief[j] = next[j];
    return true;
  });
  if (!moved && bit > 0) {
    leap(belief, bit - 1, chain, states);
    leap(belief, bit - 1, chain, states);
  }
}

/// Move the belief by `steps` tokens, bit by bit, up to 2^kGapBits - 1.
void predict(float* belief, std::int32_t steps, const ChainTable& chain, std::int64_t states) {
  steps = std::min(steps, (1 << kGapBits) - 1);
  for (int bit = 0; steps >> bit != 0; ++bit) {
    if (((steps >> bit) & 1) != 0) leap(belief, bit, chain, states);
  }
}

/// Weigh the belief by the likelihood of an evidence bin.
void weigh(float* belief, std::int64_t bin, const float* emission, std::int64_t bins,
           std::int64_t states) {
  with_states(states, [&](auto n) {
    float weighed[kMaxStates];
    for (std::int64_t j = 0; j < n; ++j) weighed[j] = belief[j] * emission[j * bins + bin];
    if (!normalise(weighed, n)) return;
    for (std::int64_t j = 0; j < n; ++j) belief[j] = weighed[j];
  });
}

/// Fold one finite logit into a probe's evidence; `cells` is the probe's ring of `size` logits.
void fold(float z, std::int64_t p, const EvidenceTable& table, float* evidence, std::int32_t* folds,
          float* cells, std::int64_t size) {
  const float old = *evidence, parameter = table.parameter[p];
  const std::int32_t count = *folds;
  *folds = count + 1;
  switch (static_cast<Rule>(table.rule[p])) {
    case Rule::ema:
      *evidence = count == 0 ? z : parameter * z + (1.0f - parameter) * old;
      return;
    case Rule::cusum:
      *evidence = std::max(old + z - parameter, 0.0f);
      return;
    case Rule::count:
      *evidence = old + (z >= parameter ? 1.0f : 0.0f);
      return;
    case Rule::run:
      *evidence = z >= parameter ? old + 1.0f : 0.0f;
      return;
    case Rule::max:
      *evidence = count == 0 ? z : std::max(old, z);
      return;
    case Rule::mean:
      if (size > 0) {
        // Windows may be changed while running; one that does not fit must not write elsewhere.
        const auto window = std::clamp<std::int32_t>(table.window[p], 1, size);
        cells[count % window] = z;
        const std::int32_t seen = std::min(count + 1, window);
        float sum = 0.0f;
        for (std::int32_t i = 0; i < seen; ++i) sum += cells[i];
        *evidence = sum / static_cast<float>(seen);
        return;
      }
      [[fallthrough]];
    case Rule::last:
    default:
      *evidence = z;
  }
}

struct Judgement {
  Verdict verdict;
  bool by_unscored;
};

Judgement judge(Verdict before, float risk, bool judged, bool missing, std::int64_t tier,
                const PolicyTable& policy) {
  if (before == Verdict::halt) return {Verdict::halt, false};
  const auto on_unscored = static_cast<OnUnscored>(policy.on_unscored[tier]);
  if (missing && on_unscored == OnUnscored::halt) return {Verdict::halt, true};
  const bool held = before == Verdict::hold || (missing && on_unscored == OnUnscored::hold);
  if (!judged) return {held ? Verdict::hold : Verdict::proceed, false};
  if (risk >= policy.halt_at[tier]) return {Verdict::halt, false};
  const bool holds = risk >= policy.hold_at[tier] || (held && risk >= policy.release_at[tier]);
  return {holds ? Verdict::hold : Verdict::proceed, false};
}

/// The probe with the largest hazard logit. Streams halt once: in the loop over all rows' probes
/// its unforeseeable branches took 1.2 of 5.1 us for 64 rows x 8 probes.
std::int16_t cause_of(std::int64_t s, std::int32_t phase, const Tables& tables) {
  const EvidenceTable& table = tables.evidence;
  const float* evidence = tables.slots.evidence + s * tables.sizes.probes;
  float largest = -std::numeric_limits<float>::infinity();
  std::int16_t cause = kNoCause;
  for (std::int64_t p = 0; p < tables.sizes.probes; ++p) {
    if (table.phase[p] != phase) continue;
    const float hazard_logit = evidence[p] - table.center[p];
    if (cause == kNoCause || hazard_logit > largest) {
      largest = hazard_logit;
      cause = static_cast<std::int16_t>(p);
    }
  }
  return cause;
}

void advance_row(const float* z, std::int64_t s, std::int32_t t, bool prompt_is_read,
                 const Tables& tables) {
  const Sizes& size = tables.sizes;
  const SlotTable& slots = tables.slots;
  const EvidenceTable& evidence = tables.evidence;
  const ChainTable& chain = tables.chain;

  const std::int32_t expected = slots.position[s], start = slots.start[s];
  const bool in_prompt = t < start, closes_prompt = t == start - 1;
  const std::int32_t response_gap = std::max(t - std::max(expected, start), 0);
  const auto phase = static_cast<std::int32_t>(in_prompt ? Phase::prompt : Phase::response);

  bool scored = true, read = false;
  for (std::int64_t p = 0; p < size.probes; ++p) {
    if (evidence.phase[p] != phase) continue;
    read = true;
    scored = scored && std::isfinite(z[p]);
  }
  const bool judged = scored && (!in_prompt || closes_prompt);
  const bool missing = response_gap > 0 || (!scored && !in_prompt);

  LogHazard log_hazard;
  for (std::int64_t p = 0; p < size.probes; ++p) {
    if (evidence.phase[p] != phase) continue;
    const std::int64_t at = s * size.probes + p;
    if (scored) {
      fold(z[p], p, evidence, slots.evidence + at, slots.folds + at, slots.ring + at * size.window,
           size.window);
    }
    log_hazard.add(slots.evidence[at] - evidence.center[p]);
  }

  float* belief = slots.belief + s * size.states;
  if (!in_prompt) predict(belief, response_gap + 1, chain, size.states);
  if (judged) {
    const float* edges = in_prompt ? chain.prompt_edges : chain.edges;
    const float* emission = in_prompt ? chain.prompt_emission : chain.emission;
    const std::int64_t bins = in_prompt ? size.prompt_bins : size.bins;
    std::int64_t bin = log_hazard.bin(edges, bins);
    if (bin < 0) {
      float exact = 0.0f;
      for (std::int64_t p = 0; p < size.probes; ++p) {
        if (evidence.phase[p] == phase) {
          exact += softplus(slots.evidence[s * size.probes + p] - evidence.center[p]);
        }
      }
      bin = bin_of(exact, edges, bins);
    }
    weigh(belief, bin, emission, bins, size.states);
  }

  const std::int64_t tier = slots.policy[s];
  float risk = 0.0f;
  if (judged || missing) {
    const float* ahead = tables.policy.ahead + tier * size.states;
    for (std::int64_t j = 0; j < size.states; ++j) risk += belief[j] * ahead[j];
    risk = std::clamp(risk, 0.0f, 1.0f);
  }

  const auto before = static_cast<Verdict>(slots.verdict[s]);
  const Judgement now = judge(before, risk, judged, missing, tier, tables.policy);
  if (now.verdict == Verdict::halt && before != Verdict::halt) {
    slots.cause[s] = now.by_unscored ? kUnscoredCause : cause_of(s, phase, tables);
    slots.halted_at[s] = t;
  }
  if (judged || missing) slots.risk[s] = risk;
  if (judged) slots.peak[s] = std::max(slots.peak[s], risk);
  slots.verdict[s] = static_cast<std::uint8_t>(now.verdict);
  slots.scored[s] += scored && read;
  slots.unscored[s] += (prompt_is_read ? t - expected : response_gap) + !scored;
  slots.position[s] = t + 1;

  if (size.trace > 0) {
    const std::int64_t cell = s * size.trace + t % size.trace;
    slots.trace_position[cell] = t;
    slots.trace_risk[cell] = judged ? risk : kNaN;
    slots.trace_verdict[cell] = static_cast<std::uint8_t>(now.verdict);
    std::copy_n(z, size.probes, slots.trace_logits + cell * size.probes);
  }
}

}  // namespace

std::int64_t first_bad_row(const Rows& rows, const Tables& tables) {
  for (std::int64_t n = 0; n < rows.count; ++n) {
    const std::int64_t s = rows.slot[n];
    if (s < 0) continue;
    if (s >= tables.sizes.slots || rows.position[n] >= kMaxPosition) return n;
    const std::int64_t tier = tables.slots.policy[s];
    if (tier < 0 || tier >= tables.sizes.policies) return n;
  }
  return -1;
}

std::string explain_bad_row(const Rows& rows, const Tables& tables, std::int64_t bad) {
  const std::int64_t s = rows.slot[bad];
  const std::string row = "row " + std::to_string(bad);
  if (s >= tables.sizes.slots) {
    return row + " names slot " + std::to_string(s) + ", the table has " +
           std::to_string(tables.sizes.slots);
  }
  if (rows.position[bad] >= kMaxPosition) {
    return row + " has position " + std::to_string(rows.position[bad]) + ", the limit is " +
           std::to_string(kMaxPosition);
  }
  return row + ", slot " + std::to_string(s) + ", names policy row " +
         std::to_string(tables.slots.policy[s]) + ", the table has " +
         std::to_string(tables.sizes.policies);
}

void advance(const Rows& rows, const Tables& tables) {
  const std::int32_t* phase = tables.evidence.phase;
  const bool prompt_is_read = std::any_of(
      phase, phase + tables.sizes.probes,
      [](std::int32_t value) { return value == static_cast<std::int32_t>(Phase::prompt); });
  for (std::int64_t n = 0; n < rows.count; ++n) {
    float* z = rows.logits + n * rows.logits_stride;
    const std::int64_t s = rows.slot[n];
    if (s >= 0 && rows.position[n] >= tables.slots.position[s]) {
      advance_row(z, s, rows.position[n], prompt_is_read, tables);
    }
    std::fill_n(z, tables.sizes.probes, kNaN);
  }
}

}  // namespace midstream
