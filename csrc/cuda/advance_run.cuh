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

#include "midstream/advance.h"
#include "midstream/cuda/device.cuh"
#include "midstream/cuda/launch.h"

namespace midstream::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ float quiet_nan() { return __uint_as_float(0x7fc00000u); }

__device__ __forceinline__ float softplus(float x) {
  return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x)));
}

/// Sum over the lanes of a warp; every lane has it, to the same bits.
__device__ __forceinline__ float lane_sum(float value) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) value += __shfl_xor_sync(kAllLanes, value, apart);
  return value;
}

__device__ __forceinline__ int lane_sum(int value) {
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) value += __shfl_xor_sync(kAllLanes, value, apart);
  return value;
}

/// What is known of a row of the chunk.
struct RowFacts {
  int position;
  int gap;           // tokens never shown before this one
  int response_gap;  // those of them that belong to the response
  unsigned char fresh, in_prompt, scored, judged, missing, traced;
};

/// A stream's numbers beside evidence and belief. In registers they would be there while a tile of
/// score_advance needs all of them.
struct StreamState {
  int expected, scored, unscored, verdict, cause, halted_at;
  float risk, peak;
};

/// A stream's state and one chunk of its rows, in shared memory. advance_bytes counts it.
struct RunMemory {
  // per probe [P]: the evidence table, and the stream's evidence
  int *rule, *window, *phase, *folds;
  float *parameter, *center, *evidence;
  // per state [K+1]
  float *belief, *moved;
  // per row
  RowFacts* row;   // [chunk], 5 words
  float* risk;     // [chunk]
  int* bin;        // [chunk], of the evidence
  int* blamed;     // [chunk], probe with the largest hazard, or the row's verdict later
  float* z;        // [chunk, P] logits
  float* hazard;   // [chunk, P] evidence - center
  float* beliefs;  // [chunk, K+1]
  StreamState* stream;
  int* count;  // rows in the chunk
  int* flags;  // kMoves, kJudges
};
static_assert(sizeof(RowFacts) == 5 * 4, "advance_bytes counts 8 words per row: these and 3 more");
static_assert(sizeof(StreamState) == 8 * 4, "advance_bytes counts 10 words: these and 2 more");

/// What a chunk needs beyond the evidence.
constexpr int kMoves = 1;   // some row moves or weighs the belief
constexpr int kJudges = 2;  // some row is judged or missing

__device__ __forceinline__ RunMemory run_memory(unsigned char* memory, const Sizes& sizes,
                                                int chunk) {
  auto* next = reinterpret_cast<float*>(memory);
  const auto take = [&next](std::int64_t count) {
    float* taken = next;
    next += count;
    return taken;
  };
  const auto ints = [&take](std::int64_t count) { return reinterpret_cast<int*>(take(count)); };
  const int probes = static_cast<int>(sizes.probes), states = static_cast<int>(sizes.states);
  RunMemory m;
  m.rule = ints(probes), m.window = ints(probes), m.phase = ints(probes), m.folds = ints(probes);
  m.parameter = take(probes), m.center = take(probes), m.evidence = take(probes);
  m.belief = take(states), m.moved = take(states);
  m.stream = reinterpret_cast<StreamState*>(take(8));
  m.count = ints(1), m.flags = ints(1);
  m.row = reinterpret_cast<RowFacts*>(take(5 * chunk));
  m.risk = take(chunk), m.bin = ints(chunk), m.blamed = ints(chunk);
  m.z = take(chunk * probes), m.hazard = take(chunk * probes);
  m.beliefs = take(chunk * states);
  return m;
}

/// Divide `mass` [states] by its sum into `belief`; where there is no mass nothing changes. All
/// lanes of one warp call it, each has written its own states of `mass`.
__device__ inline bool normalise(const float* mass, float* belief, int states, float least) {
  const int lane = threadIdx.x % 32;
  float total = 0.0f;
  for (int j = lane; j < states; j += 32) total += mass[j];
  total = lane_sum(total);
  // Also orders the other lanes' reads of `belief` before the writes below.
  __syncwarp();
  const bool enough = total > least;
  if (enough) {
    for (int j = lane; j < states; j += 32) belief[j] = mass[j] / total;
  }
  __syncwarp();
  return enough;
}

