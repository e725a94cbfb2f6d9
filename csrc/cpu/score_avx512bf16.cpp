// Score on AVX512-BF16: 32 products per instruction, where rows and weights are bf16.

#include "families.h"

#if MIDSTREAM_HAS_BF16

#include <algorithm>
#include <cstring>

#include "intrinsics.h"

namespace midstream {
namespace avx512bf16 {
namespace {

#define MIDSTREAM_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma")))
#define MIDSTREAM_INLINE MIDSTREAM_TARGET __attribute__((always_inline)) inline
#include "vec_avx512.h"

// It needs the above.
#include "dot_kernel.h"

struct NarrowDot {
  using Input = BFloat16;
  using Weight = BFloat16;
  using Operand = __m512i;
  using Sum = __m512;
  static constexpr int kStep = kNarrowStep;
  MIDSTREAM_INLINE static Operand load(const BFloat16* from) { return _mm512_loadu_si512(from); }
  MIDSTREAM_INLINE static Sum mac(Operand x, Operand w, Sum sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
  }
};

}  // namespace
}  // namespace avx512bf16

void score_rows_avx512bf16(const Packed& packed, const RowBlock& rows) {
  avx512bf16::score_rows<avx512bf16::NarrowDot>(packed, rows);
}

__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx2,fma"))) float
sum_of_squares_avx512bf16(const BFloat16* x, std::int64_t width) {
  using Dot = avx512bf16::NarrowDot;
  __m512 sum[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(),
                   _mm512_setzero_ps()};
  std::int64_t i = 0;
  for (; i + 4 * kNarrowStep <= width; i += 4 * kNarrowStep) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m512i value = Dot::load(x + i + c * kNarrowStep);
      sum[c] = Dot::mac(value, value, sum[c]);
    }
  }
  for (; i < width; i += kNarrowStep) {
    BFloat16 tail[kNarrowStep] = {};
    const std::int64_t rest = std::min<std::int64_t>(width - i, kNarrowStep);
    std::memcpy(tail, x + i, static_cast<std::size_t>(rest) * sizeof(BFloat16));
    const __m512i value = Dot::load(tail);
    sum[0] = Dot::mac(value, value, sum[0]);
  }
  float sums[4];
  avx512bf16::Vec::reduce(sum[0], sum[1], sum[2], sum[3], sums);
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

}  // namespace midstream

#endif  // MIDSTREAM_HAS_BF16
