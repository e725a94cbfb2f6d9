// score: probe logits of packed rows, on raw pointers.
#pragma once

#include <cstdint>

namespace midstream {

enum class DType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

/// hidden [rows, width] with a free row stride, weight [probes, width] contiguous, bias [probes],
/// out [rows, probes] with a free row stride. Strides count elements. Nothing may overlap `out`.
struct ScoreArgs {
  const void* hidden;
  DType hidden_dtype;
  std::int64_t rows;
  std::int64_t hidden_stride;
  const void* weight;
  DType weight_dtype;
  const float* bias;
  std::int64_t probes;
  std::int64_t width;
  float* out;
  std::int64_t out_stride;
  bool rms_norm;
  float eps;
};

/// out[n, p] = weight[p] . phi(hidden[n]) + bias[p], phi the identity or the division by
/// sqrt(mean(hidden[n]^2) + eps). fp32 accumulation in an order given by `width` and the
/// instruction set alone: neither the other rows nor the other probes change a result. No
/// alignment is required beyond that of the element type. Throws as isa() does.
void score(const ScoreArgs& args);

}  // namespace midstream
