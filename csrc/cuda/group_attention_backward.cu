// Group attention, backward. The probabilities are recomputed from the logsumexp,
// once for dQ, query by query, and once for dK and dV, key by key. A key may serve
// several groups: each leaves its part of dK and dV in a buffer, and a last kernel
// sums a key's parts in a fixed order, so no atomics touch the gradients.
#include <ATen/ops/empty_like.h>

#include "attention.cuh"
#include "kernels.h"
#include "masked_attention.h"
#include "sort_queries.h"

namespace mmdgt::cuda {
namespace {

// dQ = scale * dS K with dS = P * (dP - delta), dP = dO V^T, delta = rowsum(dO * O).
// Blocks as in the forward pass. delta (B,H,L) is kept for the other kernel.
template <typename T, int D, int kWarps, int kKeys>
__global__ void __launch_bounds__(32 * kWarps, D * sizeof(T) > 64 ? 1 : 16 / kWarps)
    grad_query_kernel(Backward<T> to, const int* __restrict__ order,
                      const int4* __restrict__ tiles, float* __restrict__ delta_out) {
  char* shared = dynamic_shared();
  const Sizes& sizes = to.sizes;
  const auto [group, begin, end, unused] = tiles[own_head() * gridDim.x + blockIdx.x];
  if (begin == end) return;
  order += own_head() * sizes.num_tokens;
  const float* logsumexp = to.logsumexp + own_head() * sizes.num_tokens;
  delta_out += own_head() * sizes.num_tokens;

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool active = begin + 16 * warp < end;
  int token[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int place = begin + 16 * warp + 8 * half + lane / 4;
    token[half] = place < end ? order[place] : -1;
  }
  KeyPipeline<T, D, 32 * kWarps, kKeys> pipeline{
      shared,
      to.key.head(),
      to.value.head(),
      to.key.token_stride,
      to.value.token_stride,
      to.index + (own_head() * sizes.num_groups + group) * sizes.num_keys,
      sizes.num_keys,
      sizes.num_tokens,
      sizes.dim};
  pipeline.look_up(0);
  pipeline.copy(0);
  pipeline.look_up(1);
  float lse_log2[2], delta[2];
  RowFragment<T, D> q[2], d_out[2], o[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    q[half].clear();
    d_out[half].clear();
    o[half].clear();
    lse_log2[half] = 0.f;
    if (token[half] >= 0) {
      q[half].load(to.query.row(to.query.head(), token[half]), sizes.dim);
      d_out[half].load(to.grad_out.row(to.grad_out.head(), token[half]), sizes.dim);
      o[half].load(to.out.row(to.out.head(), token[half]), sizes.dim);
      lse_log2[half] = logsumexp[token[half]] * kLog2E;
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    delta[half] = 0.f;
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      const float2 a = unpack<T>(d_out[half].x[i / 4][i % 4]);
      const float2 b = unpack<T>(o[half].x[i / 4][i % 4]);
      delta[half] += a.x * b.x + a.y * b.y;
    }
    delta[half] = quad_sum(delta[half]);
    if (token[half] >= 0 && lane % 4 == 0) {
      delta_out[token[half]] = delta[half];
    }
  }

  const float scale_log2 = to.scale * kLog2E;
  float d_query[D / 8][4] = {};
  pipeline.run([&](int stage) {
    if (!active) return;
    const SharedRows<T, D> keys = pipeline.keys(stage);
    const SharedRows<T, D> values = pipeline.values(stage);
    const int count = sizes.num_keys - stage * kKeys;
#pragma unroll(sizeof(T) == 2 ? kKeys / 16 : 1)
    for (int first = 0; first < kKeys; first += 16) {
      float s[2][4] = {}, dp[2][4] = {};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int block = 0; block < D / 32; ++block) {
          const auto k = keys.load_block(first + 8 * n + lane / 4, block);
          const auto v = values.load_block(first + 8 * n + lane / 4, block);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int step = 2 * block + half;
            mma(s[n], operand_a(q[0], q[1], step), k.operand_b(half));
            mma(dp[n], operand_a(d_out[0], d_out[1], step), v.operand_b(half));
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float p = ptx::exp2_approx(s[n][i] * scale_log2 - lse_log2[i / 2]);
          s[n][i] = p * (dp[n][i] - delta[i / 2]);
        }
        if (first + 8 * n + 8 > count) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            // Columns without a key have no part, however large p is there.
            if (first + 8 * n + 2 * (lane % 4) + i % 2 >= count) s[n][i] = 0.f;
          }
        }
      }
      const FragmentA<T> ds = as_operand<T>(s[0], s[1]);
#pragma unroll
      for (int pair = 0; pair < D / 16; ++pair) {
        FragmentB<T> k[2];
        keys.load_columns(first, pair, k);
        mma(d_query[2 * pair], ds, k[0]);
        mma(d_query[2 * pair + 1], ds, k[1]);
      }
    }
  });
  if (!active) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* row =
        token[half] >= 0 ? to.grad_query.row(to.grad_query.head(), token[half]) : nullptr;
    store_row<T, D>(d_query, half, to.scale, row, sizes.dim);
  }
}

