// Group attention for few tokens: a block serves one head of one image, all of
// whose keys it holds in shared memory.
#include "masked_attention.h"

#include "attention.cuh"

namespace mmdgt {
namespace {

constexpr int kDim = 32;
constexpr int kMaxTokens = 256;
constexpr int kMaxWarps = 7;  // two tiles of 16 rows each at the 196 tokens of ImageNet

// Copies the rows of one head to shared memory; rows up to `padded` become zero.
template <typename T>
__device__ __forceinline__ void copy_head(const SharedRows<T, kDim>& shared,
                                          const T* head, int token_stride, int num_tokens,
                                          int padded, int dim) {
  constexpr int kChunks = SharedRows<T, kDim>::kChunks;
  constexpr int kElements = SharedRows<T, kDim>::kChunkElements;
  for (int i = threadIdx.x; i < padded * kChunks; i += blockDim.x) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool valid = row < num_tokens && chunk * kElements < dim;
    shared.copy_async(row, chunk, head + (valid ? row * token_stride : 0), valid);
  }
}

// Which keys every query sees: seen[query][word], one bit per key, zero for queries
// that do not exist. `of_group` is scratch of as many words for the groups.
__device__ __forceinline__ void fill_masks(uint32_t* of_group, uint32_t* seen,
                                           const int* __restrict__ group,
                                           const int* __restrict__ index, int num_tokens,
                                           int padded, int num_groups, int num_keys) {
  const int words = (num_tokens + 31) / 32;
  for (int i = threadIdx.x; i < num_groups * words; i += blockDim.x) of_group[i] = 0;
  __syncthreads();
  constexpr int kBatch = 8;  // loads under way at once
  const int entries = num_groups * num_keys;
  for (int i = threadIdx.x; i < entries; i += kBatch * blockDim.x) {
    int token[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int at = i + j * blockDim.x;
      token[j] = at < entries ? index[at] : 0;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int at = i + j * blockDim.x;
      if (at >= entries) continue;
      // A token out of range must not do harm.
      const int own = min(max(token[j], 0), num_tokens - 1);
      atomicOr(&of_group[at / num_keys * words + own / 32], 1u << own % 32);
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < padded * words; i += blockDim.x) {
    const int query = i / words;
    uint32_t bits = 0;
    if (query < num_tokens) {
      const int g = min(max(group[query], 0), num_groups - 1);
      bits = of_group[g * words + i % words];
    }
    seen[i] = bits;
  }
}

template <typename T>
__global__ void __launch_bounds__(32 * kMaxWarps, 3)
    masked_kernel(Rows<const T> query, Rows<const T> key, Rows<const T> value,
                  const int* __restrict__ group, const int* __restrict__ index,
                  Rows<T> out, float* __restrict__ logsumexp, int num_tokens,
                  int num_groups, int num_keys, int dim, float scale) {
  char* shared = dynamic_shared();
  const int64_t bh = own_head();
  const int padded = (num_tokens + 15) / 16 * 16, words = (num_tokens + 31) / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const SharedRows<T, kDim> keys(shared);
  const SharedRows<T, kDim> values(shared + padded * kDim * sizeof(T));
  auto* seen = reinterpret_cast<uint32_t*>(shared + 2 * padded * kDim * sizeof(T));
  copy_head(keys, key.head(), key.token_stride, num_tokens, padded, dim);
  copy_head(values, value.head(), value.token_stride, num_tokens, padded, dim);
  ptx::commit_copies();
  fill_masks(seen + padded * words, seen, group + bh * num_tokens,
             index + bh * num_groups * num_keys, num_tokens, padded, num_groups,
             num_keys);
  ptx::wait_for_copies<0>();
  __syncthreads();

  const float scale_log2 = positive_scale_log2(scale);
  for (int first = 16 * warp; first < num_tokens; first += blockDim.x / 2) {
    RowFragment<T, kDim> q[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first + 8 * half + lane / 4;
      if (token < num_tokens) {
        q[half].load(query.row(query.head(), token), dim);
      } else {
        q[half].clear();
      }
      // The maximum is taken before scaling, which must not turn the order round.
      if (scale < 0.f) q[half].negate();
    }
    const uint32_t* own_seen = seen + (first + lane / 4) * words;
    OnlineSoftmax<T, kDim> softmax;
    // Scores kKeys keys from `from` on, a multiple of 16.
    const auto attend = [&](int from, auto keys_at_once) {
      constexpr int kKeys = decltype(keys_at_once)::value;
      float s[kKeys / 8][4];
#pragma unroll
      for (int t = 0; t < kKeys / 16; ++t) {
        const int word = (from + 16 * t) / 32;
        const int shift = (from + 16 * t) % 32 + 2 * (lane % 4);
        const uint32_t bits[2] = {own_seen[word] >> shift,
                                  own_seen[8 * words + word] >> shift};
#pragma unroll
        for (int n = 2 * t; n < 2 * t + 2; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) s[n][i] = 0.f;
          const RowFragment<T, kDim> k = keys.load_row(from + 8 * n + lane / 4);
#pragma unroll
          for (int step = 0; step < kDim / 16; ++step) {
            mma(s[n], operand_a(q[0], q[1], step), k.operand_b(step));
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (!(bits[i / 2] >> (8 * (n % 2) + i % 2) & 1)) s[n][i] = -INFINITY;
          }
        }
      }
      softmax.template add<kKeys>(s, scale_log2, values, from);
    };
    int from = 0;
    for (; from + 64 <= padded; from += 64) {
      attend(from, std::integral_constant<int, 64>());
    }
    for (; from < padded; from += 16) {
      attend(from, std::integral_constant<int, 16>());
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first + 8 * half + lane / 4;
      T* row = token < num_tokens ? out.row(out.head(), token) : nullptr;
      softmax.store(half, scale_log2, dim, row, logsumexp + bh * num_tokens + token);
    }
  }
}

// First dQ, query by query, then dK and dV, key by key (see
// group_attention_backward.cu for the equations).
template <typename T>
__global__ void __launch_bounds__(32 * kMaxWarps, 3)
    masked_backward_kernel(Rows<const T> grad_out, Rows<const T> query, Rows<const T> key,
                           Rows<const T> value, Rows<const T> out,
                           const int* __restrict__ group, const int* __restrict__ index,
                           const float* __restrict__ logsumexp, Rows<T> grad_query,
                           Rows<T> grad_key, Rows<T> grad_value, int num_tokens,
                           int num_groups, int num_keys, int dim, float scale) {
  char* shared = dynamic_shared();
  __shared__ float2 statistic[kMaxTokens];  // logsumexp * log2(e), delta
  const int64_t bh = own_head();
  const int padded = (num_tokens + 15) / 16 * 16, words = (num_tokens + 31) / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int bytes = padded * kDim * sizeof(T);
  const SharedRows<T, kDim> keys(shared), values(shared + bytes);
  const SharedRows<T, kDim> queries(shared + 2 * bytes), grads(shared + 3 * bytes);
  auto* seen = reinterpret_cast<uint32_t*>(shared + 4 * bytes);
  copy_head(keys, key.head(), key.token_stride, num_tokens, padded, dim);
  copy_head(values, value.head(), value.token_stride, num_tokens, padded, dim);
  copy_head(queries, query.head(), query.token_stride, num_tokens, padded, dim);
  copy_head(grads, grad_out.head(), grad_out.token_stride, num_tokens, padded, dim);
  ptx::commit_copies();
  fill_masks(seen + padded * words, seen, group + bh * num_tokens,
             index + bh * num_groups * num_keys, num_tokens, padded, num_groups,
             num_keys);
  ptx::wait_for_copies<0>();
  __syncthreads();

  const float scale_log2 = scale * kLog2E;
  for (int first = 16 * warp; first < num_tokens; first += blockDim.x / 2) {
    RowFragment<T, kDim> q[2], g[2];
    float lse_log2[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first + 8 * half + lane / 4;
      q[half] = queries.load_row(token);
      g[half] = grads.load_row(token);
      RowFragment<T, kDim> o;
      o.clear();
      lse_log2[half] = 0.f;
      delta[half] = 0.f;
      if (token < num_tokens) {
        o.load(out.row(out.head(), token), dim);
        lse_log2[half] = logsumexp[bh * num_tokens + token] * kLog2E;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 a = unpack<T>(g[half].x[0][i]), b = unpack<T>(o.x[0][i]);
        delta[half] += a.x * b.x + a.y * b.y;
      }
      delta[half] = quad_sum(delta[half]);
      if (lane % 4 == 0) statistic[token] = make_float2(lse_log2[half], delta[half]);
    }
    const uint32_t* own_seen = seen + (first + lane / 4) * words;
    float d_query[kDim / 8][4] = {};
    for (int from = 0; from < num_tokens; from += 16) {
      const int shift = from % 32 + 2 * (lane % 4);
      const uint32_t bits[2] = {own_seen[from / 32] >> shift,
                                own_seen[8 * words + from / 32] >> shift};
      float s[2][4] = {}, dp[2][4] = {};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const RowFragment<T, kDim> k = keys.load_row(from + 8 * n + lane / 4);
        const RowFragment<T, kDim> v = values.load_row(from + 8 * n + lane / 4);
#pragma unroll
        for (int step = 0; step < kDim / 16; ++step) {
          mma(s[n], operand_a(q[0], q[1], step), k.operand_b(step));
          mma(dp[n], operand_a(g[0], g[1], step), v.operand_b(step));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float p = ptx::exp2_approx(s[n][i] * scale_log2 - lse_log2[i / 2]);
          const bool sees = bits[i / 2] >> (8 * n + i % 2) & 1;
          s[n][i] = sees ? p * (dp[n][i] - delta[i / 2]) : 0.f;
        }
      }
      const FragmentA<T> ds = as_operand<T>(s[0], s[1]);
#pragma unroll
      for (int pair = 0; pair < kDim / 16; ++pair) {
        FragmentB<T> k[2];
        keys.load_columns(from, pair, k);
        mma(d_query[2 * pair], ds, k[0]);
        mma(d_query[2 * pair + 1], ds, k[1]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first + 8 * half + lane / 4;
      T* row = token < num_tokens ? grad_query.row(grad_query.head(), token) : nullptr;
      store_row<T, kDim>(d_query, half, scale, row, dim);
    }
  }
  __syncthreads();

  for (int first = 16 * warp; first < num_tokens; first += blockDim.x / 2) {
    RowFragment<T, kDim> k[2], v[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      k[half] = keys.load_row(first + 8 * half + lane / 4);
      v[half] = values.load_row(first + 8 * half + lane / 4);
    }
    const int shift = first % 32 + lane / 4;
    float d_key[kDim / 8][4] = {}, d_value[kDim / 8][4] = {};
    for (int from = 0; from < num_tokens; from += 16) {
      float p[2][4] = {}, ds[2][4] = {};  // P^T, dS^T
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int row = from + 8 * n;
        const RowFragment<T, kDim> q = queries.load_row(row + lane / 4);
        const RowFragment<T, kDim> g = grads.load_row(row + lane / 4);
#pragma unroll
        for (int step = 0; step < kDim / 16; ++step) {
          mma(p[n], operand_a(k[0], k[1], step), q.operand_b(step));
          mma(ds[n], operand_a(v[0], v[1], step), g.operand_b(step));
        }
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int column = row + 2 * (lane % 4) + odd;
          const float2 own = statistic[column];
          const uint32_t bits = seen[column * words + first / 32] >> shift;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float& probability = p[n][2 * half + odd];
            float& gradient = ds[n][2 * half + odd];
            const bool sees = bits >> (8 * half) & 1;
            probability = sees ? ptx::exp2_approx(probability * scale_log2 - own.x) : 0.f;
            gradient = sees ? probability * (gradient - own.y) : 0.f;
          }
        }
      }
      const FragmentA<T> p_a = as_operand<T>(p[0], p[1]);
      const FragmentA<T> ds_a = as_operand<T>(ds[0], ds[1]);
#pragma unroll
      for (int pair = 0; pair < kDim / 16; ++pair) {
        FragmentB<T> g[2], q[2];
        grads.load_columns(from, pair, g);
        queries.load_columns(from, pair, q);
        mma(d_value[2 * pair], p_a, g[0]);
        mma(d_value[2 * pair + 1], p_a, g[1]);
        mma(d_key[2 * pair], ds_a, q[0]);
        mma(d_key[2 * pair + 1], ds_a, q[1]);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first + 8 * half + lane / 4;
      const bool exists = token < num_tokens;
      store_row<T, kDim>(d_key, half, scale,
                         exists ? grad_key.row(grad_key.head(), token) : nullptr, dim);
      store_row<T, kDim>(d_value, half, 1.f,
                         exists ? grad_value.row(grad_value.head(), token) : nullptr,
                         dim);
    }
  }
}

