// Vectors of eight floats, for AVX2 with FMA and F16C. The members are those of
// Portable (simd_portable.h).
#pragma once

namespace mmdgt::cpu {

// The places of the set bits of every byte, a byte each.
struct SetBits {
  uint64_t places[256] = {};

  constexpr SetBits() {
    for (int byte = 0; byte < 256; ++byte) {
      for (int bit = 0, count = 0; bit < 8; ++bit) {
        if (byte >> bit & 1) places[byte] |= static_cast<uint64_t>(bit) << 8 * count++;
      }
    }
  }
};
constexpr SetBits kSetBits;

struct Avx2 {
  using Scalar = float;
  using Reg = __m256;
  static constexpr int kWidth = 8;
  static constexpr int kTileRows = 6;
  static constexpr int kTileVectors = 2;

  static MMDGT_INLINE Reg zero() { return _mm256_setzero_ps(); }
  static MMDGT_INLINE Reg broadcast(float value) { return _mm256_set1_ps(value); }
  static MMDGT_INLINE Reg load(const float* from) { return _mm256_loadu_ps(from); }
  static MMDGT_INLINE Reg load(const double* from) {
    return _mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(from + 4)),
                           _mm256_cvtpd_ps(_mm256_loadu_pd(from)));
  }
  static MMDGT_INLINE Reg load(const c10::Half* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
  }
  static MMDGT_INLINE Reg load(const c10::BFloat16* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static MMDGT_INLINE void store(float* to, Reg reg) { _mm256_storeu_ps(to, reg); }
  static MMDGT_INLINE void store(c10::Half* to, Reg reg) {
    _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(reg, _MM_FROUND_TO_NEAREST_INT));
  }
  static MMDGT_INLINE void store(c10::BFloat16* to, Reg reg) {
    const __m256i bits = _mm256_castps_si256(reg);
    const __m256i odd =
        _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    rounded = _mm256_srli_epi32(rounded, 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(reg, reg, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    _mm_storeu_si128((__m128i*)to,
                     _mm_packus_epi32(_mm256_castsi256_si128(rounded),
                                      _mm256_extracti128_si256(rounded, 1)));
  }
  static MMDGT_INLINE Reg fmadd(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static MMDGT_INLINE Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static MMDGT_INLINE float sum(Reg reg) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(reg), _mm256_extractf128_ps(reg, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  static MMDGT_INLINE float largest(Reg reg) {
    __m128 half = _mm_max_ps(_mm256_castps256_ps128(reg), _mm256_extractf128_ps(reg, 1));
    half = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(half, _mm_movehdup_ps(half)));
  }
  static MMDGT_INLINE uint32_t equal(Reg a, Reg b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_EQ_OQ));
  }
  static MMDGT_INLINE uint32_t unordered(Reg a, Reg b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q));
  }
  static MMDGT_INLINE uint32_t not_less(Reg a, Reg b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ));
  }
  static MMDGT_INLINE Reg count_not_below(Reg count, Reg a, Reg b) {
    const Reg one = _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_GE_OQ), broadcast(1));
    return _mm256_add_ps(count, one);
  }
  static MMDGT_INLINE Reg keep(Reg reg, uint32_t bits) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane);
    return _mm256_and_ps(reg, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, lane)));
  }
  static MMDGT_INLINE Reg gather(const float* from, const int32_t* index) {
    // Into zeros, or else it would wait for what the register held before.
    return _mm256_mask_i32gather_ps(
        zero(), from, _mm256_loadu_si256((const __m256i*)index),
        _mm256_castsi256_ps(_mm256_set1_epi32(-1)), sizeof(float));
  }
  static MMDGT_INLINE void store_set(int32_t* to, int32_t first, uint32_t bits) {
    const __m128i places = _mm_loadl_epi64((const __m128i*)&kSetBits.places[bits]);
    _mm256_storeu_si256((__m256i*)to, _mm256_add_epi32(_mm256_cvtepu8_epi32(places),
                                                       _mm256_set1_epi32(first)));
  }
  static MMDGT_INLINE Reg exp2(Reg x) {
    x = _mm256_max_ps(broadcast(-126.0f), x);  // in this order NaN stays
    // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
    const Reg magic = broadcast(12582912.0f);
    const Reg shifted = _mm256_add_ps(x, magic);
    const Reg r = _mm256_sub_ps(x, _mm256_sub_ps(shifted, magic));
    const __m256i power =
        _mm256_add_epi32(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23),
                         _mm256_set1_epi32(0x3f800000));
    Reg poly = broadcast(kExp2Coefficients[5]);
#pragma GCC unroll 5
    for (int i = 4; i >= 0; --i) {
      poly = fmadd(poly, r, broadcast(kExp2Coefficients[i]));
    }
    return _mm256_mul_ps(poly, _mm256_castsi256_ps(power));
  }
  static MMDGT_INLINE void transpose(Reg (&tile)[kWidth]) {
    Reg pairs[8], quads[8];
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(tile[i], tile[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(tile[i], tile[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      for (int j = 0; j < 2; ++j) {
        quads[i + 2 * j] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0x44);
        quads[i + 2 * j + 1] = _mm256_shuffle_ps(pairs[i + j], pairs[i + j + 2], 0xee);
      }
    }
    for (int i = 0; i < 4; ++i) {
      tile[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
      tile[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
  }
};

}  // namespace mmdgt::cpu
