// Number formats of a residual stream as bits, converted by hand where CUDA needs no instruction.
#pragma once

#include <cstdint>

#include "midstream/cuda/device.cuh"

namespace midstream::cuda {

struct Float32 {
  using Bits = std::uint32_t;
  static __device__ __forceinline__ float load(Bits bits) { return __uint_as_float(bits); }
  static __device__ __forceinline__ Bits round(float value) { return __float_as_uint(value); }
};

struct Float16 {
  using Bits = std::uint16_t;
  static __device__ __forceinline__ float load(Bits bits) { return half_to_float(bits); }
  static __device__ __forceinline__ Bits round(float value) { return float_to_half(value); }
  static __device__ __forceinline__ void mma(float (&d)[4], Pair top, Pair bottom, Pair b) {
    mma_f16(d, top, bottom, b);
  }
};

struct BFloat16 {
  using Bits = std::uint16_t;
  static __device__ __forceinline__ float load(Bits bits) {
    return __uint_as_float(static_cast<std::uint32_t>(bits) << 16);
  }
  /// To nearest, ties to even; a NaN stays one.
  static __device__ __forceinline__ Bits round(float value) {
    const std::uint32_t bits = __float_as_uint(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<Bits>((bits >> 16) | 0x40u);
    return static_cast<Bits>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
  static __device__ __forceinline__ void mma(float (&d)[4], Pair top, Pair bottom, Pair b) {
    mma_bf16(d, top, bottom, b);
  }
};

/// Numbers in a 16-byte load.
template <class Format>
constexpr int kVector = 16 / static_cast<int>(sizeof(typename Format::Bits));

/// 16 bytes of a row as numbers.
template <class Format>
union Vector {
  uint4 words;
  typename Format::Bits at[kVector<Format>];
};

/// Numbers from `column` on, zeros beyond `width`. `aligned` says that 16-byte loads may be used;
/// it changes no value. `row` is nullptr for a row that is not there.
template <class Format>
__device__ __forceinline__ Vector<Format> load_vector(const typename Format::Bits* row, int column,
                                                      int width, bool aligned) {
  Vector<Format> v;
  v.words = make_uint4(0u, 0u, 0u, 0u);
  if (row == nullptr) return v;
  if (aligned && column + kVector<Format> <= width) {
    v.words = *reinterpret_cast<const uint4*>(row + column);
    return v;
  }
#pragma unroll
  for (int i = 0; i < kVector<Format>; ++i) {
    if (column + i < width) v.at[i] = row[column + i];
  }
  return v;
}

}  // namespace midstream::cuda
