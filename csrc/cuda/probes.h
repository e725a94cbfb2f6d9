// From the probes of a tap and the format of its rows to the kernel that serves them.
#pragma once

#include <cstdint>

#include "midstream/cuda/score.h"
#include "score_tile.cuh"

namespace midstream::cuda {

inline Weights weights_of(const Probes& probes, const void* packed) {
  return {packed,
          static_cast<int>(ceil_div(probes.probes, kPackProbes) * kPackProbes),
          static_cast<int>(ceil_div(probes.width, kPackWidth) * kPackWidth),
          probes.bias,
          probes.probes,
          probes.width,
          probes.rms_norm,
          probes.eps};
}

template <class Kind>
struct Type {
  using type = Kind;
};

/// The kinds of tile by format of rows and weights: on tensor cores `kRowTiles` times 16 rows and
/// `kProbeTiles` times 8 probes, on the other path `kFmaRows` rows.
template <int kRowTiles, int kProbeTiles, int kFmaRows>
struct Kinds {
  using BFloat16Weights = TensorCores<BFloat16, 1, kRowTiles, kProbeTiles>;
  // Three accumulators for every probe: half as many probes at once, or registers spill.
  using Parts = TensorCores<BFloat16, 3, kRowTiles, (kProbeTiles + 1) / 2>;
  using Float16Weights = TensorCores<Float16, 1, kRowTiles, kProbeTiles>;
  using Float16Rows = Fma<Float16, kFmaRows>;
  using Float32Rows = Fma<Float32, kFmaRows>;
};

/// Call `use(Type<Kind>(), weights)` with the kind for these probes and rows of this format.
template <int kRowTiles, int kProbeTiles, int kFmaRows, class Use>
cudaError_t with_kind(const Probes& probes, DType dtype, Use use) {
  using K = Kinds<kRowTiles, kProbeTiles, kFmaRows>;
  if (dtype == DType::bfloat16 && probes.bfloat16_parts == 1) {
    return use(Type<typename K::BFloat16Weights>(), weights_of(probes, probes.bfloat16));
  }
  if (dtype == DType::bfloat16) {
    return use(Type<typename K::Parts>(), weights_of(probes, probes.bfloat16));
  }
  if (dtype == DType::float16 && probes.float16 != nullptr) {
    return use(Type<typename K::Float16Weights>(), weights_of(probes, probes.float16));
  }
  if (dtype == DType::float16) {
    return use(Type<typename K::Float16Rows>(), weights_of(probes, probes.float32));
  }
  return use(Type<typename K::Float32Rows>(), weights_of(probes, probes.float32));
}

/// Call `use(Type<Kind>())` with every kind until one fails.
template <int kRowTiles, int kProbeTiles, int kFmaRows, class Use>
cudaError_t for_each_kind(Use use) {
  using K = Kinds<kRowTiles, kProbeTiles, kFmaRows>;
  cudaError_t error = use(Type<typename K::BFloat16Weights>());
  if (error == cudaSuccess) error = use(Type<typename K::Parts>());
  if (error == cudaSuccess) error = use(Type<typename K::Float16Weights>());
  if (error == cudaSuccess) error = use(Type<typename K::Float16Rows>());
  if (error == cudaSuccess) error = use(Type<typename K::Float32Rows>());
  return error;
}

/// Whether rows at `data`, `stride` apart, all start at a multiple of 16 bytes.
template <class Format>
bool is_aligned(const void* data, std::int64_t stride) {
  return (reinterpret_cast<std::uintptr_t>(data) % 16 == 0) && stride % kVector<Format> == 0;
}

}  // namespace midstream::cuda
