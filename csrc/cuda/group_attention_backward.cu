// Group attention, backward. The probabilities are recomputed from the logsumexp, once.
// A key may serve several groups: each leaves its part of dK and dV in a buffer, and a
// last kernel sums a key's parts in a fixed order, so no atomics touch the gradients.
#include <ATen/ops/empty_like.h>

#include "attention.cuh"
#include "kernels.h"
#include "masked_attention.h"
#include "sort_queries.h"

namespace mmdgt::cuda {
namespace {

// What a part of dK and dV is kept in: float16 could overflow before the sum.
template <typename T>
using Part = std::conditional_t<std::is_same_v<T, __half>, float, T>;

// What a block of attend_backward_kernel holds at a time, and where in shared memory.
template <typename T, int D>
struct BackwardBlock {
  static constexpr int kRowBytes = D * sizeof(T);
  static constexpr int kWarps = kRowBytes > 256 ? 2 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpTiles = kRowBytes == 64 ? 2 : 1;  // of 16 keys
  static constexpr int kKeys = 16 * kWarpTiles * kWarps;      // of a chunk
  static constexpr int kQueries = kRowBytes == 64 ? 64
                                  : kRowBytes == 128 || sizeof(T) == 2
                                      ? 32
                                      : 16;  // of a stage
  // Whether a warp has its keys and values in registers: wide ones do not fit.
  static constexpr bool kKeepsKeys = kRowBytes <= 128;
  static constexpr int kStageBytes = kQueries * kRowBytes;
  static constexpr int kKeyBytes = kKeys * kRowBytes;
  static constexpr int kScoreBytes =
      std::max<int>(kKeys * kQueries * sizeof(T), kKeepsKeys ? kKeyBytes : 0);
  static constexpr int kBytes = 5 * kStageBytes + (kKeepsKeys ? 1 : 2) * kKeyBytes +
                                kScoreBytes + 3 * kQueries * sizeof(float);

