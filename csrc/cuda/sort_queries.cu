// A stable counting sort of the queries of every head by group.
#include "sort_queries.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "launch.cuh"

namespace mmdgt {
namespace {

constexpr int kThreads = 256;  // at least the number of groups
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMaxChunks = 256;

__device__ __forceinline__ int checked_group(int group, int num_groups) {
  CUDA_KERNEL_ASSERT(group >= 0 && group < num_groups);
  return group;
}

// group (BH,L) -> sizes (BH,chunks,G), the queries of every group in a chunk.
__global__ void __launch_bounds__(kThreads)
    count_kernel(const int* __restrict__ group, int* __restrict__ sizes,
                 int64_t num_tokens, int num_groups, int chunk, int chunks) {
  __shared__ int size[kThreads];
  const int64_t bh = blockIdx.x / chunks;
  const int64_t begin = static_cast<int64_t>(blockIdx.x % chunks) * chunk;
  const int64_t end = min(begin + chunk, num_tokens);
  size[threadIdx.x] = 0;
  __syncthreads();
  for (int64_t token = begin + threadIdx.x; token < end; token += kThreads) {
    atomicAdd(&size[checked_group(group[bh * num_tokens + token], num_groups)], 1);
  }
  __syncthreads();
  if (threadIdx.x < num_groups) {
    sizes[static_cast<int64_t>(blockIdx.x) * num_groups + threadIdx.x] =
        size[threadIdx.x];
  }
}

// Sum of `value` over the threads before this one.
__device__ __forceinline__ int exclusive_sum(int value, int (&scratch)[kWarps]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) scratch[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += scratch[w];
  return sum - value;
}

// Places the tokens of a chunk: after the smaller groups, after the group's
// tokens in earlier chunks, in earlier warps' parts of the chunk, in its own part.
__global__ void __launch_bounds__(kThreads)
    place_kernel(const int* __restrict__ group, const int* __restrict__ sizes,
                 int* __restrict__ order, int* __restrict__ offsets,
                 int64_t num_tokens, int num_groups, int chunk, int chunks) {
  extern __shared__ int next[];  // [warp][G]
  __shared__ int scratch[kWarps];
  const int64_t bh = blockIdx.x / chunks;
  const int own_chunk = blockIdx.x % chunks;
  const int part = chunk / kWarps;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t begin = static_cast<int64_t>(own_chunk) * chunk + warp * part;
  const int64_t end = min(begin + part, num_tokens);
  group += bh * num_tokens;

  for (int i = threadIdx.x; i < kWarps * num_groups; i += kThreads) next[i] = 0;
  __syncthreads();
  int* own = next + warp * num_groups;
  for (int64_t token = begin + lane; token < end; token += 32) {
    atomicAdd(&own[group[token]], 1);
  }

  int before = 0, total = 0;  // of group threadIdx.x
  if (threadIdx.x < num_groups) {
    const int* size = sizes + bh * chunks * num_groups + threadIdx.x;
    for (int c = 0; c < chunks; ++c) {
      const int n = size[static_cast<int64_t>(c) * num_groups];
      total += n;
      if (c < own_chunk) before += n;
    }
  }
  const int start = exclusive_sum(total, scratch);
  __syncthreads();
  if (threadIdx.x < num_groups) {
    if (own_chunk == 0) {
      int* offset = offsets + bh * (num_groups + 1) + threadIdx.x;
      offset[0] = start;
      if (threadIdx.x == num_groups - 1) offset[1] = start + total;
    }
    int at = start + before;
    for (int w = 0; w < kWarps; ++w) {
      const int n = next[w * num_groups + threadIdx.x];
      next[w * num_groups + threadIdx.x] = at;
      at += n;
    }
  }
  __syncthreads();

  for (int64_t first = begin; first < end; first += 32) {
    const int64_t token = first + lane;
    const bool valid = token < end;
    const int g = valid ? group[token] : -1;
    const unsigned same = __match_any_sync(~0u, g);
    const int rank = __popc(same & ((1u << lane) - 1));
    int at = 0;
    if (valid) {
      at = own[g] + rank;
      order[bh * num_tokens + at] = static_cast<int>(token);
    }
    __syncwarp();
    if (valid && rank == 0) own[g] = at + __popc(same);
    __syncwarp();
  }
}

}  // namespace

SortedQueries sort_queries(const at::Tensor& group, int64_t num_groups) {
  const int64_t heads = group.size(0) * group.size(1), L = group.size(2);
  const auto sizes = group.sizes().slice(0, 2);
  SortedQueries sorted{
      at::empty_like(group),
      at::empty({sizes[0], sizes[1], num_groups + 1}, group.options())};
  if (group.numel() == 0) {
    sorted.offsets.zero_();
    return sorted;
  }
  const int64_t chunk =
      ceil_div(std::max<int64_t>(L / kMaxChunks, 1024), kThreads) * kThreads;
  const int64_t chunks = ceil_div(L, chunk);
  const at::Tensor counts = at::empty({heads, chunks, num_groups}, group.options());
  launch(count_kernel, heads * chunks, kThreads, 0, group.const_data_ptr<int>(),
         counts.mutable_data_ptr<int>(), L, static_cast<int>(num_groups),
         static_cast<int>(chunk), static_cast<int>(chunks));
  launch(place_kernel, heads * chunks, kThreads, kWarps * num_groups * sizeof(int),
         group.const_data_ptr<int>(), counts.const_data_ptr<int>(),
         sorted.order.mutable_data_ptr<int>(),
         sorted.offsets.mutable_data_ptr<int>(), L, static_cast<int>(num_groups),
         static_cast<int>(chunk), static_cast<int>(chunks));
  return sorted;
}

}  // namespace mmdgt
