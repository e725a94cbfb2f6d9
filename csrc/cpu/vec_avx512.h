// Vec on AVX-512: 32 registers, of which 2 rows x 8 probes take 16 for sums, 2 for the rows'
// squares, 2 for x and 1 for the weights. 4 rows x 4 probes need as many, but they read x twice.

struct Vec {
  static constexpr int kRows = 2, kPanels = 2;
  using Register = __m512;
  MIDSTREAM_INLINE static Register zero() { return _mm512_setzero_ps(); }
  MIDSTREAM_INLINE static Register splat(float value) { return _mm512_set1_ps(value); }
  MIDSTREAM_INLINE static Register add(Register a, Register b) { return _mm512_add_ps(a, b); }
  MIDSTREAM_INLINE static Register mul(Register a, Register b) { return _mm512_mul_ps(a, b); }
  MIDSTREAM_INLINE static Register fma(Register a, Register b, Register c) {
    return _mm512_fmadd_ps(a, b, c);
  }

  struct Halfs {
    __m256i bits;
  };
  struct BFloat16s {
    __m256i bits;
  };
  MIDSTREAM_INLINE static Register widen(Register value) { return value; }
  MIDSTREAM_INLINE static Register widen(Halfs value) { return _mm512_cvtph_ps(value.bits); }
  MIDSTREAM_INLINE static Register widen(BFloat16s value) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(value.bits), 16));
  }
  MIDSTREAM_INLINE static Register narrow(Register value, float) { return value; }
  MIDSTREAM_INLINE static Halfs narrow(Register value, Half) {
    return {_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)};
  }
  // Not vcvtneps2bf16, which treats subnormal numbers as zero.
  MIDSTREAM_INLINE static BFloat16s narrow(Register value, BFloat16) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return {_mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16))};
  }

  MIDSTREAM_INLINE static Register load(const float* from) { return _mm512_loadu_ps(from); }
  MIDSTREAM_INLINE static Register load(const Half* from) {
    return widen(Halfs{_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))});
  }
  MIDSTREAM_INLINE static Register load(const BFloat16* from) {
    return widen(BFloat16s{_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))});
  }
  MIDSTREAM_INLINE static void store(float* to, Register value) { _mm512_storeu_ps(to, value); }
  MIDSTREAM_INLINE static void store(Half* to, Halfs value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value.bits);
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
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1));
    const __m256 sum = _mm256_add_ps(_mm512_castps512_ps256(a), high);
    return _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
  }
};
