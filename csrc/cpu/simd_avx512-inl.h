// Vectors of sixteen floats, for AVX-512 (F, BW, DQ, VL). The members are those of
// Portable (simd_portable.h).
#pragma once

namespace mmdgt::cpu {

struct Avx512 {
  using Scalar = float;
  using Reg = __m512;
  static constexpr int kWidth = 16;
  static constexpr int kTileRows = 6;
  static constexpr int kTileVectors = 4;

  static MMDGT_INLINE Reg zero() { return _mm512_setzero_ps(); }
  static MMDGT_INLINE Reg broadcast(float value) { return _mm512_set1_ps(value); }
  static MMDGT_INLINE Reg load(const float* from) { return _mm512_loadu_ps(from); }
  static MMDGT_INLINE Reg load(const double* from) {
    return _mm512_insertf32x8(
        _mm512_castps256_ps512(_mm512_cvtpd_ps(_mm512_loadu_pd(from))),
        _mm512_cvtpd_ps(_mm512_loadu_pd(from + 8)), 1);
  }
  static MMDGT_INLINE Reg load(const c10::Half* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
  }
  static MMDGT_INLINE Reg load(const c10::BFloat16* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static MMDGT_INLINE void store(float* to, Reg reg) { _mm512_storeu_ps(to, reg); }
  static MMDGT_INLINE void store(c10::Half* to, Reg reg) {
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(reg, _MM_FROUND_TO_NEAREST_INT));
  }
  static MMDGT_INLINE void store(c10::BFloat16* to, Reg reg) {
    const __m512i bits = _mm512_castps_si512(reg);
    const __m512i odd =
        _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded =
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    rounded = _mm512_srli_epi32(rounded, 16);
    rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(reg, reg, _CMP_UNORD_Q),
                                    _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(rounded));
  }
  static MMDGT_INLINE Reg fmadd(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static MMDGT_INLINE Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static MMDGT_INLINE float sum(Reg reg) { return _mm512_reduce_add_ps(reg); }
  static MMDGT_INLINE float largest(Reg reg) { return _mm512_reduce_max_ps(reg); }
  static MMDGT_INLINE uint32_t equal(Reg a, Reg b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ);
  }
  static MMDGT_INLINE uint32_t unordered(Reg a, Reg b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q);
  }
  static MMDGT_INLINE uint32_t not_less(Reg a, Reg b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ);
  }
  static MMDGT_INLINE Reg count_not_below(Reg count, Reg a, Reg b) {
    return _mm512_mask_add_ps(count, _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ), count,
                              broadcast(1));
  }
  static MMDGT_INLINE Reg keep(Reg reg, uint32_t bits) {
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), reg);
  }
  static MMDGT_INLINE Reg gather(const float* from, const int32_t* index) {
    // Into zeros, or else it would wait for what the register held before.
    return _mm512_mask_i32gather_ps(zero(), 0xffff, _mm512_loadu_si512(index), from,
                                    sizeof(float));
  }
  static MMDGT_INLINE void store_set(int32_t* to, int32_t first, uint32_t bits) {
    const __m512i lane =
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i numbers = _mm512_add_epi32(_mm512_set1_epi32(first), lane);
    _mm512_storeu_si512(
        to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(bits), numbers));
  }
  static MMDGT_INLINE Reg exp2(Reg x) {
    const Reg whole =
        _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Reg r = _mm512_sub_ps(x, whole);
    Reg poly = broadcast(kExp2Coefficients[5]);
#pragma GCC unroll 5
    for (int i = 4; i >= 0; --i) {
      poly = fmadd(poly, r, broadcast(kExp2Coefficients[i]));
    }
    return _mm512_scalef_ps(poly, whole);
  }
  static MMDGT_INLINE void transpose(Reg (&tile)[kWidth]) {
    Reg pairs[16], quads[16], octets[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_unpacklo_ps(tile[i], tile[i + 1]);
      pairs[i + 1] = _mm512_unpackhi_ps(tile[i], tile[i + 1]);
    }
    // quads[4 m + c]: rows 4 m .. 4 m + 3 of columns c, c + 4, c + 8, c + 12.
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
      quads[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      quads[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
      quads[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      quads[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      octets[c] = _mm512_shuffle_f32x4(quads[c], quads[c + 4], 0x88);
      octets[c + 4] = _mm512_shuffle_f32x4(quads[c], quads[c + 4], 0xdd);
      octets[c + 8] = _mm512_shuffle_f32x4(quads[c + 8], quads[c + 12], 0x88);
      octets[c + 12] = _mm512_shuffle_f32x4(quads[c + 8], quads[c + 12], 0xdd);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      tile[c] = _mm512_shuffle_f32x4(octets[c], octets[c + 8], 0x88);
      tile[c + 8] = _mm512_shuffle_f32x4(octets[c], octets[c + 8], 0xdd);
      tile[c + 4] = _mm512_shuffle_f32x4(octets[c + 4], octets[c + 12], 0x88);
      tile[c + 12] = _mm512_shuffle_f32x4(octets[c + 4], octets[c + 12], 0xdd);
    }
  }
};

}  // namespace mmdgt::cpu