  char* base;
  // Two stages of queries and their gradients, one of outputs.
  __device__ __forceinline__ SharedRows<T, D> queries(int stage) const {
    return SharedRows<T, D>(base + stage % 2 * kStageBytes);
  }
  __device__ __forceinline__ SharedRows<T, D> grads(int stage) const {
    return SharedRows<T, D>(base + (2 + stage % 2) * kStageBytes);
  }
  __device__ __forceinline__ SharedRows<T, D> outputs() const {
    return SharedRows<T, D>(base + 4 * kStageBytes);
  }
  // dS^T of 16 queries of the stage, a row per key.
  __device__ __forceinline__ SharedRows<T, 16> grad_scores(int tile) const {
    return SharedRows<T, 16>(base + 5 * kStageBytes + tile * 16 * kKeys * sizeof(T));
  }
  __device__ __forceinline__ float2* statistic() const {  // lse * log2(e), delta
    return reinterpret_cast<float2*>(base + 5 * kStageBytes + kScoreBytes);
  }
  __device__ __forceinline__ float* logsumexp() const {  // of the next stage
    return reinterpret_cast<float*>(statistic() + kQueries);
  }
  __device__ __forceinline__ SharedRows<T, D> keys() const {
    return SharedRows<T, D>(logsumexp() + kQueries);
  }
  // Where dS^T comes later, if they go on in registers.
  __device__ __forceinline__ SharedRows<T, D> values() const {
    return SharedRows<T, D>(kKeepsKeys ? base + 5 * kStageBytes
                                       : base + kBytes - kKeyBytes);
  }
};

// The sum over D of dO * O of row `row`, of which this thread looks at one chunk, as do
// its neighbours.
template <typename T, int D>
__device__ __forceinline__ float row_product(const SharedRows<T, D>& a,
                                             const SharedRows<T, D>& b, int row) {
  constexpr int kChunks = SharedRows<T, D>::kChunks;
  const int chunk = threadIdx.x % kChunks;
  const uint4 left = ptx::load_shared_16_bytes(a.address(row, chunk));
  const uint4 right = ptx::load_shared_16_bytes(b.address(row, chunk));
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < static_cast<int>(16 / sizeof(Pair<T>)); ++i) {
    const float2 x = unpack<T>(reinterpret_cast<const Pair<T>*>(&left)[i]);
    const float2 y = unpack<T>(reinterpret_cast<const Pair<T>*>(&right)[i]);
    sum += x.x * y.x + x.y * y.y;
  }
#pragma unroll
  for (int step = 1; step < kChunks; step *= 2) {
    sum += __shfl_xor_sync(~0u, sum, step);
  }
  return sum;
}

// With S = scale * Q K^T, P = exp(S - logsumexp), dP = dO V^T, delta = rowsum(dO * O)
// and dS = P * (dP - delta):
//   dV = P^T dO,  dK = scale * dS^T Q,  dQ = scale * dS K.
// A block serves the queries of one tile, up to all of one group, and the group's keys
// chunk by chunk. Its warps share the keys: each holds dK and dV of its own in
// registers while the queries pass in stages, and leaves dS^T in shared memory. Then
// the warps share the queries of the stage for dQ. parts (B,H,tiles,K,2,D) get dK before
// dV; partial_query (B,H,L,D) has dQ from one chunk to the next.
template <typename T, int D>
__global__ void __launch_bounds__(BackwardBlock<T, D>::kThreads,
                                  D * sizeof(T) == 64 ? 3 : 1)
    attend_backward_kernel(Backward<T> to, const int* __restrict__ order,
                           const int4* __restrict__ tiles, float* partial_query,
                           Part<T>* __restrict__ parts) {
  using Block = BackwardBlock<T, D>;
  constexpr int kTiles = Block::kWarpTiles;
  constexpr int kQueries = Block::kQueries;
  const Sizes& sizes = to.sizes;
  const int64_t tile = own_head() * gridDim.x + blockIdx.x;
  const auto [group, begin, end, unused] = tiles[tile];
  if (begin == end) return;
  const Block memory{dynamic_shared()};
  const int* index = to.index + (own_head() * sizes.num_groups + group) * sizes.num_keys;
  const float* logsumexp = to.logsumexp + own_head() * sizes.num_tokens;
  order += own_head() * sizes.num_tokens + begin;
  parts += tile * sizes.num_keys * 2 * sizes.dim;
  const int num_queries = end - begin;
  const int stages = (num_queries + kQueries - 1) / kQueries;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float scale_log2 = to.scale * kLog2E;

  // Tokens are looked up one stage ahead, so that no copy waits for them. Rows without
  // a query become zero: whatever their probability, they add nothing.
  RowGather<T, D, Block::kThreads, kQueries> gather;
  const auto look_up = [&](int stage) {
    gather.look_up(order + stage * kQueries, num_queries - stage * kQueries,
                   sizes.num_tokens - 1);
  };
  const auto copy = [&](int stage) {
    gather.copy(memory.queries(stage), to.query.head(), to.query.token_stride, sizes.dim);
    gather.copy(memory.grads(stage), to.grad_out.head(), to.grad_out.token_stride,
                sizes.dim);
    gather.copy(memory.outputs(), to.out.head(), to.out.token_stride, sizes.dim);
    gather.each_row([&](int row, int token) {
      if (threadIdx.x % gather.kChunks != 0) return;
      ptx::copy_4_bytes_async(ptx::shared_address(memory.logsumexp() + row),
                              logsumexp + max(token, 0), token >= 0);
    });
    ptx::commit_copies();
  };

  const auto partial_row = [&](int token) {
    return partial_query + (own_head() * sizes.num_tokens + token) * sizes.dim;
  };

  for (int first_key = 0; first_key < sizes.num_keys; first_key += Block::kKeys) {
    const int num_keys = min(sizes.num_keys - first_key, Block::kKeys);  // of the chunk
    const bool first_chunk = first_key == 0;
    const bool last_chunk = first_key + Block::kKeys >= sizes.num_keys;
    const int own_key = 16 * kTiles * warp;
    if (!first_chunk) __syncthreads();  // the keys before may still be read
    look_up(0);
    RowGather<T, D, Block::kThreads, Block::kKeys> key_gather;
    key_gather.look_up(index + first_key, num_keys, sizes.num_tokens - 1);
    key_gather.copy(memory.keys(), to.key.head(), to.key.token_stride, sizes.dim);
    key_gather.copy(memory.values(), to.value.head(), to.value.token_stride, sizes.dim);
    copy(0);
    look_up(1);
    // Operands of the own keys and values, if they stay in registers.
    FragmentA<T> kept_k[kTiles][D / 32][2], kept_v[kTiles][D / 32][2];
    if constexpr (Block::kKeepsKeys) {
      ptx::wait_for_copies<0>();
      __syncthreads();
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int block = 0; block < D / 32; ++block) {
          memory.keys().load_operands(own_key + 16 * m, block, kept_k[m][block]);
          memory.values().load_operands(own_key + 16 * m, block, kept_v[m][block]);
        }
      }
      __syncthreads();
    }
    // dS is zero for keys that do not exist.
    const int missing = (num_keys + 15) / 16 * 16 - num_keys;
    for (int i = threadIdx.x; i < missing * kQueries / 2; i += Block::kThreads) {
      memory.grad_scores(i / 8 / missing)
          .store_pair(0, num_keys + i / 8 % missing, i % 8 * 2, pack<T>(0.f, 0.f));
    }

