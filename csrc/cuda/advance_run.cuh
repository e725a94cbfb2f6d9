// The rows of one stream, folded by one block: kernels/reference_advance.py on the device.
//
// Rows are taken in chunks of up to 32. Per chunk the phases below follow each other; a barrier
// stands between two of them. Bits do not depend on how rows are cut into chunks or calls, nor on
// the number of threads: what rounding makes order-dependent is done row by row, and sums over
// probes and states go over the 32 lanes of a warp in an order that P and K fix.
//
// In order, because floating-point addition is not associative: the evidence of EMA and CUSUM (one
// thread per probe, about 40 clocks a row), and the belief (one warp: a matrix of K + 1 states and
// two normalisations, some 500 clocks a row for K = 5, most of them shuffles and divisions).
// LAST, MAX, COUNT, RUN and the sum of MEAN's window could be had by scans; they ride along in the
// same loop, which is short. Exactly associative and done in parallel over rows: the position
// expected (a maximum), the counts of tokens, and everything that is per row (reading and writing
// logits, softplus, bins, risk, trace). The verdict is a small automaton, one thread, and is only
// run through where a row of the chunk is judged or missing. So the rows of a prompt, which never
// move the belief but for the last one, cost the evidence loop alone.
#pragma once

#include <cstdint>

#include "advance_steps.cuh"
#include "midstream/advance.h"
#include "midstream/cuda/device.cuh"
#include "midstream/cuda/launch.h"
#include "run_memory.cuh"

