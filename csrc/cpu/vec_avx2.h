// Vec on AVX2: a register is a pair. Of 16, four probes take 8 for sums, 2 for squares and 2 for x;
// a second row would not fit.

struct Vec {
  static constexpr int kRows = 1, kPanels = 1;
  struct Register {
    __m256 low, high;
  };
  MIDSTREAM_INLINE static Register zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  MIDSTREAM_INLINE static Register splat(float value) {
    return {_mm256_set1_ps(value), _mm256_set1_ps(value)};
  }
  MIDSTREAM_INLINE static Register add(Register a, Register b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
  }
  MIDSTREAM_INLINE static Register mul(Register a, Register b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
  }
  MIDSTREAM_INLINE static Register fma(Register a, Register b, Register c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }

  struct Halfs {
    __m128i low, high;
  };
  struct BFloat16s {
    __m256i bits;
  };
  MIDSTREAM_INLINE static Register widen(Register value) { return value; }
  MIDSTREAM_INLINE static Register widen(Halfs value) {
    return {_mm256_cvtph_ps(value.low), _mm256_cvtph_ps(value.high)};
  }
  MIDSTREAM_INLINE static Register widen(BFloat16s value) {
    return {widen_eight(_mm256_castsi256_si128(value.bits)),
            widen_eight(_mm256_extracti128_si256(value.bits, 1))};
  }
  MIDSTREAM_INLINE static __m256 widen_eight(__m128i bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  MIDSTREAM_INLINE static Register narrow(Register value, float) { return value; }
  MIDSTREAM_INLINE static Halfs narrow(Register value, Half) {
    return {_mm256_cvtps_ph(value.low, _MM_FROUND_TO_NEAREST_INT),
            _mm256_cvtps_ph(value.high, _MM_FROUND_TO_NEAREST_INT)};
  }
  MIDSTREAM_INLINE static BFloat16s narrow(Register value, BFloat16) {
    const __m256i packed = _mm256_packus_epi32(narrow_eight(value.low), narrow_eight(value.high));
    return {_mm256_permute4x64_epi64(packed, _MM_SHUFFLE(3, 1, 2, 0))};
  }
  MIDSTREAM_INLINE static __m256i narrow_eight(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  }

  MIDSTREAM_INLINE static Register load(const float* from) {
    return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
  }
  MIDSTREAM_INLINE static Register load(const Half* from) {
    return widen(Halfs{_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 8))});
  }
  MIDSTREAM_INLINE static Register load(const BFloat16* from) {
    return widen(BFloat16s{_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))});
  }
  MIDSTREAM_INLINE static void store(float* to, Register value) {
    _mm256_storeu_ps(to, value.low);
    _mm256_storeu_ps(to + 8, value.high);
  }
  MIDSTREAM_INLINE static void store(Half* to, Halfs value) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), value.low);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), value.high);
  }
  MIDSTREAM_INLINE static void store(BFloat16* to, BFloat16s value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value.bits);
  }

  /// Sums over the lanes of four registers, each by halving.
  MIDSTREAM_INLINE static void reduce(Register a, Register b, Register c, Register d, float* sums) {
    const __m128 w = halves(a), x = halves(b), y = halves(c), z = halves(d);
    const __m128 wx = _mm_add_ps(_mm_movelh_ps(w, x), _mm_movehl_ps(x, w));
    const __m128 yz = _mm_add_ps(_mm_movelh_ps(y, z), _mm_movehl_ps(z, y));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_shuffle_ps(wx, yz, _MM_SHUFFLE(2, 0, 2, 0)),
                                   _mm_shuffle_ps(wx, yz, _MM_SHUFFLE(3, 1, 3, 1))));
  }
  MIDSTREAM_INLINE static __m128 halves(Register a) {
    const __m256 sum = _mm256_add_ps(a.low, a.high);
    return _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  }
};