/// Move the belief by `steps` tokens, bit by bit; a leap that underflows goes in two halves.
__device__ inline void predict(const RunMemory& m, int steps, const float* step_powers,
                               int states) {
  const int lane = threadIdx.x % 32;
  constexpr int kMostSteps = (1 << kGapBits) - 1;
  int left = steps < kMostSteps ? steps : kMostSteps;
  int bit = 0, level = 0;
  int leaps = left % 2;  // of 2^level tokens, still to be made for this bit
  while (left > 0) {
    if (leaps == 0) {
      level = ++bit;
      left /= 2;
      leaps = left % 2;
      continue;
    }
    const float* step = step_powers + static_cast<std::int64_t>(level) * states * states;
    for (int j = lane; j < states; j += 32) {
      float sum = 0.0f;
#pragma unroll 4
      for (int i = 0; i < states; ++i) sum = fmaf(m.belief[i], __ldg(step + i * states + j), sum);
      m.moved[j] = sum;
    }
    if (normalise(m.moved, m.belief, states, level > 0 ? kLeastMass : 0.0f) || level == 0) {
      --leaps;
    } else {
      --level;
      leaps *= 2;
    }
  }
}

/// Weigh the belief by the likelihood of the row's bin.
__device__ inline void weigh(const RunMemory& m, int bin, const float* emission, int bins,
                             int states) {
  for (int j = threadIdx.x % 32; j < states; j += 32) {
    m.moved[j] = m.belief[j] * __ldg(emission + j * bins + bin);
  }
  normalise(m.moved, m.belief, states, 0.0f);
}

/// Fold one finite logit into a probe's evidence; `ring` holds its last `size` logits.
__device__ inline float fold(float z, float old, int count, int rule, float parameter, int window,
                             float* ring, int size) {
  switch (static_cast<Rule>(rule)) {
    case Rule::ema:
      return count == 0 ? z : fmaf(parameter, z, (1.0f - parameter) * old);
    case Rule::cusum:
      return fmaxf(old + z - parameter, 0.0f);
    case Rule::count:
      return old + (z >= parameter ? 1.0f : 0.0f);
    case Rule::run:
      return z >= parameter ? old + 1.0f : 0.0f;
    case Rule::max:
      return count == 0 ? z : fmaxf(old, z);
    case Rule::mean:
      if (size > 0) {
        // Windows may be changed while running; one that does not fit must not write elsewhere.
        const int length = window < 1 ? 1 : (window > size ? size : window);
        ring[count % length] = z;
        const int seen = count + 1 < length ? count + 1 : length;
        float sum = 0.0f;
        for (int i = 0; i < seen; ++i) sum += ring[i];
        return sum / static_cast<float>(seen);
      }
      return z;
    default:
      return z;
  }
}

struct Judgement {
  Verdict verdict;
  bool by_unscored;
};

__device__ inline Judgement judge(Verdict before, float risk, bool judged, bool missing, int tier,
                                  const PolicyTable& policy) {
  if (before == Verdict::halt) return {Verdict::halt, false};
  const auto on_unscored = static_cast<OnUnscored>(__ldg(policy.on_unscored + tier));
  if (missing && on_unscored == OnUnscored::halt) return {Verdict::halt, true};
  const bool held = before == Verdict::hold || (missing && on_unscored == OnUnscored::hold);
  if (!judged) return {held ? Verdict::hold : Verdict::proceed, false};
  if (risk >= __ldg(policy.halt_at + tier)) return {Verdict::halt, false};
  const bool holds =
      risk >= __ldg(policy.hold_at + tier) || (held && risk >= __ldg(policy.release_at + tier));
  return {holds ? Verdict::hold : Verdict::proceed, false};
}

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