template <typename Run>
void dispatch_half(const at::Tensor& tokens, Run&& run) {
  if (tokens.scalar_type() == at::kHalf) return run(Type<__half>());
  run(Type<bfloat16>());
}

// Warps such that all serve equally many tiles of 16 rows, and the shared memory
// of `operands` times all rows and the masks.
struct Shape {
  int warps;
  size_t bytes;

  Shape(int64_t num_tokens, int64_t num_groups, int operands) {
    const int64_t rows = ceil_div(num_tokens, 16);
    warps = static_cast<int>(ceil_div(rows, ceil_div(rows, kMaxWarps)));
    bytes = operands * 16 * rows * kDim * 2 +
            (16 * rows + num_groups) * ceil_div(num_tokens, 32) * 4;
  }
};

}  // namespace

bool has_few_tokens(const at::Tensor& tokens) {
  return tokens.size(2) <= kMaxTokens && tokens.size(3) <= kDim &&
         tokens.element_size() == 2;
}

void masked_attention(const at::Tensor& query, const at::Tensor& key,
                      const at::Tensor& value, const at::Tensor& group,
                      const at::Tensor& index, double scale, at::Tensor& out,
                      at::Tensor& logsumexp) {
  const int64_t L = query.size(2), G = index.size(2), K = index.size(3);
  const Shape shape(L, G, 2);
  dispatch_half(query, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(masked_kernel<T>, grid_of_heads(1, query), 32 * shape.warps, shape.bytes,
           Rows<const T>(query), Rows<const T>(key), Rows<const T>(value),
           group.const_data_ptr<int>(), index.const_data_ptr<int>(), Rows<T>(out),
           logsumexp.mutable_data_ptr<float>(), static_cast<int>(L), static_cast<int>(G),
           static_cast<int>(K), static_cast<int>(query.size(3)),
           static_cast<float>(scale));
  });
}

void masked_attention_backward(const at::Tensor& grad_out, const at::Tensor& query,
                               const at::Tensor& key, const at::Tensor& value,
                               const at::Tensor& group, const at::Tensor& index,
                               const at::Tensor& out, const at::Tensor& logsumexp,
                               double scale, at::Tensor& grad_query, at::Tensor& grad_key,
                               at::Tensor& grad_value) {
  const int64_t L = query.size(2), G = index.size(2), K = index.size(3);
  const Shape shape(L, G, 4);
  dispatch_half(query, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(masked_backward_kernel<T>, grid_of_heads(1, query), 32 * shape.warps,
           shape.bytes, Rows<const T>(grad_out), Rows<const T>(query), Rows<const T>(key),
           Rows<const T>(value), Rows<const T>(out), group.const_data_ptr<int>(),
           index.const_data_ptr<int>(), logsumexp.const_data_ptr<float>(),
           Rows<T>(grad_query), Rows<T>(grad_key), Rows<T>(grad_value),
           static_cast<int>(L), static_cast<int>(G), static_cast<int>(K),
           static_cast<int>(query.size(3)), static_cast<float>(scale));
  });
}

}  // namespace mmdgt
