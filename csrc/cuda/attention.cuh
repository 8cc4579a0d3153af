// Parts that the forward and the backward pass of group attention share.
#pragma once

#include <cmath>

#include "launch.cuh"

namespace mmdgt::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// What the forward and the backward pass read and write.
template <typename T>
struct Forward {
  Rows<const T> query, key, value;
  const int* group;  // (B,H,L)
  const int* index;  // (B,H,G,K)
  Rows<T> out;
  float* logsumexp;  // (B,H,L)
  Sizes sizes;
  float scale;
};
template <typename T>
struct Backward {
  Rows<const T> grad_out, query, key, value;
  const int* group;
  const int* index;
  Rows<const T> out;
  const float* logsumexp;
  Rows<T> grad_query, grad_key, grad_value;
  Sizes sizes;
  float scale;

  // The same from an image on.
  Backward from_image(int64_t image, int64_t heads) const {
    const int64_t tokens = image * heads * sizes.num_tokens;
    const int64_t choices = image * heads * sizes.num_groups * sizes.num_keys;
    return {grad_out.from_image(image),
            query.from_image(image),
            key.from_image(image),
            value.from_image(image),
            group + tokens,
            index + choices,
            out.from_image(image),
            logsumexp + tokens,
            grad_query.from_image(image),
            grad_key.from_image(image),
            grad_value.from_image(image),
            sizes,
            scale};
  }
};

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
  float sum[2] = {0.f, 0.f};                  // of this lane's columns alone

  // Adds the keys in rows [row, row + kKeys) of `values` by their scores s, -inf
  // where a query does not see the key. Scores are multiplied by scale_log2 > 0.
  template <int kKeys>
  __device__ __forceinline__ void add(float (&s)[kKeys / 8][4], float scale_log2,
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
      const float factor = ptx::exp2_approx(highest[half] * scale_log2 - lowered[half]);
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
#pragma unroll
      for (int n = 2 * t; n < 2 * t + 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          s[n][i] = ptx::exp2_approx(s[n][i] * scale_log2 - lowered[i / 2]);
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

  // Writes row r (half = 0) or r + 8 (half = 1); no row, no writing.
  __device__ __forceinline__ void store(int half, float scale_log2, int dim, T* row,
                                        float* logsumexp) const {
    const float total = quad_sum(sum[half]);
    store_row<T, D>(o, half, __frcp_rn(total), row, dim);
    if (row != nullptr && threadIdx.x % 4 == 0) {
      *logsumexp = kLn2 * (highest[half] * scale_log2 + log2f(total));
    }
  }
};

// |scale| in base 2, for exponentials. Not zero, so that -inf stays what it is.
__device__ __forceinline__ float positive_scale_log2(float scale) {
  return fmaxf(fabsf(scale) * kLog2E, 1e-37f);
}

// Warps of a block of 16 queries each: as many as fill with the queries of an average
// group, up to 8 that share its keys.
template <typename T, int D>
int block_warps(int64_t num_tokens, int64_t num_groups) {
  const int64_t average = num_tokens / num_groups;
  if (D * sizeof(T) > 64) return D * sizeof(T) > 256 ? 2 : 4;
  return average <= 32 ? 2 : average <= 128 ? 4 : 8;
}

// Calls run(integral_constant<int, kWarps>, integral_constant<int, kKeys>): blocks of
// `warps` and stages of as many keys as pad the K keys least.
template <typename T, int D, typename Run>
void dispatch_block(int warps, int64_t num_keys, Run&& run) {
  const auto with_keys = [&](auto warps) {
    if constexpr (D * sizeof(T) == 64) {
      const bool wide = ceil_div(num_keys, 112) * 112 < ceil_div(num_keys, 80) * 80;
      if (wide) return run(warps, std::integral_constant<int, 112>());
      return run(warps, std::integral_constant<int, 80>());
    } else {
      run(warps, std::integral_constant<int, (D * sizeof(T) > 256 ? 16 : 48)>());
    }
  };
  if constexpr (D * sizeof(T) == 64) {
    if (warps == 2) return with_keys(std::integral_constant<int, 2>());
    if (warps == 8) return with_keys(std::integral_constant<int, 8>());
  }
  with_keys(std::integral_constant<int, (D * sizeof(T) > 256 ? 2 : 4)>());
}

}  // namespace mmdgt::cuda
