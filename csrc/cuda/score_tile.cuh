// The dot products of a few rows with a few probes, by all warps of a block.
//
// Warp w of W takes the columns of chunks w, w + W, w + 2W, ... in this order; `total` then adds
// the W partial sums in the order of w. W follows from d alone, and a row's sum is the same
// wherever the row stands in a tile, so that a result does not depend on the other rows (batch
// invariance).
//
// Two ways to the partial sums:
// * TensorCores: 16-bit rows, mma.m16n8k16 also for one row. fp32 weights come as three bfloat16
//   parts whose sum is exact, each with an accumulator of its own: three times the weight traffic
//   of bfloat16 probes. A dot product does not mind in which order both sides count their columns,
//   so a lane's operands of two mma are the 8 numbers of one 16-byte load.
// * Fma: fp32 rows, and float16 rows with weights that float16 cannot hold.
//
// Estimate for decode with P = 8, d = 4096 in bf16 on one H100 processor per row: 72 KiB at 64
// bytes a clock from L2 are 0.65 us, plus two latencies of L2 and the launch: under 2 us. fp32
// weights read 200 KiB, 1.8 us. Splitting d over a cluster of blocks would divide both; it is not
// done.
#pragma once

#include <cstdint>

#include "formats.cuh"
#include "midstream/cuda/device.cuh"
#include "midstream/cuda/launch.h"

namespace midstream::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

/// Rows in a format, as a tile reads them.
template <class Format>
struct Tile {
  const typename Format::Bits* row;  // the first one; in global or in shared memory
  std::int64_t stride;
  int count;
  bool aligned;  // every row starts at a multiple of 16 bytes
  int width;
  bool squares;  // whether sums of squares are wanted
};

/// Packed weights of one format, and what is common to all.
struct Weights {
  const void* packed;
  int padded_probes;
  int padded_width;
  const float* bias;
  int probes;
  int width;
  bool rms_norm;
  float eps;
};

template <class F, int kParts, int kRowTiles, int kProbeTiles>
struct TensorCores {
  using Format = F;
  static constexpr int kRows = 16 * kRowTiles;
  static constexpr int kProbes = 8 * kProbeTiles;
  static constexpr int kColumns = kTensorCoreColumns;

  /// Write this warp's partial dot products [kRows, kProbes] and sums of squares [kRows].
  static __device__ __forceinline__ void partial(const Tile<F>& x, const Weights& weights,
                                                 int first_probe, int warp, int warps, float* dots,
                                                 float* squares) {
    const int lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
    const std::int64_t part_stride =
        static_cast<std::int64_t>(weights.padded_probes) * weights.padded_width;
    const auto* weight = static_cast<const std::uint16_t*>(weights.packed) +
                         static_cast<std::int64_t>(first_probe + group) * weights.padded_width;
    float dot[kRowTiles][kProbeTiles][kParts][4] = {};
    float square[kRowTiles][2] = {};

    for (int chunk = warp; chunk * kColumns < x.width; chunk += warps) {
      Vector<F> a[kRowTiles][2][2];
      const bool whole = x.aligned && (chunk + 1) * kColumns <= x.width;
      if (whole) {
        load<true>(x, group, chunk * kColumns + 8 * t, a);
      } else {
        load<false>(x, group, chunk * kColumns + 8 * t, a);
      }
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = chunk * kColumns + 32 * half + 8 * t;
#pragma unroll
        for (int n = 0; n < kProbeTiles; ++n) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            const uint4 b = *reinterpret_cast<const uint4*>(weight + part * part_stride +
                                                            n * 8 * weights.padded_width + column);
#pragma unroll
            for (int m = 0; m < kRowTiles; ++m) {
              const uint4 top = a[m][0][half].words, bottom = a[m][1][half].words;
              F::mma(dot[m][n][part], {top.x, top.y}, {bottom.x, bottom.y}, {b.x, b.y});
              F::mma(dot[m][n][part], {top.z, top.w}, {bottom.z, bottom.w}, {b.z, b.w});
            }
          }
        }
        if (x.squares) {
#pragma unroll
          for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
            for (int side = 0; side < 2; ++side) {
#pragma unroll
              for (int i = 0; i < 8; ++i) {
                const float value = F::load(a[m][side][half].at[i]);
                square[m][side] = fmaf(value, value, square[m][side]);
              }
            }
          }
        }
      }
    }

#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int row = 16 * m + 8 * side + group;
#pragma unroll
        for (int n = 0; n < kProbeTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float sum = 0.0f;  // the smallest part first
#pragma unroll
            for (int part = kParts - 1; part >= 0; --part) sum += dot[m][n][part][2 * side + i];
            dots[row * kProbes + 8 * n + 2 * t + i] = sum;
          }
        }
        if (x.squares) {
          float sum = square[m][side];
          sum += __shfl_xor_sync(kFullWarp, sum, 1);
          sum += __shfl_xor_sync(kFullWarp, sum, 2);
          if (t == 0) squares[row] = sum;
        }
      }
    }
  }

 private:
  template <bool kWhole>
  static __device__ __forceinline__ void load(const Tile<F>& x, int group, int column,
                                              Vector<F> (&a)[kRowTiles][2][2]) {
#pragma unroll
    for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int row = 16 * m + 8 * side + group;
        const std::uint16_t* from = row < x.count ? x.row + row * x.stride : nullptr;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int begin = column + 32 * half;
          const int width = kWhole ? begin + 8 : x.width;  // known to be inside: one test less
          a[m][side][half] = load_vector<F>(from, begin, width, kWhole);
        }
      }
    }
  }
};

