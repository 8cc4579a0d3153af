// Vectors in the compiler's own extension: 16 bytes, which every machine has. Their
// members are also what the kernels ask of every other kind of vectors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "target.h"

namespace mmdgt::cpu {

// 2^r on [-1/2, 1/2], relative error 2e-7; shared by all float vectors.
constexpr float kExp2Coefficients[] = {1.0f,         0.693147f,    0.24022242f,
                                       0.055507336f, 0.009671513f, 0.0013264727f};

template <class T>
struct Portable {
  // The type of a lane. Routing takes vectors of floats, attention and norms those of
  // accumulate_t.
  using Scalar = T;
  // A register, with the operators of the compiler's vectors: + - * / and < > ? :.
  typedef T Reg __attribute__((vector_size(16)));
  // Lanes in a register, a power of two up to 16.
  static constexpr int kWidth = 16 / sizeof(T);
  // The register tile of a matrix product: rows, which divide kQueryBlock and
  // kScoredTokens, times 2 or 4 vectors.
  static constexpr int kTileRows = 4;
  static constexpr int kTileVectors = 2;

  static MMDGT_INLINE Reg zero() { return Reg{}; }
  static MMDGT_INLINE Reg broadcast(T value) { return Reg{} + value; }
  // kWidth numbers in any floating type, aligned or not. Storing rounds to the nearest.
  static MMDGT_INLINE Reg load(const T* from) {
    Reg reg;
    std::memcpy(&reg, from, sizeof(reg));
    return reg;
  }
  template <class Stored>
  static MMDGT_INLINE Reg load(const Stored* from) {
    Reg reg;
    for (int i = 0; i < kWidth; ++i) reg[i] = static_cast<T>(from[i]);
    return reg;
  }
  static MMDGT_INLINE void store(T* to, Reg reg) { std::memcpy(to, &reg, sizeof(reg)); }
  template <class Stored>
  static MMDGT_INLINE void store(Stored* to, Reg reg) {
    for (int i = 0; i < kWidth; ++i) to[i] = static_cast<Stored>(reg[i]);
  }
  static MMDGT_INLINE Reg fmadd(Reg a, Reg b, Reg c) { return a * b + c; }
  // b where either is NaN.
  static MMDGT_INLINE Reg max(Reg a, Reg b) { return a > b ? a : b; }
  // Over the lanes.
  static MMDGT_INLINE T sum(Reg reg) {
    T total = 0;
    for (int i = 0; i < kWidth; ++i) total += reg[i];
    return total;
  }
  static MMDGT_INLINE T largest(Reg reg) {
    T best = reg[0];
    for (int i = 1; i < kWidth; ++i) best = reg[i] > best ? reg[i] : best;
    return best;
  }
  // Comparisons, one bit per lane: a == b; either is NaN; not a < b.
  static MMDGT_INLINE uint32_t equal(Reg a, Reg b) { return bits(a == b); }
  static MMDGT_INLINE uint32_t unordered(Reg a, Reg b) {
    return bits((a != a) | (b != b));
  }
  static MMDGT_INLINE uint32_t not_less(Reg a, Reg b) { return bits(~(a < b)); }
  // count + 1 in the lanes where a >= b.
  static MMDGT_INLINE Reg count_not_below(Reg count, Reg a, Reg b) {
    return a >= b ? count + T(1) : count;
  }
  // The lanes whose bit is set, zeros in the others.
  static MMDGT_INLINE Reg keep(Reg reg, uint32_t bits) {
    for (int i = 0; i < kWidth; ++i) reg[i] = bits >> i & 1 ? reg[i] : T(0);
    return reg;
  }
  // from[index[i]] in lane i.
  static MMDGT_INLINE Reg gather(const T* from, const int32_t* index) {
    Reg reg;
    for (int i = 0; i < kWidth; ++i) reg[i] = from[index[i]];
    return reg;
  }
  // Stores first + i for every set bit i, one after the other, and something in the
  // rest of kWidth places.
  static MMDGT_INLINE void store_set(int32_t* to, int32_t first, uint32_t bits) {
    for (int i = 0; i < kWidth; ++i) {
      *to = first + i;
      to += bits >> i & 1;
    }
  }
  // 2^x up to x = 127, relative error 2e-7; below -126 anything from 0 to 2^-126. NaN
  // stays NaN.
  static MMDGT_INLINE Reg exp2(Reg x) {
    if constexpr (std::is_same_v<T, double>) {
      for (int i = 0; i < kWidth; ++i) x[i] = std::exp2(x[i]);
      return x;
    } else {
      typedef int32_t Ints __attribute__((vector_size(16)));
      x = x < -126.0f ? broadcast(-126.0f) : x;
      // Adding 1.5 * 2^23 leaves the nearest integer in the low bits.
      const Reg shifted = x + 12582912.0f;
      const Reg r = x - (shifted - 12582912.0f);
      const Reg power = (Reg)(((Ints)shifted << 23) + 0x3f800000);
      Reg poly = broadcast(kExp2Coefficients[5]);
      for (int i = 4; i >= 0; --i) poly = poly * r + kExp2Coefficients[i];
      return poly * power;
    }
  }
  // A square of kWidth registers.
  static MMDGT_INLINE void transpose(Reg (&tile)[kWidth]) {
    for (int i = 0; i < kWidth; ++i) {
      for (int j = 0; j < i; ++j) {
        const T swapped = tile[i][j];
        tile[i][j] = tile[j][i];
        tile[j][i] = swapped;
      }
    }
  }

 private:
  template <class Mask>
  static MMDGT_INLINE uint32_t bits(Mask mask) {
    uint32_t result = 0;
    for (int i = 0; i < kWidth; ++i) result |= (mask[i] & 1u) << i;
    return result;
  }
};

}  // namespace mmdgt::cpu
