// Group attention for few tokens, backward.
#include "masked_attention.cuh"

namespace mmdgt::cuda {

using namespace masked;

namespace {

constexpr int kStageQueries = 64;

// Which keys each query sees, in shared memory: a word of 32 keys of all queries after
// the other.
struct SeenKeys {
  uint32_t* words;
  int padded;

  __device__ __forceinline__ uint32_t* at(int word, int query) const {
    return words + word * padded + query;
  }
  __device__ __forceinline__ bool sees(int query, int key) const {
    return *at(key / 32, query) >> key % 32 & 1;
  }
};

// Shared memory: keys, queries, their gradients, dS^T of a stage with a row per key, what
// the queries see. The masks of the groups come first where dS^T is later.
struct BackwardMemory {
  int row_bytes, grad_scores, seen, end;  // offsets, in bytes

  MMDGT_HOST_DEVICE BackwardMemory(const Sizes& sizes, int warps) {
    const int padded = padded_rows(sizes.num_tokens);
    const int score_bytes = 32 * warps * kStageQueries * 2;
    const int mask_bytes = sizes.num_groups * kMaskWords * 4;
    row_bytes = padded * kDim * 2;
    grad_scores = 3 * row_bytes;
    seen = grad_scores + (score_bytes > mask_bytes ? score_bytes : mask_bytes);
    end = seen + padded * kMaskWords * 4;
  }
};

// The gradient of one query, one key at a time, an element of D per lane.
template <typename T>
__device__ __forceinline__ void grad_query_row(const Backward<T>& to, int token,
                                               const SeenKeys& seen, float2 statistic) {
  const int lane = threadIdx.x % 32;
  const bool inside = lane < to.sizes.dim;
  const auto element = [&](const Rows<const T>& rows, int t) {
    return inside ? to_float(rows.row(rows.head(), t)[lane]) : 0.f;
  };
  const float q = element(to.query, token), d_out = element(to.grad_out, token);
  float sum = 0.f;
  for (int t = 0; t < to.sizes.num_tokens; ++t) {
    if (!seen.sees(token, t)) continue;
    const float k = element(to.key, t);
    const float score = warp_sum(q * k) * to.scale * kLog2E;
    const float d_p = warp_sum(d_out * element(to.value, t));
    sum += exp2f(score - statistic.x) * (d_p - statistic.y) * k;
  }
  if (inside) {
    to.grad_query.row(to.grad_query.head(), token)[lane] = from_float<T>(sum * to.scale);
  }
}

// The gradients of one key and its value, one query at a time.
template <typename T>
__device__ __forceinline__ void grad_key_row(const Backward<T>& to, int token,
                                             const SeenKeys& seen,
                                             const float2* statistic) {
  const int lane = threadIdx.x % 32;
  const bool inside = lane < to.sizes.dim;
  const auto element = [&](const Rows<const T>& rows, int t) {
    return inside ? to_float(rows.row(rows.head(), t)[lane]) : 0.f;
  };
  const float k = element(to.key, token), v = element(to.value, token);
  float d_key = 0.f, d_value = 0.f;
  for (int t = 0; t < to.sizes.num_tokens; ++t) {
    if (!seen.sees(t, token)) continue;
    const float q = element(to.query, t), d_out = element(to.grad_out, t);
    const float score = warp_sum(q * k) * to.scale * kLog2E;
    const float p = exp2f(score - statistic[t].x);
    d_value += p * d_out;
    d_key += p * (warp_sum(d_out * v) - statistic[t].y) * q;
  }
  if (!inside) return;
  to.grad_key.row(to.grad_key.head(), token)[lane] = from_float<T>(d_key * to.scale);
  to.grad_value.row(to.grad_value.head(), token)[lane] = from_float<T>(d_value);
}

// Negates the rows that copy_head has copied, each thread its own.
template <typename T>
__device__ __forceinline__ void negate_copied(const Shared<T>& shared, int padded) {
  for (int i = threadIdx.x; i < padded * Shared<T>::kChunks; i += blockDim.x) {
    shared.negate_chunk(i / Shared<T>::kChunks, i % Shared<T>::kChunks);
  }
}

// Whether all of row r (half = 0) or r + 8 (half = 1) of 16xD results is finite; by a
// whole warp, each quad gets its own answer.
__device__ __forceinline__ bool row_is_finite(const float (&c)[kDim / 8][4], int half) {
  float size = 0.f;
#pragma unroll
  for (int n = 0; n < kDim / 8; ++n) {
    size += fabsf(c[n][2 * half]) + fabsf(c[n][2 * half + 1]);
  }
  const uint32_t bad = __ballot_sync(~0u, !(size <= 3e38f));
  return (bad >> (threadIdx.x & 28) & 15) == 0;
}

// The product of two rows of device memory.
template <typename T>
__device__ __forceinline__ float row_product(const T* a, const T* b, int dim) {
  float sum = 0.f;
#pragma unroll
  for (int column = 0; column < kDim; column += 8) {
    if (column >= dim) break;
    const uint4 left = __ldg(reinterpret_cast<const uint4*>(a + column));
    const uint4 right = __ldg(reinterpret_cast<const uint4*>(b + column));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack<T>(reinterpret_cast<const Pair<T>*>(&left)[i]);
      const float2 y = unpack<T>(reinterpret_cast<const Pair<T>*>(&right)[i]);
      sum += x.x * y.x + x.y * y.y;
    }
  }
  return sum;
}

// dS = P * (dP - delta), and its products dV = P^T dO, dK = scale * dS^T Q and
// dQ = scale * dS K, as in group_attention_backward.cu. A warp holds 32 keys while the
// queries pass in stages, then the warps share the queries of the stage for dQ. Masks
// (B,H,G,kMaskWords) are made from the index where there are none.
template <typename T, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kWarps < kMaxWarps ? 2 : 1)
    masked_backward_kernel(Backward<T> to, const uint32_t* __restrict__ masks) {
  __shared__ __align__(16) float2 statistic[kMaxTokens];  // logsumexp * log2(e), delta
  char* shared = dynamic_shared();
  const Sizes& sizes = to.sizes;
  const int64_t bh = own_head();
  const int padded = padded_rows(sizes.num_tokens);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const BackwardMemory memory(sizes, warps);
  const Shared<T> keys(shared), queries(shared + memory.row_bytes);
  const Shared<T> grads(shared + 2 * memory.row_bytes);
  // dS^T of 16 queries of the stage, a row per key.
  const auto grad_scores = [&](int tile) {
    return SharedRows<T, 16>(shared + memory.grad_scores + tile * warps * 32 * 16 * 2);
  };
  const SeenKeys seen{reinterpret_cast<uint32_t*>(shared + memory.seen), padded};
  copy_head(keys, to.key, sizes, padded);
  copy_head(queries, to.query, sizes, padded);
  copy_head(grads, to.grad_out, sizes, padded);
  ptx::commit_copies();
  if (masks == nullptr) {
    auto* made = reinterpret_cast<uint32_t*>(shared + memory.grad_scores);
    fill_masks(made, to.index + bh * sizes.num_groups * sizes.num_keys, sizes);
    masks = made;
    __syncthreads();
  } else {
    masks += bh * sizes.num_groups * kMaskWords;
  }
  const int own_key = 32 * warp;
  Row<T> v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = own_key + 8 * i + lane / 4;
    v[i].load(to.value.row(to.value.head(), min(token, sizes.num_tokens - 1)), sizes.dim);
    if (token >= sizes.num_tokens) v[i].clear();
  }
  const int query = threadIdx.x;  // whose statistic is the thread's own to find
  if (query < padded) {
    float2 own = make_float2(0.f, 0.f);
    uint4 words[kMaskWords / 4] = {};
    if (query < sizes.num_tokens) {
      const int group = to.group[bh * sizes.num_tokens + query];
      const uint32_t* mask =
          masks + min(max(group, 0), sizes.num_groups - 1) * kMaskWords;
      own = make_float2(to.logsumexp[bh * sizes.num_tokens + query] * kLog2E,
                        row_product(to.grad_out.row(to.grad_out.head(), query),
                                    to.out.row(to.out.head(), query), sizes.dim));
#pragma unroll
      for (int i = 0; i < kMaskWords / 4; ++i) {
        words[i] = reinterpret_cast<const uint4*>(mask)[i];
      }
    }
    statistic[query] = own;
#pragma unroll
    for (int word = 0; word < kMaskWords; ++word) {
      *seen.at(word, query) = reinterpret_cast<const uint32_t*>(words)[word];
    }
  }
  ptx::wait_for_copies<0>();
  // The number that hides a score is negative, whatever the sign of the scale.
  if (to.scale < 0.f) negate_copied(queries, padded);
  __syncthreads();

  const float scale_log2 = positive_scale_log2(to.scale);
  FragmentA<T> own_v[2][kDim / 16];
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      own_v[m][step] = operand_a(v[2 * m], v[2 * m + 1], step);
    }
  }
  float d_key[2][kDim / 8][4] = {}, d_value[2][kDim / 8][4] = {};
  for (int from = 0; from < padded; from += kStageQueries) {
    const int count = min(padded - from, kStageQueries);
    for (int row = 0; row < count; row += 16) {
      FragmentA<T> p_a[2], ds_a[2];  // P^T, dS^T
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int column = from + row + 8 * n + 2 * (lane % 4);
        const uint2 bits = *reinterpret_cast<const uint2*>(seen.at(warp, column));
        const uint32_t even = ~bits.x << (7 - lane / 4), odd = ~bits.y << (7 - lane / 4);
        float p[2][4] = {{__uint_as_float(ptx::top_sign_byte<0>(even)),
                          __uint_as_float(ptx::top_sign_byte<0>(odd)),
                          __uint_as_float(ptx::top_sign_byte<1>(even)),
                          __uint_as_float(ptx::top_sign_byte<1>(odd))},
                         {__uint_as_float(ptx::top_sign_byte<2>(even)),
                          __uint_as_float(ptx::top_sign_byte<2>(odd)),
                          __uint_as_float(ptx::top_sign_byte<3>(even)),
                          __uint_as_float(ptx::top_sign_byte<3>(odd))}};
        FragmentB<T> q[2];
        queries.load_operands(from + row + 8 * n, 0, q);
        const Row<T> g = grads.load_rows(from + row + 8 * n);
        const float4 own = *reinterpret_cast<const float4*>(statistic + column);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          FragmentA<T> own_k[2];  // registers are too scarce to keep it
          keys.load_operands(min(own_key + 16 * m, padded - 16), 0, own_k);
          float ds[4] = {};
#pragma unroll
          for (int step = 0; step < kDim / 16; ++step) {
            mma(p[m], own_k[step], q[step]);
            mma(ds, own_v[m][step], g.operand_b(step));
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float lse_log2 = i % 2 ? own.z : own.x, delta = i % 2 ? own.w : own.y;
            p[m][i] = ptx::exp2_approx(fmaf(p[m][i], scale_log2, -lse_log2));
            ds[i] = p[m][i] * (ds[i] - delta);
          }
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            p_a[m].x[2 * n + half] = pack<T>(p[m][2 * half], p[m][2 * half + 1]);
            const Pair<T> pair = pack<T>(ds[2 * half], ds[2 * half + 1]);
            ds_a[m].x[2 * n + half] = pair;
            grad_scores(row / 16).store_pair(own_key + 16 * m, 8 * half + lane / 4,
                                             8 * n + 2 * (lane % 4), pair);
          }
        }
      }
