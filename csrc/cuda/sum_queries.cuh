// Parts of the sums of eq. 3.
#pragma once

#include "launch.cuh"

namespace mmdgt::cuda {

// 1 / max(|q|, 1e-12) of |q|^2.
__device__ __forceinline__ float inverse_norm(float square) {
  if (isnan(square)) return square;  // fmaxf would hide it
  return rsqrtf(fmaxf(square, 1e-24f));
}

// members[g]: the lanes whose group is g, one bit each; -1 is none. By a whole warp.
__device__ __forceinline__ void store_members(uint32_t* members, int group,
                                              int num_groups) {
  const int lane = threadIdx.x % 32;
  for (int g = lane; g < num_groups; g += 32) members[g] = 0;
  __syncwarp();
  const uint32_t same = __match_any_sync(~0u, group);
  if (group >= 0 && lane == __ffs(same) - 1) members[group] = same;
}

// sums (G,D) and counts (G) of a head's normalised queries, row t of which is at
// queries[32 * t], for head dims up to 32; members[w * G + g] are those of tokens 32 * w
// + {0..31}. Both are in shared memory. Four lanes serve a group, each eight columns;
// what they add up is in the order of tokens.
__device__ __forceinline__ void sum_head(const float* queries, const uint32_t* members,
                                         const Sizes& sizes, float* sums, int* counts) {
  const int column = 8 * (threadIdx.x % 4);
  for (int g = threadIdx.x / 4; g < sizes.num_groups; g += blockDim.x / 4) {
    float4 low = {}, high = {};
    int count = 0;
    for (int first = 0; first < sizes.num_tokens; first += 32) {
      uint32_t left = members[first / 32 * sizes.num_groups + g];
      count += __popc(left);
      for (; left != 0; left &= left - 1) {
        const float* row = queries + 32 * (first + __ffs(left) - 1) + column;
        const auto x = *reinterpret_cast<const float4*>(row);
        const auto y = *reinterpret_cast<const float4*>(row + 4);
        low = {low.x + x.x, low.y + x.y, low.z + x.z, low.w + x.w};
        high = {high.x + y.x, high.y + y.y, high.z + y.z, high.w + y.w};
      }
    }
    if (column < sizes.dim) {
      auto* target = reinterpret_cast<float4*>(sums + g * sizes.dim + column);
      target[0] = low;
      target[1] = high;
    }
    if (column == 0) counts[g] = count;
  }
}

}  // namespace mmdgt::cuda