namespace midstream::cuda {

/// Whether row `n` is the first of its stream's run.
__device__ __forceinline__ bool leads(const Rows& rows, std::int64_t n) {
  return n == 0 || rows.slot[n - 1] != rows.slot[n];
}

/// Whether a slot and its policy row are in the tables; if not its row is padding.
__device__ __forceinline__ bool known(const Tables& tables, int stream) {
  if (stream < 0 || stream >= tables.sizes.slots) return false;
  const int tier = tables.slots.policy[stream];
  return tier >= 0 && tier < tables.sizes.policies;
}

/// Fold the run that starts at row `first`. `load(m, begin, count)` puts the logits of rows `begin`
/// to `begin + count` into m.z, by all threads of the block, and leaves NaN in rows.logits.
template <class Load>
__device__ void advance_run(const Rows& rows, const Tables& tables, std::int64_t first, int chunk,
                            unsigned char* memory, Load load) {
  const Sizes& sizes = tables.sizes;
  const SlotTable& slots = tables.slots;
  const EvidenceTable& table = tables.evidence;
  const ChainTable& chain = tables.chain;
  const RunMemory m = run_memory(memory, sizes, chunk);
  const int threads = blockDim.x, thread = threadIdx.x;
  const int warp = thread / 32, warps = threads / 32, lane = thread % 32;
  const int probes = static_cast<int>(sizes.probes), states = static_cast<int>(sizes.states);
  const int size = static_cast<int>(sizes.window), cells = static_cast<int>(sizes.trace);
  const int stream = rows.slot[first];
  const std::int64_t s = stream;
  const int start = slots.start[s], tier = slots.policy[s];

  for (int p = thread; p < probes; p += threads) {
    m.rule[p] = __ldg(table.rule + p);
    m.window[p] = __ldg(table.window + p);
    m.phase[p] = __ldg(table.phase + p);
    m.parameter[p] = __ldg(table.parameter + p);
    m.center[p] = __ldg(table.center + p);
    m.evidence[p] = slots.evidence[s * probes + p];
    m.folds[p] = slots.folds[s * probes + p];
  }
  for (int j = thread; j < states; j += threads) m.belief[j] = slots.belief[s * states + j];

  if (thread == 0) {
    *m.stream = {slots.position[s], slots.scored[s],    slots.unscored[s], slots.verdict[s],
                 slots.cause[s],    slots.halted_at[s], slots.risk[s],     slots.peak[s]};
  }
  __syncthreads();

  bool reads_prompt = false, reads_response = false;
  for (int p = 0; p < probes; ++p) {
    reads_prompt |= m.phase[p] == static_cast<int>(Phase::prompt);
    reads_response |= m.phase[p] == static_cast<int>(Phase::response);
  }

  for (std::int64_t begin = first;;) {
    // Rows, one per lane: how many belong to the run, and which are new.
    if (warp == 0) {
      const std::int64_t n = begin + lane;
      const bool mine = lane < chunk && n < rows.count && rows.slot[n] == stream;
      const unsigned others = ~__ballot_sync(kAllLanes, mine);
      const int count = others == 0 ? 32 : __ffs(static_cast<int>(others)) - 1;
      const bool in_run = lane < count;
      const int t = in_run ? rows.position[n] : -1;
      const bool valid = in_run && t < kMaxPosition;
      int next = valid ? t + 1 : 0;  // inclusive maximum over the lanes so far
#pragma unroll
      for (int apart = 1; apart < 32; apart *= 2) {
        const int before = __shfl_up_sync(kAllLanes, next, apart);
        if (lane >= apart && before > next) next = before;
      }
      const int expected = m.stream->expected;
      int before = __shfl_up_sync(kAllLanes, next, 1);
      if (lane == 0 || before < expected) before = expected;
      const int last = __shfl_sync(kAllLanes, next, 31);
      __syncwarp();  // all lanes have read what lane 0 changes; a shuffle orders no memory
      if (lane == 0 && last > expected) m.stream->expected = last;

      RowFacts row;
      row.position = t;
      row.fresh = valid && t >= before;
      row.in_prompt = t < start;
      row.gap = t - before;
      row.response_gap = t - (before > start ? before : start);
      if (row.response_gap < 0) row.response_gap = 0;
      row.scored = row.judged = row.missing = row.traced = 0;
      if (cells > 0) {  // of rows that share a cell the last one stays
        const int cell = row.fresh ? t % cells : -1 - lane;
        const unsigned same = __match_any_sync(kAllLanes, cell);
        row.traced = row.fresh && (same >> lane) == 1u;
      }
      if (lane < chunk) m.row[lane] = row;
      if (lane == 0) *m.count = count;
    }
    __syncthreads();
    const int count = *m.count;
    load(m, begin, count);
    __syncthreads();

    // A row is scored when all logits of its phase are finite.
    for (int r = warp; r < count; r += warps) {
      const RowFacts row = m.row[r];
      const int phase = static_cast<int>(row.in_prompt ? Phase::prompt : Phase::response);
      bool lost = false;
      for (int p = lane; p < probes; p += 32) {
        lost |= m.phase[p] == phase && !isfinite(m.z[r * probes + p]);
      }
      const bool scored = !__any_sync(kAllLanes, lost);
      if (lane == 0) {
        m.row[r].scored = scored;
        m.row[r].judged = scored && row.position >= start - 1;
        m.row[r].missing = row.response_gap > 0 || (!scored && !row.in_prompt);
      }
    }
    __syncthreads();

    // Counts of tokens, and what the chunk needs; beside it the evidence, in order.
    if (warp == 0) {
      const bool mine = lane < count && m.row[lane].fresh;
      RowFacts row = {};
      if (mine) row = m.row[lane];
      const bool read = row.in_prompt ? reads_prompt : reads_response;
      const int scored = __popc(__ballot_sync(kAllLanes, mine && row.scored && read));
      const int unseen = reads_prompt ? row.gap : row.response_gap;
      const int unscored = lane_sum(mine ? unseen + (row.scored ? 0 : 1) : 0);
      const bool moves = __any_sync(kAllLanes, mine && (!row.in_prompt || row.judged));
      const bool judges = __any_sync(kAllLanes, mine && (row.judged || row.missing));
      if (lane == 0) {
        m.stream->scored += scored;
        m.stream->unscored += unscored;
        *m.flags = (moves ? kMoves : 0) | (judges ? kJudges : 0);
      }
    }
    for (int p = thread; p < probes; p += threads) {
      const int phase = m.phase[p], rule = m.rule[p], window = m.window[p];
      const float parameter = m.parameter[p], center = m.center[p];
      float* ring = slots.ring + (s * probes + p) * size;
      float evidence = m.evidence[p];
      int folds = m.folds[p];
      for (int r = 0; r < count; ++r) {
        const RowFacts row = m.row[r];
        const bool reads =
            phase == static_cast<int>(row.in_prompt ? Phase::prompt : Phase::response);
        if (row.fresh && reads && row.scored) {
          evidence =
              fold(m.z[r * probes + p], evidence, folds, rule, parameter, window, ring, size);
          ++folds;
        }
        m.hazard[r * probes + p] = evidence - center;
      }
      m.evidence[p] = evidence;
      m.folds[p] = folds;
    }
    __syncthreads();
    const int flags = *m.flags;

    // Cumulative log-hazard, its bin, and whom to blame: a warp per judged row.
    if (flags & kJudges) {
      for (int r = warp; r < count; r += warps) {
        const RowFacts row = m.row[r];
        if (!row.fresh || !row.judged) continue;
        const int phase = static_cast<int>(row.in_prompt ? Phase::prompt : Phase::response);
        float log_hazard = 0.0f, largest = 0.0f;
        int blamed = probes;  // none yet
        for (int p = lane; p < probes; p += 32) {
          if (m.phase[p] != phase) continue;
          const float hazard = m.hazard[r * probes + p];
          log_hazard += softplus(hazard);
          if (blamed == probes || hazard > largest) {
            largest = hazard;
            blamed = p;
          }
        }
        log_hazard = lane_sum(log_hazard);
#pragma unroll
        for (int apart = 16; apart > 0; apart /= 2) {
          const float other = __shfl_xor_sync(kAllLanes, largest, apart);
          const int whom = __shfl_xor_sync(kAllLanes, blamed, apart);
          const bool better = whom != probes && (blamed == probes || other > largest ||
                                                 (other == largest && whom < blamed));
          if (better) {
            largest = other;
            blamed = whom;
          }
        }
        const float* edges = row.in_prompt ? chain.prompt_edges : chain.edges;
        const int bins = static_cast<int>(row.in_prompt ? sizes.prompt_bins : sizes.bins);
        int below = 0;
        for (int i = lane; i < bins - 1; i += 32) below += __ldg(edges + i) <= log_hazard ? 1 : 0;
        below = lane_sum(below);
        if (lane == 0) {
          m.bin[r] = below;
          m.blamed[r] = blamed == probes ? static_cast<int>(kNoCause) : blamed;
        }
      }
      __syncthreads();
    }

    // Belief, in order: one warp.
    if ((flags & (kMoves | kJudges)) && warp == 0) {
      for (int r = 0; r < count; ++r) {
        const RowFacts row = m.row[r];
        if (!row.fresh) continue;
        if (!row.in_prompt) {
          predict(m, row.response_gap + 1, chain.step_powers, states);
          if (row.scored) {
            weigh(m, m.bin[r], chain.emission, static_cast<int>(sizes.bins), states);
          }
        } else if (row.judged) {
          weigh(m, m.bin[r], chain.prompt_emission, static_cast<int>(sizes.prompt_bins), states);
        }
        for (int j = lane; j < states; j += 32) m.beliefs[r * states + j] = m.belief[j];
      }
    }
    __syncthreads();

    if (flags & kJudges) {
      // Risk: a warp per row.
      for (int r = warp; r < count; r += warps) {
        if (!m.row[r].fresh) continue;
        float sum = 0.0f;
        for (int j = lane; j < states; j += 32) {
          const float ahead =
              __ldg(tables.policy.ahead + static_cast<std::int64_t>(tier) * states + j);
          sum = fmaf(m.beliefs[r * states + j], ahead, sum);
        }
        sum = lane_sum(sum);
        if (lane == 0) m.risk[r] = fminf(fmaxf(sum, 0.0f), 1.0f);
      }
      __syncthreads();
    }

    // Verdicts, in order; a row that is neither judged nor missing leaves it as it was.
    if (thread == 0 && cells + flags > 0) {
      StreamState& state = *m.stream;
      auto verdict = static_cast<Verdict>(state.verdict);
      for (int r = 0; r < count; ++r) {
        const RowFacts row = m.row[r];
        if (row.fresh && (row.judged || row.missing)) {
          const float now = m.risk[r];
          const Judgement made = judge(verdict, now, row.judged, row.missing, tier, tables.policy);
          if (made.verdict == Verdict::halt && verdict != Verdict::halt) {
            state.cause = made.by_unscored ? static_cast<int>(kUnscoredCause) : m.blamed[r];
            state.halted_at = row.position;
          }
          verdict = made.verdict;
          state.risk = now;
          if (row.judged) state.peak = fmaxf(state.peak, now);
        }
        m.blamed[r] = static_cast<int>(verdict);  // for the trace
      }
      state.verdict = static_cast<int>(verdict);
    }
    if (cells > 0) {
      __syncthreads();
      for (int i = thread; i < count * probes; i += threads) {
        const int r = i / probes, p = i % probes;
        if (!m.row[r].traced) continue;
        const std::int64_t cell = s * cells + m.row[r].position % cells;
        slots.trace_logits[cell * probes + p] = m.z[i];
      }
      for (int r = thread; r < count; r += threads) {
        const RowFacts row = m.row[r];
        if (!row.traced) continue;
        const std::int64_t cell = s * cells + row.position % cells;
        slots.trace_position[cell] = row.position;
        slots.trace_risk[cell] = row.judged ? m.risk[r] : quiet_nan();
        slots.trace_verdict[cell] = static_cast<std::uint8_t>(m.blamed[r]);
      }
    }
    __syncthreads();
    begin += count;
    if (count < chunk || begin >= rows.count) break;
    // A full chunk: the run may go on. Every thread reads the same.
    if (rows.slot[begin] != stream) break;
  }

  for (int p = thread; p < probes; p += threads) {
    slots.evidence[s * probes + p] = m.evidence[p];
    slots.folds[s * probes + p] = m.folds[p];
  }
  for (int j = thread; j < states; j += threads) slots.belief[s * states + j] = m.belief[j];
  if (thread == 0) {
    const StreamState state = *m.stream;
    slots.position[s] = state.expected;
    slots.scored[s] = state.scored;
    slots.unscored[s] = state.unscored;
    slots.verdict[s] = static_cast<std::uint8_t>(state.verdict);
    slots.cause[s] = static_cast<std::int16_t>(state.cause);
    slots.halted_at[s] = state.halted_at;
    slots.risk[s] = state.risk;
    slots.peak[s] = state.peak;
  }
}

}  // namespace midstream::cuda
