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
template <typename T, int D>
__global__ void __launch_bounds__(256, D == 32 ? 2 : 1)
    grad_query_kernel(Rows<const T> grad_out, Rows<const T> query,
                      Rows<const T> key, Rows<const T> value, Rows<const T> out,
                      const int* __restrict__ order,
                      const int* __restrict__ offsets,
                      const int* __restrict__ index,
                      const float* __restrict__ logsumexp,
                      float* __restrict__ delta_out, Rows<T> grad_query,
                      int64_t num_tokens, int num_groups, int num_keys, int dim,
                      float scale, int tiles) {
  constexpr int kKeys = kStageKeys<T, D>;
  constexpr int kStageBytes = kKeys * D * sizeof(T);
  extern __shared__ __align__(128) char shared[];
  const int bh = blockIdx.x / tiles;
  const QueryTile tile =
      find_tile(offsets + static_cast<int64_t>(bh) * (num_groups + 1), num_groups,
                blockIdx.x % tiles, blockDim.x / 2);
  if (tile.begin == tile.end) return;
  index += (static_cast<int64_t>(bh) * num_groups + tile.group) * num_keys;

  const auto stage_keys = [&](int stage) {
    return SharedRows<T, D>(shared + (stage % 2) * 2 * kStageBytes);
  };
  const auto stage_values = [&](int stage) {
    return SharedRows<T, D>(shared + ((stage % 2) * 2 + 1) * kStageBytes);
  };
  const auto gather = [&](int stage) {
    const int first = stage * kKeys, count = min(num_keys - first, kKeys);
    gather_keys(stage_keys(stage), stage_values(stage), key.head(bh),
                value.head(bh), key.token_stride, value.token_stride,
                index + first, count, (count + 15) / 16 * 16, dim, num_tokens);
    commit_copies();
  };
  gather(0);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const bool active = tile.begin + 16 * warp < tile.end;
  const float scale_log2 = scale * kLog2E;
  int token[2];
  float lse_log2[2], delta[2];
  RowFragment<T, D> q[2], d_out[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int place = tile.begin + 16 * warp + 8 * half + lane / 4;
    token[half] = place < tile.end ? order[bh * num_tokens + place] : -1;
    lse_log2[half] = 0.f;
    delta[half] = 0.f;
    q[half].clear();
    d_out[half].clear();
    if (token[half] >= 0) {
      RowFragment<T, D> o;
      q[half].load(query.row(bh, token[half]), dim);
      d_out[half].load(grad_out.row(bh, token[half]), dim);
      o.load(out.row(bh, token[half]), dim);
      lse_log2[half] = logsumexp[bh * num_tokens + token[half]] * kLog2E;
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        const float2 a = unpack<T>(d_out[half].x[i / 4][i % 4]);
        const float2 b = unpack<T>(o.x[i / 4][i % 4]);
        delta[half] += a.x * b.x + a.y * b.y;
      }
    }
    delta[half] = quad_sum(delta[half]);
    if (token[half] >= 0 && lane % 4 == 0) {
      delta_out[bh * num_tokens + token[half]] = delta[half];
    }
  }

  float d_query[D / 8][4] = {};
  const int stages = (num_keys + kKeys - 1) / kKeys;
  for (int stage = 0; stage < stages; ++stage) {
    if (stage + 1 < stages) {
      gather(stage + 1);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();
    if (active) {
      const SharedRows<T, D> keys = stage_keys(stage), values = stage_values(stage);
      const int count = min(num_keys - stage * kKeys, kKeys);
      for (int first = 0; first < count; first += 16) {
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
            const float p = exp2_approx(s[n][i] * scale_log2 - lse_log2[i / 2]);
            s[n][i] = p * (dp[n][i] - delta[i / 2]);
          }
          if (first + 8 * n + 8 > count) {  // columns without a key
#pragma unroll
            for (int i = 0; i < 4; ++i) {
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
    }
    __syncthreads();
  }
  if (!active) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* row = token[half] >= 0 ? grad_query.row(bh, token[half]) : nullptr;
    store_row<T, D>(d_query, half, scale, row, dim);
  }
}

// Queries whose gradient of dK and dV one block sums, and those it holds in one of
// its two stages of shared memory.
constexpr int64_t kMinPart = 512;
template <typename T, int D>
constexpr int kStageQueries = D * sizeof(T) == 64 ? 64 : D * sizeof(T) == 128 ? 32
                                                                              : 16;
// Tiles of 16 keys that a warp holds in registers, and warps of a block.
template <typename T, int D>
constexpr int kWarpTiles = D * sizeof(T) == 64 ? 2 : 1;
constexpr int kKeyWarps = 4;

// dV = P^T dO and dK = scale * dS^T Q for the queries of one tile, which may be a
// whole group: parts (BH,tiles,K,2,D), dK before dV.
template <typename T, int D>
__global__ void __launch_bounds__(32 * kKeyWarps)
    grad_key_kernel(Rows<const T> grad_out, Rows<const T> query,
                    Rows<const T> key, Rows<const T> value,
                    const int* __restrict__ order,
                    const int* __restrict__ offsets,
                    const int* __restrict__ index,
                    const float* __restrict__ logsumexp,
                    const float* __restrict__ delta, T* __restrict__ parts,
                    int64_t num_tokens, int num_groups, int num_keys, int dim,
                    float scale, int size, int tiles, int key_blocks) {
  constexpr int kQueries = kStageQueries<T, D>;
  constexpr int kTiles = kWarpTiles<T, D>;
  constexpr int kChunks = SharedRows<T, D>::kChunks;
  constexpr int kStageBytes = kQueries * D * sizeof(T);
  __shared__ __align__(128) char shared[4 * kStageBytes];
  __shared__ float2 statistic[2][kQueries];  // logsumexp * log2(e), delta
  const int key_block = blockIdx.x % key_blocks;
  const int tile_number = blockIdx.x / key_blocks % tiles;
  const int bh = blockIdx.x / key_blocks / tiles;
  const QueryTile tile =
      find_tile(offsets + static_cast<int64_t>(bh) * (num_groups + 1), num_groups,
                tile_number, size);
  if (tile.begin == tile.end) return;
  index += (static_cast<int64_t>(bh) * num_groups + tile.group) * num_keys;
  order += bh * num_tokens;
  logsumexp += bh * num_tokens;
  delta += bh * num_tokens;

  const auto stage_query = [&](int stage) {
    return SharedRows<T, D>(shared + (stage % 2) * 2 * kStageBytes);
  };
  const auto stage_grad = [&](int stage) {
    return SharedRows<T, D>(shared + ((stage % 2) * 2 + 1) * kStageBytes);
  };
  const auto gather = [&](int stage) {
    const int first = tile.begin + stage * kQueries;
    const int count = min(tile.end - first, kQueries);
    const int rows = (count + 15) / 16 * 16;
    for (int i = threadIdx.x; i < rows * kChunks; i += blockDim.x) {
      const int row = i / kChunks, chunk = i % kChunks;
      const bool exists = row < count;
      const bool valid =
          exists && chunk * SharedRows<T, D>::kChunkElements < dim;
      const int64_t token = exists ? order[first + row] : 0;
      stage_query(stage).copy_async(row, chunk, query.row(bh, token), valid);
      stage_grad(stage).copy_async(row, chunk, grad_out.row(bh, token), valid);
      if (chunk == 0) {
        // Rows without a query get the probability 0.
        statistic[stage % 2][row] =
            exists ? make_float2(logsumexp[token] * kLog2E, delta[token])
                   : make_float2(INFINITY, 0.f);
      }
    }
    commit_copies();
  };
  gather(0);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  const int first_key = (key_block * warps + warp) * 16 * kTiles;
  const bool active = first_key < num_keys;
  const float scale_log2 = scale * kLog2E;
  RowFragment<T, D> k[kTiles][2], v[kTiles][2];
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int place = first_key + 8 * i + lane / 4;
    k[i / 2][i % 2].clear();
    v[i / 2][i % 2].clear();
    if (place < num_keys) {
      const int64_t token = index[place];
      CUDA_KERNEL_ASSERT(token >= 0 && token < num_tokens);
      k[i / 2][i % 2].load(key.row(bh, token), dim);
      v[i / 2][i % 2].load(value.row(bh, token), dim);
    }
  }

  float d_key[kTiles][D / 8][4] = {}, d_value[kTiles][D / 8][4] = {};
  const int stages = (tile.end - tile.begin + kQueries - 1) / kQueries;
  for (int stage = 0; stage < stages; ++stage) {
    if (stage + 1 < stages) {
      gather(stage + 1);
      wait_for_copies<1>();
    } else {
      wait_for_copies<0>();
    }
    __syncthreads();
    if (active) {
      const SharedRows<T, D> queries = stage_query(stage);
      const SharedRows<T, D> grads = stage_grad(stage);
      const int count = min(tile.end - tile.begin - stage * kQueries, kQueries);
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
              p[m][n][i] = exp2_approx(p[m][n][i] * scale_log2 - own.x);
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
  parts += (static_cast<int64_t>(bh) * tiles + tile_number) * num_keys * 2 * dim;
#pragma unroll
  for (int i = 0; i < 2 * kTiles; ++i) {
    const int place = first_key + 8 * i + lane / 4;
    T* row = place < num_keys ? parts + static_cast<int64_t>(place) * 2 * dim : nullptr;
    store_row<T, D>(d_key[i / 2], i % 2, scale, row, dim);
    store_row<T, D>(d_value[i / 2], i % 2, 1.f, row != nullptr ? row + dim : row,
                    dim);
  }
}

constexpr int kSumThreads = 256;  // at least the number of groups
constexpr int kWindow = 256;      // tokens of a block
constexpr int kMaxEntries = 4096; // that fit its list; a token has at most G

// Sums the parts of every key. A block lists who chose the tokens of its window,
// token by token, in the order of groups.
template <typename T>
__global__ void __launch_bounds__(kSumThreads)
    sum_parts_kernel(const T* __restrict__ parts, const int* __restrict__ offsets,
                     const int* __restrict__ index, Rows<T> grad_key,
                     Rows<T> grad_value, int64_t num_tokens, int num_groups,
                     int num_keys, int dim, int size, int tiles, int windows) {
  __shared__ int begin[kWindow + 1];  // of a token's entries, counted over all
  __shared__ int next[kWindow];
  __shared__ int entries[kMaxEntries];  // group * K + place in its row of index
  __shared__ int first_tile[kSumThreads + 1];
  const int bh = blockIdx.x / windows;
  const int first = blockIdx.x % windows * kWindow;
  const int count = static_cast<int>(min(num_tokens - first, int64_t{kWindow}));
  const int num_entries = num_groups * num_keys;
  index += static_cast<int64_t>(bh) * num_entries;

  next[threadIdx.x] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < num_entries; i += kSumThreads) {
    const unsigned token = index[i] - first;
    if (token < count) atomicAdd(&next[token], 1);
  }
  int own_tiles = 0;
  if (threadIdx.x < num_groups) {
    const int* offset = offsets + static_cast<int64_t>(bh) * (num_groups + 1);
    own_tiles = (offset[threadIdx.x + 1] - offset[threadIdx.x] + size - 1) / size;
  }
  __syncthreads();
  // Two running sums over the threads: entries of a token, tiles of a group.
  begin[threadIdx.x + 1] = next[threadIdx.x];
  first_tile[threadIdx.x + 1] = own_tiles;
  if (threadIdx.x == 0) begin[0] = first_tile[0] = 0;
  __syncthreads();
  for (int step = 1; step < kSumThreads; step *= 2) {
    const int at = threadIdx.x + 1;
    const int a = at > step ? begin[at - step] : 0;
    const int b = at > step ? first_tile[at - step] : 0;
    __syncthreads();
    begin[at] += a;
    first_tile[at] += b;
    __syncthreads();
  }

  constexpr int kElements = 16 / sizeof(T);
  const int vectors = 2 * dim / kElements;
  const T* own_parts = parts + static_cast<int64_t>(bh) * tiles * num_keys * 2 * dim;
  // As many tokens at a time as the list has room for; nearly always all.
  for (int from = 0; from < count;) {
    int to = count;
    while (to > from + 1 && begin[to] - begin[from] > kMaxEntries) --to;
    if (threadIdx.x >= from && threadIdx.x < to) {
      next[threadIdx.x] = begin[threadIdx.x] - begin[from];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_entries; i += kSumThreads) {
      const int token = index[i] - first;
      if (token >= from && token < to) {
        const int place = atomicAdd(&next[token], 1);
        CUDA_KERNEL_ASSERT(place < kMaxEntries);  // a row named a token twice
        entries[place] = i;
      }
    }
    __syncthreads();
    if (threadIdx.x >= from && threadIdx.x < to) {
      // The atomics left a token's entries in any order.
      int* own = entries + begin[threadIdx.x] - begin[from];
      const int n = begin[threadIdx.x + 1] - begin[threadIdx.x];
      for (int i = 1; i < n; ++i) {
        const int entry = own[i];
        int j = i;
        for (; j > 0 && own[j - 1] > entry; --j) own[j] = own[j - 1];
        own[j] = entry;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < (to - from) * vectors; i += kSumThreads) {
      const int token = from + i / vectors, vector = i % vectors;
      float sum[kElements] = {};
      for (int e = begin[token]; e < begin[token + 1]; ++e) {
        const int entry = entries[e - begin[from]];
        const int g = entry / num_keys, place = entry % num_keys;
        for (int t = first_tile[g]; t < first_tile[g + 1]; ++t) {
          const uint4 words = __ldg(
              reinterpret_cast<const uint4*>(
                  own_parts + (static_cast<int64_t>(t) * num_keys + place) * 2 * dim) +
              vector);
          const auto* pairs = reinterpret_cast<const Pair<T>*>(&words);
#pragma unroll
          for (int x = 0; x < kElements / 2; ++x) {
            const float2 pair = unpack<T>(pairs[x]);
            sum[2 * x] += pair.x;
            sum[2 * x + 1] += pair.y;
          }
        }
      }
      Pair<T> result[kElements / 2];
#pragma unroll
      for (int x = 0; x < kElements / 2; ++x) {
        result[x] = pack<T>(sum[2 * x], sum[2 * x + 1]);
      }
      T* row = vector < vectors / 2 ? grad_key.row(bh, first + token)
                                    : grad_value.row(bh, first + token);
      reinterpret_cast<uint4*>(row)[vector % (vectors / 2)] =
          *reinterpret_cast<const uint4*>(result);
    }
    __syncthreads();
    from = to;
  }
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> group_attention_backward_cuda(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& group, const at::Tensor& index,
    const at::Tensor& out, const at::Tensor& logsumexp, double scale) {
  const c10::cuda::CUDAGuard guard(query.device());
  const int64_t heads = query.size(0) * query.size(1), L = query.size(2);
  const int64_t D = query.size(3), G = index.size(2), K = index.size(3);
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
  const SortedQueries sorted = sort_queries(group, G);
  const at::Tensor delta = at::empty_like(logsumexp);
  const int* order = sorted.order.const_data_ptr<int>();
  const int* offsets = sorted.offsets.const_data_ptr<int>();
  const int groups = static_cast<int>(G), keys = static_cast<int>(K);
  const int dim = static_cast<int>(D);
  dispatch_tokens(q, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    constexpr int kWidth = decltype(width)::value;
    const int warps = attention_warps(L, G);
    const int64_t query_tiles = max_tiles(L, G, 16 * warps);
    const int stages = K > kStageKeys<T, kWidth> ? 2 : 1;
    launch(grad_query_kernel<T, kWidth>, heads * query_tiles, 32 * warps,
           stages * 2 * kStageKeys<T, kWidth> * kWidth * sizeof(T),
           Rows<const T>(d_out), Rows<const T>(q), Rows<const T>(k),
           Rows<const T>(v), Rows<const T>(o), order, offsets,
           index.const_data_ptr<int>(), logsumexp.const_data_ptr<float>(),
           delta.mutable_data_ptr<float>(), Rows<T>(grad_query), L, groups, keys,
           dim, static_cast<float>(scale), static_cast<int>(query_tiles));

    // Long rows of queries are cut so that one large group keeps all busy.
    const int64_t size = std::max(kMinPart, ceil_div(L, 512) * 16);
    const int64_t tiles = max_tiles(L, G, size);
    const int64_t warp_keys = 16 * kWarpTiles<T, kWidth>;
    const int64_t key_warps = std::min<int64_t>(kKeyWarps, ceil_div(K, warp_keys));
    const int64_t key_blocks = ceil_div(K, key_warps * warp_keys);
    const at::Tensor parts = at::empty({heads, tiles, K, 2, D}, query.options());
    launch(grad_key_kernel<T, kWidth>, heads * tiles * key_blocks,
           static_cast<int>(32 * key_warps), 0, Rows<const T>(d_out),
           Rows<const T>(q), Rows<const T>(k), Rows<const T>(v), order, offsets,
           index.const_data_ptr<int>(), logsumexp.const_data_ptr<float>(),
           delta.const_data_ptr<float>(), static_cast<T*>(parts.data_ptr()), L,
           groups, keys, dim, static_cast<float>(scale), static_cast<int>(size),
           static_cast<int>(tiles), static_cast<int>(key_blocks));

    const int64_t windows = ceil_div(L, kWindow);
    launch(sum_parts_kernel<T>, heads * windows, kSumThreads, 0,
           static_cast<const T*>(parts.data_ptr()), offsets,
           index.const_data_ptr<int>(), Rows<T>(grad_key), Rows<T>(grad_value), L,
           groups, keys, dim, static_cast<int>(size), static_cast<int>(tiles),
           static_cast<int>(windows));
  });
  return {grad_query, grad_key, grad_value};
}

}  // namespace

REGISTER_DEVICE_IMPL(group_attention_backward_impl, CUDA,
                     group_attention_backward_cuda);

}  // namespace mmdgt