// Queries whose gradient of dK and dV one block sums, and those it holds in one of
// its two stages of shared memory.
constexpr int64_t kMinPart = 512;
template <typename T, int D>
constexpr int kStageQueries = D * sizeof(T) == 64    ? 64
                              : D * sizeof(T) == 128 ? 32
                                                     : 16;
// Tiles of 16 keys that a warp holds in registers, and warps of a block.
template <typename T, int D>
constexpr int kWarpTiles = D * sizeof(T) == 64 ? 2 : 1;
constexpr int kKeyWarps = 4;

// What a part of dK and dV is kept in: float16 could overflow before the sum.
template <typename T>
using Part = std::conditional_t<std::is_same_v<T, __half>, float, T>;

// dV = P^T dO and dK = scale * dS^T Q for the queries of one tile, which may be a
// whole group: parts (B,H,tiles,K,2,D), dK before dV.
template <typename T, int D>
__global__ void __launch_bounds__(32 * kKeyWarps)
    grad_key_kernel(Backward<T> to, const int* __restrict__ order,
                    const int4* __restrict__ tiles, const float* __restrict__ delta,
                    Part<T>* __restrict__ parts, int num_tiles) {
  const Sizes& sizes = to.sizes;
  constexpr int kQueries = kStageQueries<T, D>;
  constexpr int kTiles = kWarpTiles<T, D>;
  constexpr int kStageBytes = kQueries * D * sizeof(T);
  constexpr int kThreads = 32 * kKeyWarps;
  __shared__ __align__(128) char shared[4 * kStageBytes];
  __shared__ float2 statistic[2][kQueries];  // logsumexp, delta
  const int key_block = blockIdx.x / num_tiles;
  const int64_t tile = own_head() * num_tiles + blockIdx.x % num_tiles;
  const auto [group, begin, end, unused] = tiles[tile];
  if (begin == end) return;
  const int* index = to.index + (own_head() * sizes.num_groups + group) * sizes.num_keys;
  order += own_head() * sizes.num_tokens + begin;
  const float* logsumexp = to.logsumexp + own_head() * sizes.num_tokens;
  delta += own_head() * sizes.num_tokens;
  const int num_queries = end - begin;

  const auto stage_query = [&](int stage) {
    return shared + (stage % 2) * 2 * kStageBytes;
  };
  const auto stage_grad = [&](int stage) { return stage_query(stage) + kStageBytes; };
  // As in KeyPipeline, tokens are looked up one stage ahead. Rows without a query
  // become zero: whatever their probability, they add nothing.
  RowGather<T, D, kThreads, kQueries> gather;
  int own_token = -1;  // whose statistic this thread copies
  const auto look_up = [&](int stage) {
    const int count = num_queries - stage * kQueries;
    gather.look_up(order + stage * kQueries, count, sizes.num_tokens - 1);
    const int own = threadIdx.x;
    own_token = own < min(count, kQueries) ? order[stage * kQueries + own] : -1;
  };
  const auto copy = [&](int stage) {
    gather.copy(stage_query(stage), to.query.head(), to.query.token_stride, sizes.dim);
    gather.copy(stage_grad(stage), to.grad_out.head(), to.grad_out.token_stride,
                sizes.dim);
    if (threadIdx.x < kQueries) {
      const int at = max(own_token, 0);
      float2* target = &statistic[stage % 2][threadIdx.x];
      ptx::copy_4_bytes_async(ptx::shared_address(&target->x), logsumexp + at,
                              own_token >= 0);
      ptx::copy_4_bytes_async(ptx::shared_address(&target->y), delta + at,
                              own_token >= 0);
    }
    ptx::commit_copies();
  };
  look_up(0);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_key = (key_block * kKeyWarps + warp) * 16 * kTiles;
  const bool active = first_key < sizes.num_keys;
  const float scale_log2 = to.scale * kLog2E;
  int own_key[2 * kTiles];
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int place = first_key + 8 * i + lane / 4;
    own_key[i] = place < sizes.num_keys ? min(index[place], sizes.num_tokens - 1) : -1;
  }
  copy(0);
  look_up(1);
  RowFragment<T, D> k[kTiles][2], v[kTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int own = max(own_key[i], 0);  // loads without branches, together
    k[i / 2][i % 2].load(to.key.row(to.key.head(), own), sizes.dim);
    v[i / 2][i % 2].load(to.value.row(to.value.head(), own), sizes.dim);
    if (own_key[i] < 0) {
      k[i / 2][i % 2].clear();
      v[i / 2][i % 2].clear();
    }
  }

  float d_key[kTiles][D / 8][4] = {}, d_value[kTiles][D / 8][4] = {};
  const int stages = (num_queries + kQueries - 1) / kQueries;
  for (int stage = 0; stage < stages; ++stage) {
    if (stage + 1 < stages) {
      copy(stage + 1);
      look_up(stage + 2);
      ptx::wait_for_copies<1>();
    } else {
      ptx::wait_for_copies<0>();
    }
    __syncthreads();
    if (active) {
      const SharedRows<T, D> queries(stage_query(stage));
      const SharedRows<T, D> grads(stage_grad(stage));
      const int count = min(num_queries - stage * kQueries, kQueries);
      for (int first = 0; first < count; first += 16) {
        float p[kTiles][2][4] = {}, ds[kTiles][2][4] = {};  // P^T, dS^T
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int row = first + 8 * n;
          const float2 even = statistic[stage % 2][row + 2 * (lane % 4)];
          const float2 odd = statistic[stage % 2][row + 2 * (lane % 4) + 1];
#pragma unroll
          for (int block = 0; block < D / 32; ++block) {
            const auto q = queries.load_block(row + lane / 4, block);
            const auto g = grads.load_block(row + lane / 4, block);
#pragma unroll
            for (int m = 0; m < kTiles; ++m) {
#pragma unroll
              for (int half = 0; half < 2; ++half) {
                const int step = 2 * block + half;
                mma(p[m][n], operand_a(k[m][0], k[m][1], step), q.operand_b(half));
                mma(ds[m][n], operand_a(v[m][0], v[m][1], step), g.operand_b(half));
              }
            }
          }
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float2 own = i % 2 ? odd : even;
              p[m][n][i] = ptx::exp2_approx(p[m][n][i] * scale_log2 - own.x * kLog2E);
              ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - own.y);
            }
          }
        }