#pragma unroll
      for (int pair = 0; pair < kDim / 16; ++pair) {
        FragmentB<T> g[2], q[2];
        grads.load_columns(from + row, pair, g);
        queries.load_columns(from + row, pair, q);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma(d_value[m][2 * pair], p_a[m], g[0]);
          mma(d_value[m][2 * pair + 1], p_a[m], g[1]);
          mma(d_key[m][2 * pair], ds_a[m], q[0]);
          mma(d_key[m][2 * pair + 1], ds_a[m], q[1]);
        }
      }
    }
    __syncthreads();
    for (int row = 16 * warp; row < count; row += 16 * warps) {
      float d_query[kDim / 8][4] = {};
      for (int key = 0; key < padded; key += 16) {
        const FragmentA<T> ds = grad_scores(row / 16).load_transposed(key);
#pragma unroll
        for (int pair = 0; pair < kDim / 16; ++pair) {
          FragmentB<T> columns[2];
          keys.load_columns(key, pair, columns);
          mma(d_query[2 * pair], ds, columns[0]);
          mma(d_query[2 * pair + 1], ds, columns[1]);
        }
      }
      uint32_t again[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int token = from + row + 8 * half + lane / 4;
        const bool exists = token < sizes.num_tokens;
        const bool good = row_is_finite(d_query, half);
        again[half] = __ballot_sync(~0u, exists && !good);
        store_row<T, kDim>(
            d_query, half, to.scale,
            exists && good ? to.grad_query.row(to.grad_query.head(), token) : nullptr,
            sizes.dim);
      }
      each_row_again(again, [&](int i) {
        grad_query_row(to, from + row + i, seen, statistic[from + row + i]);
      });
    }
    __syncthreads();
  }

