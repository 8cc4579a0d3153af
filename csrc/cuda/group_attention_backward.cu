// Group attention, backward. The probabilities are recomputed from the logsumexp,
// once for dQ, query by query, and once for dK and dV, key by key. A key may serve
// several groups: each leaves its part of dK and dV in a buffer, and a last kernel
// sums a key's parts in a fixed order, so no atomics touch the gradients.
#include "../dynamic_group_attention.h"
#include "attention.cuh"
#include "masked_attention.h"
#include "sort_queries.h"

namespace mmdgt {
namespace {

// dQ = scale * dS K with dS = P * (dP - delta), dP = dO V^T, delta = rowsum(dO * O).
// Blocks as in the forward pass. delta (B,H,L) is kept for the other kernel.
template <typename T, int D, int kWarps, int kKeys>
__global__ void __launch_bounds__(32 * kWarps, D * sizeof(T) > 64 ? 1 : 16 / kWarps)
    grad_query_kernel(Rows<const T> grad_out, Rows<const T> query, Rows<const T> key,
                      Rows<const T> value, Rows<const T> out,
                      const int* __restrict__ order, const int4* __restrict__ tiles,
                      const int* __restrict__ index, const float* __restrict__ logsumexp,
                      float* __restrict__ delta_out, Rows<T> grad_query, int num_tokens,
                      int num_groups, int num_keys, int dim, float scale) {
  char* shared = dynamic_shared();
  const auto [group, begin, end, unused] = tiles[own_head() * gridDim.x + blockIdx.x];
  if (begin == end) return;
  order += own_head() * num_tokens;
  logsumexp += own_head() * num_tokens;
  delta_out += own_head() * num_tokens;

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
      key.head(),
      value.head(),
      key.token_stride,
      value.token_stride,
      index + (own_head() * num_groups + group) * num_keys,
      num_keys,
      num_tokens,
      dim};
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
      q[half].load(query.row(query.head(), token[half]), dim);
      d_out[half].load(grad_out.row(grad_out.head(), token[half]), dim);
      o[half].load(out.row(out.head(), token[half]), dim);
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

