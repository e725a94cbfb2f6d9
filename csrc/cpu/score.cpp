#include "midstream/score.h"

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "midstream/isa.h"

#if defined(__x86_64__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own intrinsics read an "undefined" vector on purpose (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif

namespace midstream {
namespace {

struct Half {
  std::uint16_t bits;
};

struct BFloat16 {
  std::uint16_t bits;
};

using ScoreRows = void (*)(const ScoreArgs&);

inline float from_bits(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(float value) { return value; }

inline float widen(BFloat16 value) { return from_bits(std::uint32_t{value.bits} << 16); }

inline float widen(Half value) {
  const std::uint32_t sign = (value.bits & 0x8000u) << 16;
  const std::uint32_t exponent = (value.bits >> 10) & 0x1fu;
  const std::uint32_t mantissa = value.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24, exact in fp32
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  const std::uint32_t rebased = exponent == 0x1fu ? 0xffu : exponent + 112u;  // 127 - 15
  return from_bits(sign | (rebased << 23) | (mantissa << 13));
}

/// An infinite sum of squares would scale every logit to 0, a finite lie: NaN instead.
inline float rms_scale(float sum_of_squares, std::int64_t width, float eps) {
  if (std::isinf(sum_of_squares)) return std::numeric_limits<float>::quiet_NaN();
  return 1.0f / std::sqrt(sum_of_squares / static_cast<float>(width) + eps);
}

namespace generic {

#define MIDSTREAM_TARGET
struct Vec {
  static constexpr int kLanes = 8, kUnroll = 2;
  struct Register {
    float lane[kLanes];
  };
  static Register zero() { return {}; }
  template <class T>
  static Register load(const T* from) {
    Register r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = widen(from[i]);
    return r;
  }
  static Register fma(const Register& a, const Register& b, const Register& c) {
    Register r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
    return r;
  }
  static Register add(const Register& a, const Register& b) {
    Register r;
    for (int i = 0; i < kLanes; ++i) r.lane[i] = a.lane[i] + b.lane[i];
    return r;
  }
  static void store(float* to, const Register& r) { std::memcpy(to, r.lane, sizeof r.lane); }
};
#include "score_kernel.h"
#undef MIDSTREAM_TARGET

}  // namespace generic

#if defined(__x86_64__)

// 16 registers: 4 probes x 2 sums, 2 sums of squares, 2 of x and 1 of w.
namespace avx2 {

#define MIDSTREAM_TARGET __attribute__((target("avx2,fma,f16c")))
struct Vec {
  static constexpr int kLanes = 8, kUnroll = 2;
  using Register = __m256;
  MIDSTREAM_TARGET static Register zero() { return _mm256_setzero_ps(); }
  MIDSTREAM_TARGET static Register load(const float* from) { return _mm256_loadu_ps(from); }
  MIDSTREAM_TARGET static Register load(const Half* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  MIDSTREAM_TARGET static Register load(const BFloat16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  MIDSTREAM_TARGET static Register fma(Register a, Register b, Register c) {
    return _mm256_fmadd_ps(a, b, c);
  }
  MIDSTREAM_TARGET static Register add(Register a, Register b) { return _mm256_add_ps(a, b); }
  MIDSTREAM_TARGET static void store(float* to, Register r) { _mm256_storeu_ps(to, r); }
};
#include "score_kernel.h"
#undef MIDSTREAM_TARGET

}  // namespace avx2

// 32 registers: 4 probes x 4 sums, 4 sums of squares, 4 of x and 1 of w.
namespace avx512 {

#define MIDSTREAM_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx2,fma")))
struct Vec {
  static constexpr int kLanes = 16, kUnroll = 4;
  using Register = __m512;
  MIDSTREAM_TARGET static Register zero() { return _mm512_setzero_ps(); }
  MIDSTREAM_TARGET static Register load(const float* from) { return _mm512_loadu_ps(from); }
  MIDSTREAM_TARGET static Register load(const Half* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  MIDSTREAM_TARGET static Register load(const BFloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  MIDSTREAM_TARGET static Register fma(Register a, Register b, Register c) {
    return _mm512_fmadd_ps(a, b, c);
  }
  MIDSTREAM_TARGET static Register add(Register a, Register b) { return _mm512_add_ps(a, b); }
  MIDSTREAM_TARGET static void store(float* to, Register r) { _mm512_storeu_ps(to, r); }
};
#include "score_kernel.h"
#undef MIDSTREAM_TARGET

}  // namespace avx512

#endif  // __x86_64__

}  // namespace

void score(const ScoreArgs& args) {
  switch (isa()) {
#if defined(__x86_64__)
    case Isa::avx512:
      return avx512::kernel(args.hidden_dtype, args.weight_dtype)(args);
    case Isa::avx2:
      return avx2::kernel(args.hidden_dtype, args.weight_dtype)(args);
#endif
    default:
      return generic::kernel(args.hidden_dtype, args.weight_dtype)(args);
  }
}

}  // namespace midstream