#pragma unroll
  for (int m = 0; m < 2; ++m) {
    uint32_t again[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = own_key + 16 * m + 8 * half + lane / 4;
      const bool exists = token < sizes.num_tokens;
      const bool good_key = row_is_finite(d_key[m], half);  // by the whole warp, both
      const bool good = row_is_finite(d_value[m], half) && good_key;
      again[half] = __ballot_sync(~0u, exists && !good);
      const bool write = exists && good;
      store_row<T, kDim>(d_key[m], half, fabsf(to.scale),  // the queries have the sign
                         write ? to.grad_key.row(to.grad_key.head(), token) : nullptr,
                         sizes.dim);
      store_row<T, kDim>(d_value[m], half, 1.f,
                         write ? to.grad_value.row(to.grad_value.head(), token) : nullptr,
                         sizes.dim);
    }
    each_row_again(
        again, [&](int i) { grad_key_row(to, own_key + 16 * m + i, seen, statistic); });
  }
}

}  // namespace

void masked_attention_backward(const at::Tensor& grad_out, const at::Tensor& query,
                               const at::Tensor& key, const at::Tensor& value,
                               const at::Tensor& group, const at::Tensor& choice,
                               const at::Tensor& out, const at::Tensor& logsumexp,
                               double scale, bool from_masks, at::Tensor& grad_query,
                               at::Tensor& grad_key, at::Tensor& grad_value) {
  const Sizes sizes(query, choice.size(2), choice.size(3));
  const int* chosen = choice.const_data_ptr<int>();
  dispatch_few(query, warps_for(sizes), [&](auto type, auto warps) {
    using T = typename decltype(type)::type;
    const Backward<T> to{Rows<const T>(grad_out),     Rows<const T>(query),
                         Rows<const T>(key),          Rows<const T>(value),
                         group.const_data_ptr<int>(), from_masks ? nullptr : chosen,
                         Rows<const T>(out),          logsumexp.const_data_ptr<float>(),
                         Rows<T>(grad_query),         Rows<T>(grad_key),
                         Rows<T>(grad_value),         sizes,
                         static_cast<float>(scale)};
    launch(masked_backward_kernel<T, decltype(warps)::value>, grid_of_heads(1, query),
           32 * warps_for(sizes), BackwardMemory(sizes, warps_for(sizes)).end, to,
           from_masks ? reinterpret_cast<const uint32_t*>(chosen) : nullptr);
  });
}

}  // namespace mmdgt::cuda
