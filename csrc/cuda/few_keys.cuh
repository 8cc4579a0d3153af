// The K best of few scores (eq. 1), chosen by one warp.
#pragma once

#include "../common/limits.h"
#include "threshold.cuh"

namespace mmdgt::cuda {

// What a warp needs in shared memory to choose.
struct FewKeysScratch {
  static constexpr int kBins = 128;
  uint32_t bins[kBins];
  float bucket[32];
};

// One bit per token: those of the K largest scores[0..num_tokens), in the order of
// choice (score_order.h). A histogram between the smallest and the largest score finds
// the bin that holds the K-th; the few scores in that bin are compared with each other.
// Where that does not separate them (a NaN, an infinity, a bin of more than 32) the
// bits are searched. Lane w returns word w, all lanes of the warp take part.
__device__ __forceinline__ uint32_t choose_few(const float* scores, int num_tokens,
                                               int num_keys, FewKeysScratch& scratch) {
  constexpr int kBins = FewKeysScratch::kBins;
  const int lane = threadIdx.x % 32, words = (num_tokens + 31) / 32;
  float score[kMaskWords];
  float low = INFINITY, high = -INFINITY;
  bool regular = true;
#pragma unroll
  for (int w = 0; w < kMaskWords; ++w) {
    score[w] = 0.f;
    if (32 * w + lane < num_tokens) {
      score[w] = scores[32 * w + lane];
      low = fminf(low, score[w]);
      high = fmaxf(high, score[w]);
      regular &= fabsf(score[w]) <= 1e37f;
    }
  }
  low = score_of_bits(__reduce_min_sync(~0u, ordered_bits(low)));
  high = score_of_bits(__reduce_max_sync(~0u, ordered_bits(high)));
  regular = __ballot_sync(~0u, regular) == ~0u && high - low > 1e-30f;

  uint32_t own_word = 0;
  const auto keep = [&](int w, bool chosen) {
    const uint32_t word = __ballot_sync(~0u, chosen);
    if (lane == w) own_word = word;
  };
  if (regular) {
    // Bin 0 holds the largest. Adding 2^23 rounds to an integer, and larger scores
    // never come into later bins.
    const float step = __fdividef(kBins - 1.f, high - low);
    uint32_t bin[kMaskWords], slot[kMaskWords];
    *reinterpret_cast<uint4*>(scratch.bins + 4 * lane) = make_uint4(0, 0, 0, 0);
    __syncwarp();
#pragma unroll
    for (int w = 0; w < kMaskWords; ++w) {
      bin[w] = kBins;  // none
      slot[w] = 0;
      if (32 * w + lane < num_tokens) {
        bin[w] = __float_as_uint(fmaf(high - score[w], step, 0x1p23f)) & (kBins - 1);
        slot[w] = atomicAdd(&scratch.bins[bin[w]], 1u);
      }
    }
    __syncwarp();
    const uint4 own = *reinterpret_cast<const uint4*>(scratch.bins + 4 * lane);
    const uint32_t counts[4] = {own.x, own.y, own.z, own.w};
    uint32_t before = own.x + own.y + own.z + own.w;  // then of the lanes before
    const uint32_t sum = before;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32_t other = __shfl_up_sync(~0u, before, distance);
      if (lane >= distance) before += other;
    }
    before -= sum;
    // The lane whose bins the K-th score is in tells which, and how many come before.
    const bool here = before < num_keys && num_keys <= before + sum;
    uint32_t found = 0;
    if (here) {
      int i = 0;
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        if (i == j && before + counts[j] < num_keys) before += counts[i++];
      }
      const uint32_t count = i == 0 ? own.x : i == 1 ? own.y : i == 2 ? own.z : own.w;
      found = (4 * lane + i) << 20 | before << 10 | count;
    }
    found = __shfl_sync(~0u, found, __ffs(__ballot_sync(~0u, here)) - 1);
    const uint32_t last = found >> 20, count = found & 1023;
    const uint32_t needed = num_keys - (found >> 10 & 1023);
    if (needed == count) {
#pragma unroll
      for (int w = 0; w < kMaskWords; ++w) {
        if (w < words) keep(w, bin[w] <= last);
      }
      return own_word;
    }
    if (count <= 32) {
#pragma unroll
      for (int w = 0; w < kMaskWords; ++w) {
        if (bin[w] == last) scratch.bucket[slot[w]] = score[w];
      }
      __syncwarp();
      const float mine = lane < count ? scratch.bucket[lane] : -INFINITY;
      uint32_t larger = 0, equal = 0;
      for (int j = 0; j < count; ++j) {
        const float other = __shfl_sync(~0u, mine, j);
        larger += other > mine;
        equal += other == mine;
      }
      const uint32_t at_cut =
          __ballot_sync(~0u, lane < count && larger < needed && needed <= larger + equal);
      const int source = __ffs(at_cut) - 1;
      const float cut = __shfl_sync(~0u, mine, source);
      // Of the scores at the cut the lower tokens are chosen.
      int left = needed - __shfl_sync(~0u, larger, source);
#pragma unroll
      for (int w = 0; w < kMaskWords; ++w) {
        if (w >= words) continue;
        const bool exists = bin[w] < kBins;
        const uint32_t equals = __ballot_sync(~0u, exists && score[w] == cut);
        const int rank = __popc(equals & ((1u << lane) - 1));
        keep(w, exists && (score[w] > cut || (score[w] == cut && rank < left)));
        left -= __popc(equals);
      }
      return own_word;
    }
  }
  uint32_t bits[kMaskWords];
#pragma unroll
  for (int w = 0; w < kMaskWords; ++w) {
    bits[w] = 32 * w + lane < num_tokens ? candidate_bits(score[w]) : 0;
  }
  const auto token_at = [&](int w) { return static_cast<uint32_t>(32 * w + lane); };
  TeamReducer<32> reduce(nullptr);
  const Threshold found = find_threshold<32>(bits, words, token_at, num_keys, num_keys,
                                             static_cast<uint32_t>(num_tokens), reduce);
#pragma unroll
  for (int w = 0; w < kMaskWords; ++w) {
    keep(w, bits[w] != 0 && found.chooses(bits[w], token_at(w)));
  }
  return own_word;
}

}  // namespace mmdgt::cuda