#pragma unroll
        for (int pair = 0; pair < D / 16; ++pair) {
          FragmentB<T> g[2], q[2];
          grads.load_columns(first, pair, g);
          queries.load_columns(first, pair, q);
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            const FragmentA<T> p_a = as_operand<T>(p[m][0], p[m][1]);
            const FragmentA<T> ds_a = as_operand<T>(ds[m][0], ds[m][1]);
            mma(d_value[m][2 * pair], p_a, g[0]);
            mma(d_value[m][2 * pair + 1], p_a, g[1]);
            mma(d_key[m][2 * pair], ds_a, q[0]);
            mma(d_key[m][2 * pair + 1], ds_a, q[1]);
          }
        }
      }
    }
    __syncthreads();
  }
  if (!active) return;
  parts += tile * sizes.num_keys * 2 * sizes.dim;
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int place = first_key + 8 * i + lane / 4;
    Part<T>* row = place < sizes.num_keys ? parts + place * 2 * sizes.dim : nullptr;
    store_row<Part<T>, D>(d_key[i / 2], i % 2, to.scale, row, sizes.dim);
    store_row<Part<T>, D>(d_value[i / 2], i % 2, 1.f,
                          row != nullptr ? row + sizes.dim : row, sizes.dim);
  }
}

constexpr int kSumThreads = 256;  // at least the number of groups
constexpr int kSumTokens = 256;   // of a block

