// The evidence bin of a row: which bin sum(softplus(logit)) falls into. Only the bin matters, and a
// table finds it, unless an edge is so near that the exact sum must decide.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

namespace midstream {

inline float softplus(float x) { return std::max(x, 0.0f) + std::log1p(std::exp(-std::fabs(x))); }

/// Number of edges at or below the value, all of them for NaN.
inline std::int64_t bin_of(float log_hazard, const float* edges, std::int64_t bins) {
  std::int64_t bin = 0;  // a search by halves would guess wrong at half of its branches
  for (std::int64_t b = 0; b < bins - 1; ++b) bin += log_hazard < edges[b] ? 0 : 1;
  return bin;
}

/// log1p(exp(-x)) on [0, 16] in steps of 1/64, read with linear interpolation. The second
/// derivative is at most 1/4, so that is off by at most (1/64)^2 / 8 / 4 = 7.7e-6; beyond 16,
/// by 1.2e-7.
struct SoftplusTable {
  static constexpr float kEnd = 16.0f, kPerUnit = 64.0f, kError = 1e-5f;
  std::array<float, 1026> value;

  SoftplusTable() {
    for (std::size_t i = 0; i < value.size(); ++i) {
      value[i] = static_cast<float>(std::log1p(std::exp(-static_cast<double>(i) / kPerUnit)));
    }
  }

  float softplus(float x) const {
    const float above = std::max(x, 0.0f), magnitude = std::fabs(x);
    if (!(magnitude < kEnd)) return above;
    const float place = magnitude * kPerUnit;
    const int left = static_cast<int>(place);
    return above + value[left] +
           (value[left + 1] - value[left]) * (place - static_cast<float>(left));
  }
};

inline const SoftplusTable kSoftplus;

class LogHazard {
 public:
  void add(float hazard_logit) {
    sum_ += kSoftplus.softplus(hazard_logit);
    ++terms_;
  }

  /// The bin of the exact fp32 sum, in whatever order its terms are added; -1 where an edge lies so
  /// near that the table cannot tell.
  std::int64_t bin(const float* edges, std::int64_t bins) const {
    // Each of the two sums rounds once per term; all terms are positive.
    const float rounding = 2.0f * static_cast<float>(terms_) * 0x1p-23f * sum_;
    const float off = static_cast<float>(terms_) * SoftplusTable::kError + rounding;
    if (!(sum_ + off < 1e30f)) return -1;  // infinite or NaN
    const std::int64_t bin = bin_of(sum_ - off, edges, bins);
    const bool clear = bin == bins - 1 || edges[bin] > sum_ + off;
    return clear ? bin : -1;
  }

 private:
  float sum_ = 0.0f;
  int terms_ = 0;
};

}  // namespace midstream