  const float scale_log2 = scale * kLog2E;
  float d_query[D / 8][4] = {};
  pipeline.run([&](int stage) {
    if (!active) return;
    const SharedRows<T, D> keys = pipeline.keys(stage);
    const SharedRows<T, D> values = pipeline.values(stage);
    const int count = num_keys - stage * kKeys;
#pragma unroll(sizeof(T) == 2 ? kKeys / 16 : 1)
    for (int first = 0; first < kKeys; first += 16) {
      float s[2][4] = {}, dp[2][4] = {};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const RowFragment<T, D> k = keys.load_row(first + 8 * n + lane / 4);
        const RowFragment<T, D> v = values.load_row(first + 8 * n + lane / 4);
#pragma unroll
        for (int step = 0; step < D / 16; ++step) {
          mma(s[n], operand_a(q[0], q[1], step), k.operand_b(step));
          mma(dp[n], operand_a(d_out[0], d_out[1], step), v.operand_b(step));
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
    T* row = token[half] >= 0 ? grad_query.row(grad_query.head(), token[half]) : nullptr;
    store_row<T, D>(d_query, half, scale, row, dim);
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

// dV = P^T dO and dK = scale * dS^T Q for the queries of one tile, which may be a
// whole group: parts (B,H,tiles,K,2,D), dK before dV.
template <typename T, int D>
__global__ void __launch_bounds__(32 * kKeyWarps)
    grad_key_kernel(Rows<const T> grad_out, Rows<const T> query, Rows<const T> key,
                    Rows<const T> value, const int* __restrict__ order,
                    const int4* __restrict__ tiles, const int* __restrict__ index,
                    const float* __restrict__ logsumexp, const float* __restrict__ delta,
                    T* __restrict__ parts, int num_tokens, int num_groups, int num_keys,
                    int dim, float scale, int num_tiles) {
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
  index += (own_head() * num_groups + group) * num_keys;
  order += own_head() * num_tokens + begin;
  logsumexp += own_head() * num_tokens;
  delta += own_head() * num_tokens;
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
    gather.look_up(order + stage * kQueries, count, num_tokens - 1);
    const int own = threadIdx.x;
    own_token = own < min(count, kQueries) ? order[stage * kQueries + own] : -1;
  };
  const auto copy = [&](int stage) {
    gather.copy(stage_query(stage), query.head(), query.token_stride, dim);
    gather.copy(stage_grad(stage), grad_out.head(), grad_out.token_stride, dim);
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
  const bool active = first_key < num_keys;
  const float scale_log2 = scale * kLog2E;
  int own_key[2 * kTiles];
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int place = first_key + 8 * i + lane / 4;
    own_key[i] = place < num_keys ? min(index[place], num_tokens - 1) : -1;
  }
  copy(0);
  look_up(1);
  RowFragment<T, D> k[kTiles][2], v[kTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    k[i / 2][i % 2].clear();
    v[i / 2][i % 2].clear();
    if (own_key[i] >= 0) {
      k[i / 2][i % 2].load(key.row(key.head(), own_key[i]), dim);
      v[i / 2][i % 2].load(value.row(value.head(), own_key[i]), dim);
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
          const RowFragment<T, D> q = queries.load_row(row + lane / 4);
          const RowFragment<T, D> g = grads.load_row(row + lane / 4);
          const float2 even = statistic[stage % 2][row + 2 * (lane % 4)];
          const float2 odd = statistic[stage % 2][row + 2 * (lane % 4) + 1];
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int step = 0; step < D / 16; ++step) {
              mma(p[m][n], operand_a(k[m][0], k[m][1], step), q.operand_b(step));
              mma(ds[m][n], operand_a(v[m][0], v[m][1], step), g.operand_b(step));
            }
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
  parts += tile * num_keys * 2 * dim;
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int place = first_key + 8 * i + lane / 4;
    T* row = place < num_keys ? parts + place * 2 * dim : nullptr;
    store_row<T, D>(d_key[i / 2], i % 2, scale, row, dim);
    store_row<T, D>(d_value[i / 2], i % 2, 1.f, row != nullptr ? row + dim : row, dim);
  }
}

constexpr int kSumThreads = 256;  // at least the number of groups
constexpr int kWindow = 256;      // tokens of a block
constexpr int kMaxListed = 4096;  // parts; those of one token always fit

// Sums the parts of every key. A block lists the parts of the tokens of its window,
// token by token, in the order of tiles and thus of groups.
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    sum_parts_kernel(const T* __restrict__ parts, const int* __restrict__ offsets,
                     const int* __restrict__ index, Rows<T> grad_key, Rows<T> grad_value,
                     int num_tokens, int num_groups, int num_keys, int dim, int size,
                     int num_tiles) {
  __shared__ int begin[kWindow + 1];  // of a token's parts, counted over all
  __shared__ int next[kWindow];
  __shared__ int list[kMaxListed];  // tile * K + place
  __shared__ int first_tile[kSumThreads + 1];
  const int first = blockIdx.x * kWindow;
  const int count = min(num_tokens - first, kWindow);
  const int num_entries = num_groups * num_keys;
  index += own_head() * num_entries;

  // Running sums over the threads; own values at own place + 1.
  const auto accumulate = [&](int* values) {
    for (int step = 1; step < kSumThreads; step *= 2) {
      const int at = threadIdx.x + 1;
      const int other = at > step ? values[at - step] : 0;
      __syncthreads();
      values[at] += other;
      __syncthreads();
    }
  };
  // Calls use(token, group, place) for all choices of tokens from..to.
  const auto for_choices = [&](int from, int to, auto&& use) {
    constexpr int kBatch = 8;  // loads under way at once
    for (int i = threadIdx.x; i < num_entries; i += kBatch * kSumThreads) {
      int token[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int at = i + j * kSumThreads;
        token[j] = at < num_entries ? index[at] - first : -1;
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (token[j] < from || token[j] >= to) continue;
        const int at = i + j * kSumThreads;
        use(token[j], at / num_keys, at % num_keys);
      }
    }
  };

  next[threadIdx.x] = 0;
  first_tile[threadIdx.x + 1] = 0;
  if (threadIdx.x < num_groups) {
    const int* offset = offsets + own_head() * (num_groups + 1);
    const int queries = offset[threadIdx.x + 1] - offset[threadIdx.x];
    first_tile[threadIdx.x + 1] = (queries + size - 1) / size;
  }
  if (threadIdx.x == 0) begin[0] = first_tile[0] = 0;
  __syncthreads();
  accumulate(first_tile);
  for_choices(0, count, [&](int token, int g, int) {
    atomicAdd(&next[token], first_tile[g + 1] - first_tile[g]);
  });
  __syncthreads();
  begin[threadIdx.x + 1] = next[threadIdx.x];
  __syncthreads();
  accumulate(begin);

  constexpr int kElements = 16 / sizeof(T);
  const int vectors = 2 * dim / kElements;  // of a part
  const int tokens_at_once = kSumThreads / vectors;
  const int own_row = threadIdx.x / vectors, vector = threadIdx.x % vectors;
  const bool for_key = vector < vectors / 2;
  const int64_t stride = for_key ? grad_key.token_stride : grad_value.token_stride;
  T* target = (for_key ? grad_key.head() : grad_value.head()) +
              (for_key ? vector : vector - vectors / 2) * kElements;
  parts += own_head() * num_tiles * num_keys * 2 * dim + vector * kElements;
  // As many tokens at a time as the list has room for; nearly always all.
  for (int from = 0; from < count;) {
    int to = count;
    while (to > from + 1 && begin[to] - begin[from] > kMaxListed) --to;
    const bool own = threadIdx.x >= from && threadIdx.x < to;
    if (own) next[threadIdx.x] = begin[threadIdx.x] - begin[from];
    __syncthreads();
    for_choices(from, to, [&](int token, int g, int place) {
      const int tiles_of_group = first_tile[g + 1] - first_tile[g];
      const int at = atomicAdd(&next[token], tiles_of_group);
      // A row that names a token twice could overflow.
      for (int t = 0; t < min(tiles_of_group, kMaxListed - at); ++t) {
        list[at + t] = (first_tile[g] + t) * num_keys + place;
      }
    });
    __syncthreads();
    if (own) {
      // The atomics left a token's parts in any order.
      int* listed = list + begin[threadIdx.x] - begin[from];
      const int n = begin[threadIdx.x + 1] - begin[threadIdx.x];
      for (int i = 1; i < n; ++i) {
        const int part = listed[i];
        int j = i;
        for (; j > 0 && listed[j - 1] > part; --j) listed[j] = listed[j - 1];
        listed[j] = part;
      }
    }
    __syncthreads();
    for (int token = from + own_row; token < to && own_row < tokens_at_once;
         token += tokens_at_once) {
      const int* listed = list + begin[token] - begin[from];
      const int n = begin[token + 1] - begin[token];
      float sum[kElements] = {};
      for (int e = 0; e < n; e += 4) {
        uint4 words[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (e + j >= n) continue;
          words[j] = __ldg(reinterpret_cast<const uint4*>(
              parts + static_cast<uint64_t>(listed[e + j]) * (2u * dim)));
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (e + j >= n) continue;
          const auto* pairs = reinterpret_cast<const Pair<T>*>(&words[j]);
#pragma unroll
          for (int x = 0; x < kElements / 2; ++x) {
            const float2 pair = unpack<T>(pairs[x]);
            sum[2 * x] += pair.x;
            sum[2 * x + 1] += pair.y;
          }
        }
      }
      uint4 result;
      auto* pairs = reinterpret_cast<Pair<T>*>(&result);
#pragma unroll
      for (int x = 0; x < kElements / 2; ++x) {
        pairs[x] = pack<T>(sum[2 * x], sum[2 * x + 1]);
      }
      *reinterpret_cast<uint4*>(target + (first + token) * stride) = result;
    }
    __syncthreads();
    from = to;
  }
}

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
    masked_attention_backward(d_out, q, k, v, group, index, o, logsumexp, scale,
                              grad_query, grad_key, grad_value);
    return {grad_query, grad_key, grad_value};
  }
  const at::Tensor delta = at::empty_like(logsumexp);
  const int tokens = static_cast<int>(L), groups = static_cast<int>(G);
  const int keys = static_cast<int>(K), dim = static_cast<int>(D);
  dispatch_tokens(q, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    constexpr int kWidth = decltype(width)::value;
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
             (K > kKeys ? 4 : 2) * kKeys * kWidth * sizeof(T), Rows<const T>(d_out),
             Rows<const T>(q), Rows<const T>(k), Rows<const T>(v), Rows<const T>(o),
             order, static_cast<const int4*>(sorted.tiles.const_data_ptr()),
             index.const_data_ptr<int>(), logsumexp.const_data_ptr<float>(),
             delta.mutable_data_ptr<float>(), Rows<T>(grad_query), tokens, groups, keys,
             dim, static_cast<float>(scale));
    });

