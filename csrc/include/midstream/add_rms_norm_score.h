// add_rms_norm_score: what precedes a decoder's next block, with the probes riding along.
#pragma once

#include "midstream/score.h"

namespace midstream {

/// Rows of a decoder layer, all of one dtype; strides count elements. x and residual are changed.
struct NormRows {
  void* x;
  std::int64_t x_stride;
  void* residual;
  std::int64_t residual_stride;
  const void* gamma;  // [width], contiguous
  DType dtype;
  std::int64_t rows;
  float eps;
};

/// residual = x + residual; logits = score(residual); x = gamma * (residual / rms(residual)), where
/// every result, the quotient included, is rounded to the dtype of the rows. Logits have the bits
/// that score() gives for the sum. `threads` as there.
void add_rms_norm_score(const Probes& probes, const NormRows& rows, const Logits& logits,
                        int threads);

}  // namespace midstream
