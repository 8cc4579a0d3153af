// A stable counting sort of the queries of every head by group.
#include "sort_queries.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "launch.cuh"

namespace mmdgt::cuda {
namespace {

constexpr int kThreads = 256;  // at least the number of groups
constexpr int kWarps = kThreads / 32;
constexpr int kBatch = 4;  // tokens that a thread loads at once

// A group out of range must not do harm: it counts as the nearest one.
__device__ __forceinline__ int group_in_range(int group, int num_groups) {
  return min(max(group, 0), num_groups - 1);
}

// sizes (B,H,chunks,G): the queries of every group in a chunk of tokens.
__global__ void __launch_bounds__(kThreads)
    count_kernel(const int* __restrict__ group, int* __restrict__ sizes, int num_tokens,
                 int num_groups, int chunk) {
  __shared__ int size[kThreads];
  const int begin = blockIdx.x * chunk, end = min(begin + chunk, num_tokens);
  group += own_head() * num_tokens;
  size[threadIdx.x] = 0;
  __syncthreads();
#pragma unroll kBatch
  for (int token = begin + threadIdx.x; token < end; token += kThreads) {
    const int g = group_in_range(group[token], num_groups);
    atomicAdd(&size[g], 1);
  }
  __syncthreads();
  if (threadIdx.x < num_groups) {
    sizes[(own_head() * gridDim.x + blockIdx.x) * num_groups + threadIdx.x] =
        size[threadIdx.x];
  }
}

// Sum of `value` over the threads before this one. The block must meet once
// before the next call.
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
// The blocks of a head share the work on its table of tiles.
__global__ void __launch_bounds__(kThreads)
    place_kernel(const int* __restrict__ group, const int* __restrict__ sizes,
                 int* __restrict__ order, int* __restrict__ offsets,
                 int4* __restrict__ tiles, int tile_size, int num_tiles, int num_tokens,
                 int num_groups, int chunk) {
  auto* next = reinterpret_cast<int*>(dynamic_shared());  // [warp][G]
  __shared__ int scratch[kWarps], starts[kThreads + 1], first_tile[kThreads + 1];
  const int part = chunk / kWarps;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int begin = blockIdx.x * chunk + warp * part;
  const int end = min(begin + part, num_tokens);
  group += own_head() * num_tokens;
  order += own_head() * num_tokens;

  int before = 0, total = 0;  // of group threadIdx.x
  if (threadIdx.x < num_groups) {
    const int* size = sizes + own_head() * gridDim.x * num_groups + threadIdx.x;
#pragma unroll 8
    for (int c = 0; c < gridDim.x; ++c) {
      const int n = size[c * num_groups];
      total += n;
      before += c < blockIdx.x ? n : 0;
    }
  }
  for (int i = threadIdx.x; i < kWarps * num_groups; i += kThreads) next[i] = 0;
  __syncthreads();
  int* own = next + warp * num_groups;
#pragma unroll kBatch
  for (int token = begin + lane; token < end; token += 32) {
    atomicAdd(&own[group_in_range(group[token], num_groups)], 1);
  }
  const int start = exclusive_sum(total, scratch);
  __syncthreads();
  if (threadIdx.x < num_groups) starts[threadIdx.x] = start;
  if (threadIdx.x == num_groups - 1) starts[num_groups] = start + total;
  if (threadIdx.x < num_groups) {
    int at = start + before;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int n = next[w * num_groups + threadIdx.x];
      next[w * num_groups + threadIdx.x] = at;
      at += n;
    }
  }
  __syncthreads();
  if (blockIdx.x == 0) {
    for (int g = threadIdx.x; g <= num_groups; g += kThreads) {
      offsets[own_head() * (num_groups + 1) + g] = starts[g];
    }
  }

  for (int first = begin; first < end; first += 32 * kBatch) {
    int g[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int token = first + 32 * i + lane;
      g[i] = token < end ? group_in_range(group[token], num_groups) : -1;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const unsigned same = __match_any_sync(~0u, g[i]);
      const int rank = __popc(same & ((1u << lane) - 1));
      int at = 0;
      if (g[i] >= 0) {
        at = own[g[i]] + rank;
        order[at] = first + 32 * i + lane;
      }
      __syncwarp();
      if (g[i] >= 0 && rank == 0) own[g[i]] = at + __popc(same);
      __syncwarp();
    }
  }