    const int64_t tiles = sorted.parts.size(2);
    const int64_t key_blocks = ceil_div(K, kKeyWarps * 16 * kWarpTiles<T, kWidth>);
    const at::Tensor parts =
        at::empty({query.size(0), query.size(1), tiles, K, 2, D}, query.options());
    launch(grad_key_kernel<T, kWidth>, grid_of_heads(tiles * key_blocks, query),
           32 * kKeyWarps, 0, Rows<const T>(d_out), Rows<const T>(q), Rows<const T>(k),
           Rows<const T>(v), order,
           static_cast<const int4*>(sorted.parts.const_data_ptr()),
           index.const_data_ptr<int>(), logsumexp.const_data_ptr<float>(),
           delta.const_data_ptr<float>(), static_cast<T*>(parts.data_ptr()), tokens,
           groups, keys, dim, static_cast<float>(scale), static_cast<int>(tiles));
    launch(sum_parts_kernel<T>, grid_of_heads(ceil_div(L, kWindow), query), kSumThreads,
           0, static_cast<const T*>(parts.data_ptr()),
           sorted.offsets.const_data_ptr<int>(), index.const_data_ptr<int>(),
           Rows<T>(grad_key), Rows<T>(grad_value), tokens, groups, keys, dim,
           static_cast<int>(size), static_cast<int>(tiles));
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace

REGISTER_KERNELS(group_attention_backward_impl, group_attention_backward_cuda);

}  // namespace mmdgt
