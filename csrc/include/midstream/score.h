// score: probe logits of packed rows, on raw pointers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "midstream/isa.h"

namespace midstream {

struct BFloat16;

enum class DType : int { float32 = 0, float16 = 1, bfloat16 = 2 };

/// Probes of one tap as they are given: weight [probes, width] contiguous, bias [probes]. With
/// rms_norm, rows are divided by sqrt(mean(row^2) + eps) before they are scored.
struct ProbeTable {
  const void* weight;
  DType weight_dtype;
  const float* bias;
  std::int64_t probes;
  std::int64_t width;
  bool rms_norm;
  float eps;
};

/// Rows of `width` elements with a free row stride, which counts elements.
struct Hidden {
  const void* data;
  DType dtype;
  std::int64_t rows;
  std::int64_t stride;
};

/// Where the logits go: [rows, probes] with a free row stride. Must not overlap the rows.
struct Logits {
  float* data;
  std::int64_t stride;
};

/// Probes with their weights copied into the order in which the kernels read them. The instruction
/// set is that of isa() at construction, which throws as isa() does. `bias` is not copied: it is
/// read at every call and must outlive the object.
class Probes {
 public:
  explicit Probes(const ProbeTable& table);

  const ProbeTable& table() const { return table_; }
  Isa isa() const { return isa_; }
  const float* wide() const { return wide_.get(); }
  /// bf16 weights for bf16 rows; null where the instruction set does not multiply bf16.
  const BFloat16* narrow() const { return narrow_.get(); }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  ProbeTable table_;  // its weight is null: the address may be gone
  Isa isa_;
  std::unique_ptr<float[], Free> wide_;
  std::unique_ptr<BFloat16, Free> narrow_;
};

/// logits[n, p] = weight[p] . phi(hidden[n]) + bias[p], phi the identity or the division by the
/// root of the mean square. fp32 accumulation in an order given by `width` and the instruction set
/// alone: neither the other rows, the other probes nor `threads` change a result. No alignment is
/// required beyond that of the element type. At most `threads` threads are used, fewer where the
/// work is small.
void score(const Probes& probes, const Hidden& hidden, const Logits& logits, int threads);

}  // namespace midstream