  const int own_tiles = (total + tile_size - 1) / tile_size;
  __syncthreads();
  const int tiles_before = exclusive_sum(own_tiles, scratch);
  if (threadIdx.x < num_groups) first_tile[threadIdx.x] = tiles_before;
  if (threadIdx.x == num_groups - 1) first_tile[num_groups] = tiles_before + own_tiles;
  __syncthreads();
  for (int t = blockIdx.x * kThreads + threadIdx.x; t < num_tiles;
       t += gridDim.x * kThreads) {
    int4 tile = make_int4(0, 0, 0, 0);
    if (t < first_tile[num_groups]) {
      int g = 0;  // the last group that begins at or before the tile
      for (int step = 128; step > 0; step /= 2) {
        if (g + step < num_groups && first_tile[g + step] <= t) g += step;
      }
      tile.x = g;
      tile.y = starts[g] + (t - first_tile[g]) * tile_size;
      tile.z = min(tile.y + tile_size, starts[g + 1]);
    }
    tiles[own_head() * num_tiles + t] = tile;
  }
}

constexpr int kWindow = 4096;  // tokens of a block

// One counting sort of all choices of a head, in windows of tokens.
__global__ void __launch_bounds__(kThreads)
    sort_choices_kernel(const int* __restrict__ index, int* __restrict__ begins,
                        int2* __restrict__ choosers, Sizes sizes) {
  __shared__ int next[kWindow];
  __shared__ int scratch[kWarps], smaller;
  const int num_choices = sizes.num_groups * sizes.num_keys;
  const int first = blockIdx.x * kWindow;
  const int count = min(sizes.num_tokens - first, kWindow);
  index += own_head() * num_choices;
  choosers += own_head() * num_choices;
  begins += own_head() * (sizes.num_tokens + 1);
  // A token out of range must not do harm.
  const auto token_of = [&](int choice) {
    return min(max(choice, 0), sizes.num_tokens - 1) - first;
  };

  for (int i = threadIdx.x; i < kWindow; i += kThreads) next[i] = 0;
  if (threadIdx.x == 0) smaller = 0;
  __syncthreads();
  int own_smaller = 0;
#pragma unroll 8
  for (int i = threadIdx.x; i < num_choices; i += kThreads) {
    const int token = token_of(index[i]);
    own_smaller += token < 0;
    if (token >= 0 && token < count) atomicAdd(&next[token], 1);
  }
  atomicAdd(&smaller, own_smaller);
  __syncthreads();
  constexpr int kShare = kWindow / kThreads;
  int sum = 0;
  for (int i = 0; i < kShare; ++i) sum += next[threadIdx.x * kShare + i];
  int at = smaller + exclusive_sum(sum, scratch);
  for (int i = 0; i < kShare; ++i) {
    const int token = threadIdx.x * kShare + i, size = next[token];
    next[token] = at;
    if (token < count) begins[first + token] = at;
    at += size;
  }
  if (first + count == sizes.num_tokens && threadIdx.x == 0) {
    begins[sizes.num_tokens] = num_choices;
  }
  // Group by group, so that a token's choices come in that order.
  for (int g = 0; g < sizes.num_groups; ++g) {
    __syncthreads();
    for (int i = threadIdx.x; i < sizes.num_keys; i += kThreads) {
      const int token = token_of(index[g * sizes.num_keys + i]);
      if (token >= 0 && token < count) {
        choosers[atomicAdd(&next[token], 1)] = make_int2(g, i);
      }
    }
  }
}

}  // namespace

SortedChoices sort_choices(const at::Tensor& index, int64_t num_tokens) {
  const int64_t B = index.size(0), H = index.size(1);
  const int64_t G = index.size(2), K = index.size(3);
  SortedChoices sorted{at::empty({B, H, num_tokens + 1}, index.options()),
                       at::empty({B, H, G * K, 2}, index.options())};
  launch(sort_choices_kernel, grid_of_heads(ceil_div(num_tokens, kWindow), index),
         kThreads, 0, index.const_data_ptr<int>(), sorted.begins.mutable_data_ptr<int>(),
         static_cast<int2*>(sorted.choosers.data_ptr()), Sizes(num_tokens, G, K));
  return sorted;
}

SortedQueries sort_queries(const at::Tensor& group, int64_t num_groups,
                           int64_t tile_size) {
  const int64_t B = group.size(0), H = group.size(1), L = group.size(2);
  const int64_t num_tiles = max_tiles(L, num_groups, tile_size);
  SortedQueries sorted{at::empty_like(group),
                       at::empty({B, H, num_groups + 1}, group.options()),
                       at::empty({B, H, num_tiles, 4}, group.options())};
  // Every block reads the counts of all chunks of its head, so there are not too
  // many of them.
  const int64_t chunk = 1024 * ceil_div(L, 1024 * 1024);
  const int64_t chunks = ceil_div(L, chunk);
  const at::Tensor sizes = at::empty({B, H, chunks, num_groups}, group.options());
  const dim3 grid = grid_of_heads(chunks, group);
  launch(count_kernel, grid, kThreads, 0, group.const_data_ptr<int>(),
         sizes.mutable_data_ptr<int>(), static_cast<int>(L), static_cast<int>(num_groups),
         static_cast<int>(chunk));
  launch(place_kernel, grid, kThreads, kWarps * num_groups * sizeof(int),
         group.const_data_ptr<int>(), sizes.const_data_ptr<int>(),
         sorted.order.mutable_data_ptr<int>(), sorted.offsets.mutable_data_ptr<int>(),
         static_cast<int4*>(sorted.tiles.data_ptr()), static_cast<int>(tile_size),
         static_cast<int>(num_tiles), static_cast<int>(L), static_cast<int>(num_groups),
         static_cast<int>(chunk));
  return sorted;
}

}  // namespace mmdgt::cuda
