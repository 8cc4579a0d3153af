// The order in which keys are chosen (eq. 1), shared by the CPU and the CUDA
// kernels so that both break ties the same way.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define MMDGT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MMDGT_HOST_DEVICE inline
#endif

namespace mmdgt {

// Maps a float onto an unsigned integer whose order is the order of choice:
// larger scores first, -0 equal to +0, NaN above everything so that it shows.
MMDGT_HOST_DEVICE uint32_t ordered_bits(float score) {
  if (score != score) return 0xffffffffu;
  score += 0.0f;  // -0 becomes +0
  uint32_t bits;
#if defined(__CUDA_ARCH__)
  bits = __float_as_uint(score);
#else
  std::memcpy(&bits, &score, sizeof(bits));
#endif
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The score behind the bits; a NaN comes back as some NaN.
MMDGT_HOST_DEVICE float score_of_bits(uint32_t bits) {
  bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float score;
  std::memcpy(&score, &bits, sizeof(score));
  return score;
#endif
}

// One sortable word for a candidate: the larger word is chosen first. Scores
// decide; among equal scores the lower token wins.
MMDGT_HOST_DEVICE uint64_t rank_of_bits(uint32_t bits, uint32_t token) {
  return static_cast<uint64_t>(bits) << 32 | static_cast<uint32_t>(~token);
}

MMDGT_HOST_DEVICE uint64_t choice_rank(float score, uint32_t token) {
  return rank_of_bits(ordered_bits(score), token);
}

MMDGT_HOST_DEVICE uint32_t token_of_rank(uint64_t rank) {
  return ~static_cast<uint32_t>(rank);
}

}  // namespace mmdgt
