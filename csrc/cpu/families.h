// What every family of instruction sets offers, and the weight layouts that they share.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "dtypes.h"

// GCC 11 and clang 12 are the first whose assemblers know all of it.
#if defined(__x86_64__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define MIDSTREAM_HAS_BF16 1
#else
#define MIDSTREAM_HAS_BF16 0
#endif
#if MIDSTREAM_HAS_BF16 && defined(__linux__)
#define MIDSTREAM_HAS_AMX 1
#else
#define MIDSTREAM_HAS_AMX 0
#endif

namespace midstream {

/// Probes stand in panels of four: four sums per row keep the adders of a core busy while the
/// loads of the row are shared. The last panel is filled up with zeros.
constexpr int kPanel = 4;
/// Columns of a panel that stand together. Each is a partial sum of its own, so 16 columns make
/// the longest chain of roundings width / 16 + 4, on every instruction set.
constexpr int kWideStep = 16;
constexpr int kNarrowStep = 32;
/// Probes of a tile.
constexpr int kTile = 16;

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// Packed weights, zero beyond `probes` and `width`:
///   wide    fp32 [panels][steps of 16][kPanel][16]
///   narrow  bf16 [panels][steps of 32][kPanel][32]
///   tiles   bf16 [tiles][steps of 32][16 column pairs][kTile][2], what tdpbf16ps takes
struct Packed {
  const void* weight;
  const float* bias;
  std::int64_t probes;
  std::int64_t width;
  bool rms_norm;
  float eps;
};

struct RowBlock {
  const void* x;
  std::int64_t x_stride;
  std::int64_t rows;
  float* out;
  std::int64_t out_stride;
};

using ScoreRows = void (*)(const Packed&, const RowBlock&);
/// residual += x, rounded; returns the sum of squares.
using AddRow = float (*)(const void* x, void* residual, std::int64_t width);
/// x = gamma * (residual * scale), both products rounded.
using NormRow = void (*)(const void* residual, const void* gamma, float scale, void* x,
                         std::int64_t width);

/// Indexed by the DType of the rows. Weights are wide.
struct Family {
  ScoreRows score[3];
  AddRow add[3];
  NormRow norm[3];
};

extern const Family kGenericFamily;
#if defined(__x86_64__)
extern const Family kAvx2Family;
extern const Family kAvx512Family;
#endif

#if MIDSTREAM_HAS_BF16
/// bf16 rows and narrow weights. vdpbf16ps rounds each of its two adds to nearest even and treats
/// subnormal inputs and sums as zero: an error below 2^-126 per term.
void score_rows_avx512bf16(const Packed& packed, const RowBlock& rows);

/// Sum of squares of a bf16 row.
float sum_of_squares_avx512bf16(const BFloat16* x, std::int64_t width);
#endif

#if MIDSTREAM_HAS_AMX
/// bf16 rows and tiles of weights. tdpbf16ps rounds and flushes as vdpbf16ps does.
void score_rows_amx(const Packed& packed, const RowBlock& rows);
#endif

/// An infinite sum of squares would scale every logit to 0, a finite lie: NaN instead.
inline float rms_scale(float sum_of_squares, std::int64_t width, float eps) {
  if (std::isinf(sum_of_squares)) return std::numeric_limits<float>::quiet_NaN();
  return 1.0f / std::sqrt(sum_of_squares / static_cast<float>(width) + eps);
}

/// Logits of `count` probes from their sums, in the one way that all kernels share.
inline void finish(const float* sums, const float* bias, bool scaled, float scale,
                   std::int64_t count, float* out) {
  for (std::int64_t p = 0; p < count; ++p) out[p] = (scaled ? sums[p] * scale : sums[p]) + bias[p];
}

}  // namespace midstream
