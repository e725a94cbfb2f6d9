// The steps that folding a row takes: kernels/reference_advance.py on the device. Belief by one
// warp, evidence and verdict by one thread.
#pragma once

#include <cstdint>

#include "midstream/advance.h"
#include "midstream/cuda/device.cuh"
#include "run_memory.cuh"

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

}  // namespace midstream::cuda