    float d_key[kTiles][D / 8][4] = {}, d_value[kTiles][D / 8][4] = {};
    for (int stage = 0; stage < stages; ++stage) {
      ptx::wait_for_copies<0>();
      gather.each_row([&](int row, int) {  // what this thread has copied itself
        const float delta = row_product(memory.grads(stage), memory.outputs(), row);
        if (threadIdx.x % gather.kChunks == 0) {
          memory.statistic()[row] = make_float2(memory.logsumexp()[row] * kLog2E, delta);
        }
      });
      if (stage + 1 < stages) {
        copy(stage + 1);
        look_up(stage + 2);
      }
      __syncthreads();
      const SharedRows<T, D> queries = memory.queries(stage), grads = memory.grads(stage);
      const int count = min(num_queries - stage * kQueries, kQueries);
      for (int first = 0; own_key < num_keys && first < count; first += 16) {
        float p[kTiles][2][4] = {}, ds[kTiles][2][4] = {};  // P^T, dS^T
#pragma unroll(Block::kRowBytes > 256 ? 1 : D / 32)
        for (int block = 0; block < D / 32; ++block) {
          FragmentB<T> q[2][2], g[2][2];
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            queries.load_operands(first + 8 * n, block, q[n]);
            grads.load_operands(first + 8 * n, block, g[n]);
          }
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            FragmentA<T> own_k[2], own_v[2];
            if constexpr (Block::kKeepsKeys) {
#pragma unroll
              for (int step = 0; step < 2; ++step) {
                own_k[step] = kept_k[m][block][step];
                own_v[step] = kept_v[m][block][step];
              }
            } else {
              memory.keys().load_operands(own_key + 16 * m, block, own_k);
              memory.values().load_operands(own_key + 16 * m, block, own_v);
            }
#pragma unroll
            for (int step = 0; step < 2; ++step) {
#pragma unroll
              for (int n = 0; n < 2; ++n) {
                mma(p[m][n], own_k[step], q[n][step]);
                mma(ds[m][n], own_v[step], g[n][step]);
              }
            }
          }
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float2* own = memory.statistic() + first + 8 * n + 2 * (lane % 4);
          const float2 statistic[2] = {own[0], own[1]};  // of the columns
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const auto [lse_log2, delta] = statistic[i % 2];
              p[m][n][i] = ptx::exp2_approx(p[m][n][i] * scale_log2 - lse_log2);
              ds[m][n][i] = p[m][n][i] * (ds[m][n][i] - delta);
            }
          }
        }
        FragmentA<T> p_a[kTiles], ds_a[kTiles];
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          p_a[m] = as_operand<T>(p[m][0], p[m][1]);
          ds_a[m] = as_operand<T>(ds[m][0], ds[m][1]);
          memory.grad_scores(first / 16)
              .store_operand(own_key + 16 * m, ds_a[m], num_keys - own_key - 16 * m);
        }
