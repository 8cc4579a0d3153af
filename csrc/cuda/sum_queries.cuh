// What a block adds to the sums of eq. 3.
#pragma once

#include "launch.cuh"

namespace mmdgt::cuda {

// 1 / max(|q|, 1e-12) of |q|^2.
__device__ __forceinline__ float inverse_norm(float square) {
  if (isnan(square)) return square;  // fmaxf would hide it
  return rsqrtf(fmaxf(square, 1e-24f));
}

// sums (G,D) and counts (G) of a head's normalised queries, row t of which is at
// queries[32 * t], for head dims up to 32. group[t] is that of the query, or -1 for t
// beyond the last, up to a multiple of 32. Both are in shared memory. A warp serves a
// group, a lane a column, so the order of summation is that of the tokens.
__device__ __forceinline__ void sum_head(const float* queries, const int* group,
                                         const Sizes& sizes, float* sums, int* counts) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int g = warp; g < sizes.num_groups; g += blockDim.x / 32) {
    float sum = 0.f;
    int count = 0;
    for (int from = 0; from < sizes.num_tokens; from += 32) {
      uint32_t members = __ballot_sync(~0u, group[from + lane] == g);
      for (; members != 0; members &= members - 1) {
        sum += queries[32 * (from + __ffs(members) - 1) + lane];
        ++count;
      }
    }
    if (lane < sizes.dim) sums[g * sizes.dim + lane] = sum;
    if (lane == 0) counts[g] = count;
  }
}

}  // namespace mmdgt::cuda