template <class F, int kRowCount>
struct Fma {
  using Format = F;
  static constexpr int kRows = kRowCount;
  static constexpr int kProbes = 8;
  static constexpr int kColumns = kFmaColumns;

  /// Write this warp's partial dot products [kRows, kProbes] and sums of squares [kRows].
  static __device__ __forceinline__ void partial(const Tile<F>& x, const Weights& weights,
                                                 int first_probe, int warp, int warps, float* dots,
                                                 float* squares) {
    const int lane = threadIdx.x % 32;
    const float* weight = static_cast<const float*>(weights.packed) +
                          static_cast<std::int64_t>(first_probe) * weights.padded_width;
    float dot[kRows][kProbes] = {};
    float square[kRows] = {};

    for (int chunk = warp; chunk * kColumns < x.width; chunk += warps) {
      const int column = chunk * kColumns + 4 * lane;
      float value[kRows][4];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        load4(r < x.count ? x.row + r * x.stride : nullptr, column, x, value[r]);
      }
#pragma unroll
      for (int p = 0; p < kProbes; ++p) {
        const float4 w =
            *reinterpret_cast<const float4*>(weight + p * weights.padded_width + column);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          dot[r][p] = fmaf(value[r][0], w.x, dot[r][p]);
          dot[r][p] = fmaf(value[r][1], w.y, dot[r][p]);
          dot[r][p] = fmaf(value[r][2], w.z, dot[r][p]);
          dot[r][p] = fmaf(value[r][3], w.w, dot[r][p]);
        }
      }
      if (x.squares) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
#pragma unroll
          for (int i = 0; i < 4; ++i) square[r] = fmaf(value[r][i], value[r][i], square[r]);
        }
      }
    }

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int p = 0; p < kProbes; ++p) {
        const float sum = over_lanes(dot[r][p]);
        if (lane == 0) dots[r * kProbes + p] = sum;
      }
      if (x.squares) {
        const float sum = over_lanes(square[r]);
        if (lane == 0) squares[r] = sum;
      }
    }
  }

 private:
  static __device__ __forceinline__ float over_lanes(float sum) {
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(kFullWarp, sum, apart);
    return sum;
  }

  /// Four numbers; zeros beyond the row.
  static __device__ __forceinline__ void load4(const typename F::Bits* row, int column,
                                               const Tile<F>& x, float (&value)[4]) {
    union {
      uint4 four;
      uint2 two;
      typename F::Bits at[4];
    } v;
    v.four = make_uint4(0u, 0u, 0u, 0u);
    if (row != nullptr && x.aligned && column + 4 <= x.width) {
      if constexpr (sizeof(typename F::Bits) == 4) {
        v.four = *reinterpret_cast<const uint4*>(row + column);
      } else {
        v.two = *reinterpret_cast<const uint2*>(row + column);
      }
    } else if (row != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (column + i < x.width) v.at[i] = row[column + i];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = F::load(v.at[i]);
  }
};

/// Floats of shared memory for the partial sums of `warps` warps.
template <class Kind>
__host__ __device__ constexpr int partial_floats(int warps) {
  return warps * Kind::kRows * (Kind::kProbes + 1);
}

/// The partial sums of a block: written by every warp, added in the order of warps.
template <class Kind>
struct Partials {
  float* dots;     // [warps, kRows, kProbes]
  float* squares;  // [warps, kRows]
  int warps;

  __device__ __forceinline__ Partials(float* memory, int count)
      : dots(memory), squares(memory + count * Kind::kRows * Kind::kProbes), warps(count) {}

  __device__ __forceinline__ void write(const Tile<typename Kind::Format>& x,
                                        const Weights& weights, int first_probe) const {
    const int warp = threadIdx.x / 32;
    Kind::partial(x, weights, first_probe, warp, warps, dots + warp * Kind::kRows * Kind::kProbes,
                  squares + warp * Kind::kRows);
  }

  __device__ __forceinline__ float sum_of_squares(int row) const {
    float sum = 0.0f;
    for (int warp = 0; warp < warps; ++warp) sum += squares[warp * Kind::kRows + row];
    return sum;
  }

  /// Logit of the probe `first_probe + p`.
  __device__ __forceinline__ float logit(const Weights& weights, int row, int first_probe,
                                         int p) const {
    float sum = 0.0f;
    for (int warp = 0; warp < warps; ++warp) {
      sum += dots[(warp * Kind::kRows + row) * Kind::kProbes + p];
    }
    if (weights.rms_norm) {
      const float total = sum_of_squares(row);
      // An infinite sum of squares would scale every logit to 0, a finite lie.
      const float scale =
          isinf(total) ? __uint_as_float(0x7fc00000u)
                       : 1.0f / sqrtf(total / static_cast<float>(weights.width) + weights.eps);
      sum *= scale;
    }
    return sum + weights.bias[first_probe + p];
  }
};

}  // namespace midstream::cuda