#pragma unroll
        for (int pair = 0; pair < D / 16; ++pair) {
          FragmentB<T> g[2], q[2];
          grads.load_columns(first, pair, g);
          queries.load_columns(first, pair, q);
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            mma(d_value[m][2 * pair], p_a[m], g[0]);
            mma(d_value[m][2 * pair + 1], p_a[m], g[1]);
            mma(d_key[m][2 * pair], ds_a[m], q[0]);
            mma(d_key[m][2 * pair + 1], ds_a[m], q[1]);
          }
        }
      }
      __syncthreads();

      // dQ, 16 queries by 32 elements at a time.
      constexpr int kQueryTiles = kQueries / 16;
      for (int unit = warp; unit < kQueryTiles * D / 32; unit += Block::kWarps) {
        const int row = 16 * (unit % kQueryTiles), block = unit / kQueryTiles;
        if (row >= count) continue;
        float d_query[4][4] = {};
        int query[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int place = row + 8 * half + lane / 4;
          query[half] = place < count ? order[stage * kQueries + place] : -1;
          if (first_chunk || query[half] < 0) continue;
          const float* partial = partial_row(query[half]) + 32 * block + 2 * (lane % 4);
#pragma unroll
          for (int n = 0; n < 4; ++n) {
            if (32 * block + 8 * n >= sizes.dim) continue;
            d_query[n][2 * half] = partial[8 * n];
            d_query[n][2 * half + 1] = partial[8 * n + 1];
          }
        }
        for (int key = 0; key < num_keys; key += 16) {
          const FragmentA<T> ds = memory.grad_scores(row / 16).load_transposed(key);
#pragma unroll
          for (int pair = 0; pair < 2; ++pair) {
            FragmentB<T> columns[2];
            memory.keys().load_columns(key, 2 * block + pair, columns);
            mma(d_query[2 * pair], ds, columns[0]);
            mma(d_query[2 * pair + 1], ds, columns[1]);
          }
        }
        __syncwarp();  // lanes write what others of their row have read
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int at = max(query[half], 0);
          const bool exists = query[half] >= 0;
          if (last_chunk) {
            T* target = to.grad_query.row(to.grad_query.head(), at) + 32 * block;
            store_row<T, 32>(d_query, half, to.scale, exists ? target : nullptr,
                             sizes.dim - 32 * block);
          } else {
            float* target = partial_row(at) + 32 * block;
            store_row<float, 32>(d_query, half, 1.f, exists ? target : nullptr,
                                 sizes.dim - 32 * block);
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) {
      const int place = own_key + 8 * i + lane / 4;
      Part<T>* row =
          place < num_keys ? parts + (first_key + place) * 2 * sizes.dim : nullptr;
      store_row<Part<T>, D>(d_key[i / 2], i % 2, to.scale, row, sizes.dim);
      store_row<Part<T>, D>(d_value[i / 2], i % 2, 1.f,
                            row != nullptr ? row + sizes.dim : row, sizes.dim);
    }
  }
}

// Queries of a tile: so many that the parts of dK and dV are few, so few that all
// multiprocessors have several tiles and one large group keeps them all busy.
int64_t tile_queries(const at::Tensor& query) {
  const int64_t L = query.size(2), heads = query.size(0) * query.size(1);
  const int64_t share = heads * L / (8 * num_multiprocessors());
  return ceil_div(std::max(std::clamp<int64_t>(share, 128, 512), L / 128), 64) * 64;
}

// Images whose parts of dK and dV are in memory at a time: as many as a GPU's cache holds
// the parts of, but enough to give all multiprocessors several tiles.
int64_t images_at_once(int64_t images, int64_t tiles_of_image, int64_t part_bytes) {
  constexpr int64_t kCacheBytes = 32 << 20;
  const int64_t fewest = ceil_div(8 * num_multiprocessors(), tiles_of_image);
  const int64_t most = std::max(fewest, kCacheBytes / (tiles_of_image * part_bytes));
  return ceil_div(images, ceil_div(images, most));
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
    using Block = BackwardBlock<T, kWidth>;
    const int64_t B = query.size(0), H = query.size(1);
    const int64_t size = tile_queries(query);
    const SortedQueries sorted = sort_queries(group, G, size);
    const SortedChoices choices = sort_choices(index, L);
    const int64_t tiles = sorted.tiles.size(2);
    const int64_t images =
        images_at_once(B, H * tiles, 2 * K * D * static_cast<int64_t>(sizeof(Part<T>)));
    const auto floats = query.options().dtype(at::kFloat);
    const at::Tensor parts =
        at::empty({images, H, tiles, K, 2, D},
                  std::is_same_v<Part<T>, float> ? floats : query.options());
    const at::Tensor partial_query =
        at::empty({K > Block::kKeys ? images : 0, H, L, D}, floats);
    for (int64_t first = 0; first < B; first += images) {
      const auto of_heads = [&](int64_t blocks) {
        dim3 grid = grid_of_heads(blocks, query);
        grid.z = static_cast<unsigned>(std::min(images, B - first));
        return grid;
      };
      const Backward<T> own = to.from_image(first, H);
      launch(attend_backward_kernel<T, kWidth>, of_heads(tiles), Block::kThreads,
             Block::kBytes, own, sorted.order.const_data_ptr<int>() + first * H * L,
             static_cast<const int4*>(sorted.tiles.const_data_ptr()) + first * H * tiles,
             partial_query.mutable_data_ptr<float>(),
             static_cast<Part<T>*>(parts.data_ptr()));
      launch(
          sum_parts_kernel<T>, of_heads(ceil_div(L, kSumTokens)), kSumThreads, 0, own,
          static_cast<const Part<T>*>(parts.data_ptr()),
          sorted.offsets.const_data_ptr<int>() + first * H * (G + 1),
          choices.begins.const_data_ptr<int>() + first * H * (L + 1),
          static_cast<const int2*>(choices.choosers.const_data_ptr()) + first * H * G * K,
          static_cast<int>(size), static_cast<int>(tiles));
    }
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
