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

// Calls redo(row) for those of 16 rows of which a lane of the quad r has to see rows r
// (again[0]) or r + 8 (again[1]) done again.
template <typename Redo>
__device__ __forceinline__ void each_row_again(const uint32_t (&again)[2], Redo&& redo) {
  if ((again[0] | again[1]) == 0) return;
  __syncwarp();  // what other lanes wrote for these rows comes first
  for (int row = 0; row < 16; ++row) {
    if ((row < 8 ? again[0] : again[1]) >> 4 * (row % 8) & 15) redo(row);
  }
}

// Sum over the lanes of a warp.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// One row of attention, one key at a time: the tokens key_at(0..count), none where that
// is negative. Every lane has each 32nd element of D.
template <typename T, int D, typename KeyAt>
__device__ __forceinline__ void attend_row(const Forward<T>& to, int token, int count,
                                           KeyAt&& key_at) {
  const int lane = threadIdx.x % 32;
  const auto element = [&](const Rows<const T>& rows, int t, int column) {
    return column < to.sizes.dim ? to_float(rows.row(rows.head(), t)[column]) : 0.f;
  };
  float q[D / 32], o[D / 32] = {};
#pragma unroll
  for (int i = 0; i < D / 32; ++i) q[i] = element(to.query, token, 32 * i + lane);
  float highest = -INFINITY, sum = 0.f;
  for (int k = 0; k < count; ++k) {
    const int t = key_at(k);
    if (t < 0) continue;
    float product = 0.f;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      product = fmaf(q[i], element(to.key, t, 32 * i + lane), product);
    }
    const float score = warp_sum(product) * to.scale;
    const float high = fmaxf(highest, score), base = high == -INFINITY ? 0.f : high;
    const float factor = expf(highest - base), p = expf(score - base);
    highest = high;
    sum = sum * factor + p;
#pragma unroll
    for (int i = 0; i < D / 32; ++i) {
      o[i] = o[i] * factor + p * element(to.value, t, 32 * i + lane);
    }
  }
#pragma unroll
  for (int i = 0; i < D / 32; ++i) {
    const int column = 32 * i + lane;
    if (column < to.sizes.dim) {
      to.out.row(to.out.head(), token)[column] = from_float<T>(o[i] / sum);
    }
  }
  if (lane == 0) {
    to.logsumexp[own_head() * to.sizes.num_tokens + token] = highest + logf(sum);
  }
}

// Softmax attention of 16 queries of a warp over keys that come 16 at a time.
// Probabilities are 2^(score * scale_log2 - shift); rows whose sum leaves the range of
// numbers after all, or that are not finite, are noticed in the end and done again.
template <typename T, int D>
struct SoftmaxRows {
  float shift[2];  // of rows r and r + 8
  float o[D / 8][4] = {};
  // The output is divided by the sum of the probabilities as they were rounded, so that
  // a key that stands alone comes out as it is. The logsumexp has them before that.
  float rounded[4] = {};
  float sum[2] = {};  // of this lane's columns alone

  // Adds the keys in rows [row, row + 16) of `values` by their scores.
  __device__ __forceinline__ void add(float (&s)[2][4], float scale_log2,
                                      const SharedRows<T, D>& values, int row) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = ptx::exp2_approx(fmaf(s[n][i], scale_log2, -shift[i / 2]));
        sum[i / 2] += s[n][i];
      }
    }
    const FragmentA<T> p = as_operand<T>(s[0], s[1]);
    mma(rounded, p, FragmentB<T>{{pack<T>(1.f, 1.f), pack<T>(1.f, 1.f)}});
#pragma unroll
    for (int pair = 0; pair < D / 16; ++pair) {
      FragmentB<T> v[2];
      values.load_columns(row, pair, v);
      mma(o[2 * pair], p, v[0]);
      mma(o[2 * pair + 1], p, v[1]);
    }
  }

  // Raises the shifts to the largest of the scores, as float16 needs it: the others have
  // the range for what the first 16 keys tell.
  __device__ __forceinline__ void raise(const float (&s)[2][4], float scale_log2,
                                        bool first) {
    float high[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      high[half] = quad_max(fmaxf(fmaxf(s[0][2 * half], s[0][2 * half + 1]),
                                  fmaxf(s[1][2 * half], s[1][2 * half + 1])));
      high[half] *= scale_log2;
    }
    if (first) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        shift[half] = high[half] == -INFINITY ? 0.f : high[half];
      }
    } else if (__ballot_sync(~0u, high[0] > shift[0] || high[1] > shift[1]) != 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float raised = fmaxf(shift[half], high[half]);
        const float factor = ptx::exp2_approx(shift[half] - raised);
        shift[half] = raised;
        sum[half] *= factor;
        rounded[2 * half] *= factor;
#pragma unroll
        for (int n = 0; n < D / 8; ++n) {
          o[n][2 * half] *= factor;
          o[n][2 * half + 1] *= factor;
        }
      }
    }
  }

  // Writes rows r and r + 8, those of token[0] and token[1], where there are any. again
  // gets one bit per lane of a row that has to be done again, whose logsumexp is NaN.
  __device__ __forceinline__ void store(const Forward<T>& to, const int (&token)[2],
                                        uint32_t (&again)[2]) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float total = quad_sum(sum[half]);
      float size = total;  // not finite if an element is not
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        size += fabsf(o[n][2 * half]) + fabsf(o[n][2 * half + 1]);
      }
      const bool good = total >= 0x1p-80f && size <= 3e38f;
      again[half] = __ballot_sync(~0u, token[half] >= 0 && !good);
      const bool write = token[half] >= 0 && (again[half] >> (lane & 28) & 15) == 0;
      store_row<T, D>(o, half, __frcp_rn(rounded[2 * half]),
                      write ? to.out.row(to.out.head(), token[half]) : nullptr,
                      to.sizes.dim);
      if (token[half] >= 0 && lane % 4 == 0) {
        to.logsumexp[own_head() * to.sizes.num_tokens + token[half]] =
            write ? kLn2 * (shift[half] + log2f(total)) : NAN;
      }
    }
  }
};

// |scale| in base 2, for exponentials. Not so small that -inf, or the -2^127 that hides a
// key, is not far below other scores after it.
__device__ __forceinline__ float positive_scale_log2(float scale) {
  return fmaxf(fabsf(scale) * kLog2E, 0x1p-100f);
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
