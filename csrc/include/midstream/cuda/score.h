// Ops that read the residual stream, on device pointers and a stream. They neither wait for the
// device nor allocate, so they can be captured in a CUDA graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "midstream/cuda/advance.h"

namespace midstream::cuda {

enum class DType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

/// Packed weights are padded with zeros to [PackedProbes, PackedWidth], multiples of these.
constexpr int kPackProbes = 32;
constexpr int kPackWidth = 128;

/// The probes of a tap, packed once. Which copy is read depends on the format of the hidden rows.
struct Probes {
  const void* bfloat16;  // [bfloat16_parts, padded P, padded d], for bfloat16 rows
  int bfloat16_parts;    // 1, or 3 whose sum is the weight to all its 24 bits
  const void* float16;   // for float16 rows, or nullptr: the fp32 copy serves them
  const float* float32;  // for float32 rows
  const float* bias;     // [P]
  int probes;            // P
  int width;             // d
  bool rms_norm;
  float eps;
};

/// hidden [count, d] with a free row stride. Strides count elements.
struct HiddenRows {
  const void* data;
  DType dtype;
  std::int64_t stride;
  std::int64_t count;
};

/// out[n, p] = weight[p] . phi(hidden[n]) + bias[p]; see kernels/reference.py.
cudaError_t score(const Probes& probes, const HiddenRows& hidden, float* out,
                  std::int64_t out_stride, cudaStream_t stream);

/// score into rows.logits, then advance: the same bits, one launch.
cudaError_t score_advance(const Probes& probes, const HiddenRows& hidden, const Rows& rows,
                          const Tables& tables, cudaStream_t stream);

/// x and residual [count, d], gamma [d], all of one dtype; x and residual are changed in place.
struct NormRows {
  void* x;
  std::int64_t x_stride;
  void* residual;
  std::int64_t residual_stride;
  const void* gamma;
  DType dtype;
  std::int64_t count;
  float norm_eps;
};

/// residual += x; x = gamma * normed residual; out = score(residual).
cudaError_t add_rms_norm_score(const Probes& probes, const NormRows& rows, float* out,
                               std::int64_t out_stride, cudaStream_t stream);

/// Whether score_advance has the shared memory for tables of these sizes.
bool fits_score_advance(const Sizes& sizes);

/// Load an op's kernels onto the current device, which a graph capture may not do.
cudaError_t load_score_kernels();
cudaError_t load_score_advance_kernels();
cudaError_t load_add_rms_norm_score_kernels();

}  // namespace midstream::cuda