// Sums the parts of every key, in the order of groups and their tiles. `choosers` has
// the choices by token.
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    sum_parts_kernel(Backward<T> to, const Part<T>* __restrict__ parts,
                     const int* __restrict__ offsets, const int* __restrict__ begins,
                     const int2* __restrict__ choosers, int size, int num_tiles) {
  const Sizes& sizes = to.sizes;
  __shared__ int first_tile[kSumThreads + 1];  // of a group
  const int64_t bh = own_head();
  first_tile[threadIdx.x + 1] = 0;
  if (threadIdx.x < sizes.num_groups) {
    const int* offset = offsets + bh * (sizes.num_groups + 1);
    const int queries = offset[threadIdx.x + 1] - offset[threadIdx.x];
    first_tile[threadIdx.x + 1] = (queries + size - 1) / size;
  }
  if (threadIdx.x == 0) first_tile[0] = 0;
  __syncthreads();
  for (int step = 1; step < kSumThreads; step *= 2) {
    const int at = threadIdx.x + 1;
    const int other = at > step ? first_tile[at - step] : 0;
    __syncthreads();
    first_tile[at] += other;
    __syncthreads();
  }

  constexpr int kElements = 16 / sizeof(Part<T>);
  constexpr int kBatch = 4;                       // loads under way at once
  const int vectors = 2 * sizes.dim / kElements;  // of a part
  const int tokens_at_once = kSumThreads / vectors;
  const int own_row = threadIdx.x / vectors, vector = threadIdx.x % vectors;
  if (own_row >= tokens_at_once) return;
  const bool for_key = vector < vectors / 2;
  const Rows<T>& target = for_key ? to.grad_key : to.grad_value;
  const int column = (for_key ? vector : vector - vectors / 2) * kElements;
  parts += bh * num_tiles * sizes.num_keys * 2 * sizes.dim + vector * kElements;
  begins += bh * (sizes.num_tokens + 1);
  choosers += bh * sizes.num_groups * sizes.num_keys;
  const int end = min((blockIdx.x + 1) * kSumTokens, sizes.num_tokens);
  for (int token = blockIdx.x * kSumTokens + own_row; token < end;
       token += tokens_at_once) {
    float sum[kElements] = {};
    const auto load = [&](int tile, int place) {
      return __ldg(reinterpret_cast<const uint4*>(
          parts + (static_cast<int64_t>(tile) * sizes.num_keys + place) * 2 * sizes.dim));
    };
    const auto add = [&](const uint4& words) {
      const auto* pairs = reinterpret_cast<const Pair<Part<T>>*>(&words);
#pragma unroll
      for (int x = 0; x < kElements / 2; ++x) {
        const float2 pair = unpack<Part<T>>(pairs[x]);
        sum[2 * x] += pair.x;
        sum[2 * x + 1] += pair.y;
      }
    };
    const int last = begins[token + 1];
    for (int i = begins[token]; i < last; i += kBatch) {
      int2 chooser[kBatch];  // group, place in its row of K
      uint4 words[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) chooser[j] = choosers[min(i + j, last - 1)];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int tile = first_tile[chooser[j].x];
        words[j] = make_uint4(0, 0, 0, 0);
        if (i + j < last && tile < first_tile[chooser[j].x + 1]) {
          words[j] = load(tile, chooser[j].y);
        }
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        add(words[j]);
        // Most groups have one tile.
        for (int tile = first_tile[chooser[j].x] + 1;
             i + j < last && tile < first_tile[chooser[j].x + 1]; ++tile) {
          add(load(tile, chooser[j].y));
        }
      }
    }
    alignas(16) Pair<T> result[kElements / 2];
#pragma unroll
    for (int x = 0; x < kElements / 2; ++x) {
      result[x] = pack<T>(sum[2 * x], sum[2 * x + 1]);
    }
    using Vector = std::conditional_t<sizeof(result) == 16, uint4, float2>;
    *reinterpret_cast<Vector*>(target.row(target.head(), token) + column) =
        *reinterpret_cast<const Vector*>(result);
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_attention_backward_cuda(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& group, const at::Tensor& index,
    const at::Tensor& out, const at::Tensor& logsumexp, double scale) {
  const c10::DeviceGuard guard(query.device());
  const int64_t L = query.size(2), D = query.size(3);
  const int64_t G = index.size(2), K = index.size(3);
  at::Tensor grad_query = empty_heads_last(query);
  at::Tensor grad_key = empty_heads_last(query);
  at::Tensor grad_value = empty_heads_last(query);
  if (group.numel() == 0) return {grad_query, grad_key, grad_value};

  const at::Tensor q = aligned_rows(query), k = aligned_rows(key);
  const at::Tensor v = aligned_rows(value), d_out = aligned_rows(grad_out);
  const at::Tensor o = aligned_rows(out);
  if (has_few_tokens(q)) {
    masked_attention_backward(d_out, q, k, v, group, index, o, logsumexp, scale, false,
                              grad_query, grad_key, grad_value);
    return {grad_query, grad_key, grad_value};
  }
  const at::Tensor delta = at::empty_like(logsumexp);
  dispatch_tokens(q, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    constexpr int kWidth = decltype(width)::value;
    const Backward<T> to{Rows<const T>(d_out),
                         Rows<const T>(q),
                         Rows<const T>(k),
                         Rows<const T>(v),
                         group.const_data_ptr<int>(),
                         index.const_data_ptr<int>(),
                         Rows<const T>(o),
                         logsumexp.const_data_ptr<float>(),
                         Rows<T>(grad_query),
                         Rows<T>(grad_key),
                         Rows<T>(grad_value),
                         Sizes(query, G, K),
                         static_cast<float>(scale)};
    const int warps = block_warps<T, kWidth>(L, G);
    // Long rows of queries are cut so that one large group keeps all busy.
    const int64_t size = std::max(kMinPart, ceil_div(L, 512) * 16);
    const SortedQueries sorted = sort_queries(group, G, 16 * warps, size);
    const int* order = sorted.order.const_data_ptr<int>();
    dispatch_block<T, kWidth>(warps, K, [&](auto block, auto stage) {
      constexpr int kWarps = decltype(block)::value;
      constexpr int kKeys = decltype(stage)::value;
      launch(grad_query_kernel<T, kWidth, kWarps, kKeys>,
             grid_of_heads(sorted.tiles.size(2), query), 32 * kWarps,
             (K > kKeys ? 4 : 2) * kKeys * kWidth * sizeof(T), to, order,
             static_cast<const int4*>(sorted.tiles.const_data_ptr()),
             delta.mutable_data_ptr<float>());
    });

    const int64_t tiles = sorted.parts.size(2);
    const int64_t key_blocks = ceil_div(K, kKeyWarps * 16 * kWarpTiles<T, kWidth>);
    const at::Tensor parts =
        at::empty({query.size(0), query.size(1), tiles, K, 2, D},
                  query.options().dtype(
                      std::is_same_v<Part<T>, float> ? at::kFloat : query.scalar_type()));
    launch(grad_key_kernel<T, kWidth>, grid_of_heads(tiles * key_blocks, query),
           32 * kKeyWarps, 0, to, order,
           static_cast<const int4*>(sorted.parts.const_data_ptr()),
           delta.const_data_ptr<float>(), static_cast<Part<T>*>(parts.data_ptr()),
           static_cast<int>(tiles));
    const SortedChoices choices = sort_choices(index, L);
    launch(sum_parts_kernel<T>, grid_of_heads(ceil_div(L, kSumTokens), query),
           kSumThreads, 0, to, static_cast<const Part<T>*>(parts.data_ptr()),
           sorted.offsets.const_data_ptr<int>(), choices.begins.const_data_ptr<int>(),
           static_cast<const int2*>(choices.choosers.const_data_ptr()),
           static_cast<int>(size), static_cast<int>(tiles));
  });
  return {grad_query, grad_key, grad_value};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> choose_and_attend_backward_cuda(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& group, const at::Tensor& masks,
    const at::Tensor& out, const at::Tensor& logsumexp, double scale) {
  const c10::DeviceGuard guard(query.device());
  at::Tensor grad_query = empty_heads_last(query);
  at::Tensor grad_key = empty_heads_last(query);
  at::Tensor grad_value = empty_heads_last(query);
  if (group.numel() > 0) {
    masked_attention_backward(aligned_rows(grad_out), aligned_rows(query),
                              aligned_rows(key), aligned_rows(value), group, masks,
                              aligned_rows(out), logsumexp, scale, true, grad_query,
                              grad_key, grad_value);
  }
  return {grad_query, grad_key, grad_value};
}

}  // namespace mmdgt::cuda
