// Products of bfloat16 pairs, for AVX-512 with BF16. An operand's element is a
// pair of neighbours in depth, a tile's float sums up both products. To be included
// inside a target region (target.h), after simd_avx512.h and product.h.
#pragma once

namespace mmdgt::cpu {

struct Avx512Bf16 : Avx512 {
  using Avx512::store;
  static MMDGT_INLINE void store(c10::BFloat16* to, Reg reg) {
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(reg));
  }
};

struct Bf16Pairs {
  using Reg = __m512;
  static constexpr int kNumbers = 2;
  static MMDGT_INLINE Reg fmadd(Reg a, Reg b, Reg c) {
    return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
  }
};

struct Bf16PairsLayout {
  using T = c10::BFloat16;
  using Multiply = Bf16Pairs;
  using Probability = T;  // rounded as plain bfloat16 code rounds it

  static MMDGT_INLINE void pack_row(const T* from, float* to, int64_t length,
                                    int64_t padded) {
    int64_t pair = 0;
    for (; 2 * pair + 32 <= length; pair += 16) {
      _mm512_storeu_si512(to + pair, _mm512_loadu_si512(from + 2 * pair));
    }
    for (; 2 * pair < length; pair += 4) {
      _mm_storeu_si128((__m128i*)(to + pair),
                       _mm_loadu_si128((const __m128i*)(from + 2 * pair)));
    }
    for (; pair < padded; ++pair) to[pair] = 0;
  }

  // value (K, D), gathered -> (K / 2, padded), pairs of a column's neighbours.
  static void pack_values(Rows<const T> value, const int32_t* index, int64_t num_keys,
                          float* to, int64_t length, int64_t padded) {
    const __m256i zero = _mm256_setzero_si256();
    for (int64_t i = 0; i < num_keys; i += 2) {
      for (int64_t next = i + kAhead; next < i + kAhead + 2; ++next) {
        prefetch_row(value, index, next, num_keys, length);
      }
      const T* even = value[index[i]];
      const T* odd = i + 1 < num_keys ? value[index[i + 1]] : nullptr;
      for (int64_t d = 0; d < padded; d += 16) {
        const auto mask =
            static_cast<__mmask16>(length - d < 16 ? (1u << (length - d)) - 1 : 0xffffu);
        const __m512i low =
            _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even + d));
        const __m512i high =
            _mm512_cvtepu16_epi32(odd ? _mm256_maskz_loadu_epi16(mask, odd + d) : zero);
        _mm512_storeu_si512(to + d, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
      to += padded;
    }
  }
};

}  // namespace mmdgt::cpu
