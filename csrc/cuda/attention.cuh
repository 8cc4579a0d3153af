// Parts that the forward and the backward pass of group attention share.
#pragma once

#include <cmath>

#include "launch.cuh"

namespace mmdgt {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// Sum and maximum over the four lanes that hold a row of a C tile.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// Softmax attention of 16 queries of a warp over keys that come piece by piece.
template <typename T, int D>
struct OnlineSoftmax {
  float o[D / 8][4] = {};
  float highest[2] = {-INFINITY, -INFINITY};  // of rows r and r + 8
  float sum[2] = {0.f, 0.f};  // of this lane's columns alone

  // Adds the keys in rows [row, row + count) of `values` by their scores s, -inf
  // where a query does not see the key. Scores are multiplied by scale_log2 > 0.
  template <int kKeys>
  __device__ __forceinline__ void add(float (&s)[kKeys / 8][4], int count,
                                      float scale_log2,
                                      const SharedRows<T, D>& values, int row) {
    float lowered[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float high = highest[half];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        high = fmaxf(high, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
      }
      high = quad_max(high);
      lowered[half] = high == -INFINITY ? 0.f : high * scale_log2;
      const float factor = exp2_approx(highest[half] * scale_log2 - lowered[half]);
      highest[half] = high;
      sum[half] *= factor;
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        o[n][2 * half] *= factor;
        o[n][2 * half + 1] *= factor;
      }
    }
#pragma unroll
    for (int t = 0; t < kKeys / 16; ++t) {
      if (16 * t < count) {
#pragma unroll
        for (int n = 2 * t; n < 2 * t + 2; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            s[n][i] = exp2_approx(s[n][i] * scale_log2 - lowered[i / 2]);
            sum[i / 2] += s[n][i];
          }
        }
        const FragmentA<T> p = as_operand<T>(s[2 * t], s[2 * t + 1]);
#pragma unroll
        for (int pair = 0; pair < D / 16; ++pair) {
          FragmentB<T> v[2];
          values.load_columns(row + 16 * t, pair, v);
          mma(o[2 * pair], p, v[0]);
          mma(o[2 * pair + 1], p, v[1]);
        }
      }
    }
  }

  // Writes row r (half = 0) or r + 8 (half = 1); no row, no writing.
  __device__ __forceinline__ void store(int half, float scale_log2, int dim, T* row,
                                        float* logsumexp) const {
    const float total = quad_sum(sum[half]);
    store_row<T, D>(o, half, 1.f / total, row, dim);
    if (row != nullptr && threadIdx.x % 4 == 0) {
      *logsumexp = kLn2 * (highest[half] * scale_log2 + log2f(total));
    }
  }
};

// |scale| in base 2, for exponentials. Not zero, so that -inf stays what it is.
__device__ __forceinline__ float positive_scale_log2(float scale) {
  return fmaxf(fabsf(scale) * kLog2E, 1e-37f);
}

// Keys that a block holds in one of its two stages of shared memory.
template <typename T, int D>
constexpr int kStageKeys = D * sizeof(T) == 64    ? 112
                           : D * sizeof(T) == 128 ? 64
                           : D * sizeof(T) == 256 ? 48
                                                  : 32;

// Queries [begin, end) of the order by group, all of one group.
struct QueryTile {
  int group, begin, end;
};

// The groups of a head, cut into tiles of at most `size` queries, one after the
// other: tile number `tile`, empty if there are not so many. For whole warps.
__device__ __forceinline__ QueryTile find_tile(const int* offsets, int num_groups,
                                               int tile, int size) {
  const int lane = threadIdx.x % 32;
  int before = 0;  // tiles of the groups before the current 32
  for (int first = 0; first < num_groups; first += 32) {
    int begin = 0, end = 0;
    if (first + lane < num_groups) {
      begin = offsets[first + lane];
      end = offsets[first + lane + 1];
    }
    const int own = (end - begin + size - 1) / size;
    int sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += other;
    }
    const unsigned reached = __ballot_sync(~0u, before + sum > tile);
    if (reached) {
      const int source = __ffs(reached) - 1;
      const int skipped = tile - before - __shfl_sync(~0u, sum - own, source);
      begin = __shfl_sync(~0u, begin, source) + skipped * size;
      end = min(__shfl_sync(~0u, end, source), begin + size);
      return {first + source, begin, end};
    }
    before += __shfl_sync(~0u, sum, 31);
  }
  return {0, 0, 0};
}

// Warps of a block, 16 queries each: a group of average size fills one block, up to
// 8 warps that share the gathered keys.
inline int attention_warps(int64_t num_tokens, int64_t num_groups) {
  const int64_t average = num_tokens / num_groups;
  return average <= 16 ? 1 : average <= 32 ? 2 : average <= 96 ? 4 : 8;
}

// An upper bound of the tiles of a head, known without looking at the groups.
inline int64_t max_tiles(int64_t num_tokens, int64_t num_groups, int64_t size) {
  return num_tokens / size + num_groups;
}

// Starts to copy rows index[0..count) of keys and values of one head; `rows` is
// count rounded up to whole tiles of 16, the rest of which becomes zero.
template <typename T, int D>
__device__ __forceinline__ void gather_keys(
    const SharedRows<T, D>& keys, const SharedRows<T, D>& values, const T* key,
    const T* value, int64_t key_stride, int64_t value_stride,
    const int* __restrict__ index, int count, int rows, int dim,
    int64_t num_tokens) {
  constexpr int kChunks = SharedRows<T, D>::kChunks;
  for (int i = threadIdx.x; i < rows * kChunks; i += blockDim.x) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool valid =
        row < count && chunk * SharedRows<T, D>::kChunkElements < dim;
    const int64_t token = valid ? index[row] : 0;
    CUDA_KERNEL_ASSERT(token >= 0 && token < num_tokens);
    keys.copy_async(row, chunk, key + token * key_stride, valid);
    values.copy_async(row, chunk, value + token * value_stride, valid);
  }
}

}  // namespace mmdgt
