// The place where the order of choice (score_order.h) is cut: which candidates of a
// set are the first so many.
#pragma once

#include "../common/score_order.h"

namespace mmdgt::cuda {

// Candidates with larger bits, and of those with these bits the tokens below
// `token_end`, are chosen.
struct Threshold {
  uint32_t bits;
  uint32_t token_end;

  __device__ __forceinline__ bool chooses(uint32_t b, uint32_t token) const {
    return b > bits || (b == bits && token < token_end);
  }
};

// ordered_bits, with room for a number above the largest and one below the
// smallest: 0 stands for "no candidate".
__device__ __forceinline__ uint32_t candidate_bits(float score) {
  return min(ordered_bits(score), 0xfffffffeu);
}

// Sums, minima and maxima over a team of kThreads neighbouring threads: a block or
// 8, 16 or 32 lanes of a warp. Teams of one warp may go different ways.
template <int kThreads>
struct TeamReducer {
  static constexpr int kWarps = (kThreads + 31) / 32;
  uint32_t (*scratch)[kWarps];  // two rows in shared memory, used in turn
  int turn = 0;

  __device__ __forceinline__ explicit TeamReducer(uint32_t (*scratch)[kWarps])
      : scratch(scratch) {}

  __device__ __forceinline__ uint32_t sum(uint32_t x) {
    if constexpr (kThreads >= 32) x = __reduce_add_sync(~0u, x);
    return combine(x, [](uint32_t a, uint32_t b) { return a + b; });
  }
  __device__ __forceinline__ uint32_t min(uint32_t x) {
    if constexpr (kThreads >= 32) x = __reduce_min_sync(~0u, x);
    return combine(x, [](uint32_t a, uint32_t b) { return a < b ? a : b; });
  }
  __device__ __forceinline__ uint32_t max(uint32_t x) {
    if constexpr (kThreads >= 32) x = __reduce_max_sync(~0u, x);
    return combine(x, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
  }
  // Sum over the threads before this one, in teams of whole warps.
  __device__ __forceinline__ uint32_t exclusive_sum(uint32_t x) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kWarps;
    uint32_t sum = x;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += other;
    }
    if constexpr (kWarps > 1) {
      turn ^= 1;
      if (lane == 31) scratch[turn][warp] = sum;
      __syncthreads();
      for (int w = 0; w < warp; ++w) sum += scratch[turn][w];
    }
    return sum - x;
  }

 private:
  template <typename Combine>
  __device__ __forceinline__ uint32_t combine(uint32_t x, Combine&& with) {
    if constexpr (kThreads < 32) {
      const unsigned team = ((1u << kThreads) - 1)
                            << (threadIdx.x % 32 / kThreads * kThreads);
#pragma unroll
      for (int step = 1; step < kThreads; step *= 2) {
        x = with(x, __shfl_xor_sync(team, x, step));
      }
    }
    if constexpr (kWarps > 1) {
      turn ^= 1;  // the last row may still be read
      if (threadIdx.x % 32 == 0) scratch[turn][threadIdx.x / 32] = x;
      __syncthreads();
      x = scratch[turn][0];
#pragma unroll
      for (int w = 1; w < kWarps; ++w) x = with(x, scratch[turn][w]);
    }
    return x;
  }
};

// A threshold that chooses from `fewest` to `most` of the team's candidates, of
// which there are at least `fewest`. Thread-private candidates: bits[i], 0 for
// none and for i >= used, and token_at(i). Called by all threads of the team.
template <int kThreads, int kPerThread, typename TokenAt>
__device__ Threshold find_threshold(const uint32_t (&bits)[kPerThread], int used,
                                    TokenAt&& token_at, int fewest, int most,
                                    uint32_t num_tokens, TeamReducer<kThreads>& reduce) {
  constexpr int kValueSteps = 15;
  uint32_t low = 0xffffffffu, high = 0;
  int own = 0;
#pragma unroll
  for (int i = 0; i < kPerThread; ++i) {
    high = max(high, bits[i]);
    low = min(low, bits[i] - 1);  // "none" becomes the largest number
    own += bits[i] != 0;
  }
  int from_low = reduce.sum(own);  // candidates that are not below `low`
  int from_high = 0;
  if (from_low <= most) return {0, 0};
  low = reduce.min(low) + 1;    // chooses enough
  high = reduce.max(high) + 1;  // chooses too few: none
  for (int step = 0; high - low > 1; ++step) {
    uint32_t middle = low + (high - low) / 2;
    if (step < kValueSteps) {
      // Interpolation, and halving the interval every other time, arrive sooner
      // than halving the bits, unless scores span many orders of magnitude. In
      // the tail of a distribution counts fall exponentially.
      const float target = 0.5f * (fewest + most);
      float share = 0.5f;
      if (step % 2 == 0) {
        share = 4.f * target < from_low
                    ? __fdividef(__logf(from_low / target),
                                 __logf(from_low / (from_high + 0.5f)))
                    : __fdividef(from_low - target, from_low - from_high);
      }
      const float a = score_of_bits(low), b = score_of_bits(high - 1);
      const uint32_t bits = candidate_bits(a + (b - a) * share);
      if (bits > low && bits < high) middle = bits;
    }
    int count = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; i += 4) {
      if (i >= used) break;
#pragma unroll
      for (int j = i; j < i + 4; ++j) count += bits[j] >= middle;
    }
    count = reduce.sum(count);
    if (count >= fewest && count <= most) return {middle - 1, 0};
    if (count >= fewest) {
      low = middle;
      from_low = count;
    } else {
      high = middle;
      from_high = count;
    }
  }
  // Equal scores at the cut: the lower tokens among them are chosen.
  uint32_t first = 0, last = num_tokens - 1;
  while (true) {
    const uint32_t middle = first + (last - first) / 2;
    int count = 0;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      count += bits[i] == low && token_at(i) <= middle;
    }
    count = from_high + reduce.sum(count);
    if ((count >= fewest && count <= most) || first == last) {
      return {low, middle + 1};
    }
    if (count >= fewest) {
      last = middle;
    } else {
      first = middle + 1;
    }
  }
}

}  // namespace mmdgt::cuda
