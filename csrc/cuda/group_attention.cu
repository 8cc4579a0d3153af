// Group attention, forward (eq. 2): softmax attention of every query over the
// keys of its group.
#include "attention.cuh"
#include "kernels.h"
#include "masked_attention.h"
#include "sort_queries.h"
#include "sum_queries.h"

namespace mmdgt::cuda {
namespace {

// Shared memory: two stages of keys and values, two tiles of queries, and the tokens
// of both tiles.
template <typename T, int D, int kWarps, int kKeys>
struct Memory {
  static constexpr int kQueries = 16 * kWarps;
  static constexpr int kKeyBytes = kKeys * D * sizeof(T);
  static constexpr int kQueryBytes = kQueries * D * sizeof(T);
  static constexpr int kBytes =
      4 * kKeyBytes + 2 * kQueryBytes + 2 * kQueries * static_cast<int>(sizeof(int));

  char* base;
  __device__ __forceinline__ SharedRows<T, D> keys(int stage) const {
    return SharedRows<T, D>(base + (stage & 1) * 2 * kKeyBytes);
  }
  __device__ __forceinline__ SharedRows<T, D> values(int stage) const {
    return SharedRows<T, D>(base + ((stage & 1) * 2 + 1) * kKeyBytes);
  }
  __device__ __forceinline__ SharedRows<T, D> queries(int tile) const {
    return SharedRows<T, D>(base + 4 * kKeyBytes + (tile & 1) * kQueryBytes);
  }
  __device__ __forceinline__ int* tokens(int tile) const {
    return reinterpret_cast<int*>(base + 4 * kKeyBytes + 2 * kQueryBytes) +
           (tile & 1) * kQueries;
  }
};

// Warps of a multiprocessor.
template <typename T, int D>
constexpr int kResidentWarps = D * sizeof(T) == 64    ? 24
                               : D * sizeof(T) == 128 ? 12
                                                      : 8;

// A block serves tiles blockIdx.x, blockIdx.x + gridDim.x, ... of its head, 16
// queries per warp, all of one group, whose keys come in stages. While it computes
// with one stage, the next one is copied and the tokens of the one after are looked
// up, across the bounds of tiles, so that nothing waits for device memory.
template <typename T, int D, int kWarps, int kKeys>
__global__ void __launch_bounds__(32 * kWarps, kResidentWarps<T, D> / kWarps)
    attend_kernel(Forward<T> to, const int* __restrict__ order,
                  const int4* __restrict__ tiles, int num_tiles) {
  constexpr int kQueries = 16 * kWarps;
  char* shared = dynamic_shared();
  const Sizes& sizes = to.sizes;
  const Memory<T, D, kWarps, kKeys> memory{shared};
  tiles += own_head() * num_tiles;
  const int* index = to.index + own_head() * sizes.num_groups * sizes.num_keys;
  order += own_head() * sizes.num_tokens;
  const int stages = (sizes.num_keys + kKeys - 1) / kKeys;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  const auto read_tile = [&](int number) {
    return number < num_tiles ? tiles[number] : make_int4(0, 0, 0, 0);
  };
  // The stage to look up next: of which tile, and the tile after that.
  int number = blockIdx.x, ahead = 0, stage_ahead = 0;
  int4 tile = read_tile(number), next_tile = read_tile(number + gridDim.x);
  // What was looked up last.
  RowGather<T, D, 32 * kWarps, kKeys> key_gather;
  RowGather<T, D, 32 * kWarps, kQueries> query_gather;
  int own_token = -1;
  bool found = false, starts_tile = false;
  const auto look_up = [&]() {  // and move on
    found = tile.y < tile.z;
    starts_tile = stage_ahead == 0;
    if (!found) return;
    const int first = stage_ahead * kKeys;
    key_gather.look_up(index + static_cast<int64_t>(tile.x) * sizes.num_keys + first,
                       sizes.num_keys - first, sizes.num_tokens - 1);
    if (starts_tile) {
      const int count = tile.z - tile.y, own = threadIdx.x;
      query_gather.look_up(order + tile.y, count, sizes.num_tokens - 1);
      own_token = own < min(count, kQueries) ? order[tile.y + own] : -1;
    }
    if (++stage_ahead == stages) {
      stage_ahead = 0;
      number += gridDim.x;
      tile = next_tile;
      next_tile = read_tile(number + gridDim.x);
    }
  };
  const auto copy = [&](int stage) {
    key_gather.copy(memory.keys(stage), to.key.head(), to.key.token_stride, sizes.dim);
    key_gather.copy(memory.values(stage), to.value.head(), to.value.token_stride,
                    sizes.dim);
    if (starts_tile) {
      query_gather.copy(memory.queries(ahead), to.query.head(), to.query.token_stride,
                        sizes.dim);
      if (threadIdx.x < kQueries) memory.tokens(ahead)[threadIdx.x] = own_token;
      ++ahead;
    }
    ptx::commit_copies();
  };

  look_up();
  if (!found) return;
  copy(0);
  look_up();

  // Maxima are taken before scaling, which must not turn the order round.
  const float scale_log2 = positive_scale_log2(to.scale);
  int stage = 0;         // counted over all tiles
  uint32_t spoiled = 0;  // not zero if rows have to be done again
  for (int served = 0; served < ahead; ++served) {
    int token[2];
    FragmentA<T> q[D / 32][2];
    SoftmaxRows<T, D> rows;
    for (int of_tile = 0; of_tile < stages; ++of_tile, ++stage) {
      if (found) {
        copy(stage + 1);
        look_up();
        ptx::wait_for_copies<1>();
      } else {
        ptx::wait_for_copies<0>();
      }
      __syncthreads();
      if (of_tile == 0) {
        const SharedRows<T, D> queries = memory.queries(served);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          token[half] = memory.tokens(served)[16 * warp + 8 * half + lane / 4];
        }
#pragma unroll
        for (int block = 0; block < D / 32; ++block) {
          queries.load_operands(16 * warp, block, q[block]);
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            if (to.scale < 0.f) negate<T>(q[block][step].x);
          }
        }
      }
      const SharedRows<T, D> keys = memory.keys(stage);
      if (memory.tokens(served)[16 * warp] >= 0) {
        const SharedRows<T, D> values = memory.values(stage);
        const int count = sizes.num_keys - of_tile * kKeys;
#pragma unroll
        for (int key = 0; key < kKeys; key += 16) {
          if (key >= count) break;
          float s[2][4] = {};
#pragma unroll
          for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int block = 0; block < D / 32; ++block) {
              FragmentB<T> k[2];
              keys.load_operands(key + 8 * n, block, k);
#pragma unroll
              for (int step = 0; step < 2; ++step) {
                mma(s[n], kept_operand<D>(q[block][step]), k[step]);
              }
            }
          }
          if (key + 16 > count) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
              for (int i = 0; i < 4; ++i) {  // columns without a key
                if (key + 8 * n + 2 * (lane % 4) + i % 2 >= count) s[n][i] = -INFINITY;
              }
            }
          }
          const bool first = key == 0 && of_tile == 0;
          if (first || std::is_same_v<T, __half>) rows.raise(s, scale_log2, first);
          rows.add(s, scale_log2, values, key);
        }
        if (of_tile == stages - 1) {
          uint32_t again[2];
          rows.store(to, token, again);
          spoiled |= again[0] | again[1];
        }
      }
      __syncthreads();
    }
  }
  if (spoiled == 0) return;
  __syncwarp();
  const float* logsumexp = to.logsumexp + own_head() * sizes.num_tokens;
  for (int i = blockIdx.x; i < num_tiles; i += gridDim.x) {
    const auto [group, begin, end, unused] = tiles[i];
    const int* chosen = index + group * sizes.num_keys;
    for (int at = begin + 16 * warp; at < min(begin + 16 * warp + 16, end); ++at) {
      const bool done = !isnan(logsumexp[order[at]]);
      __syncwarp();  // before it is written
      if (done) continue;
      attend_row<T, D>(to, order[at], sizes.num_keys, [&](int k) {
        return min(max(chosen[k], 0), sizes.num_tokens - 1);
      });
    }
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> group_attention_cuda(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& group, const at::Tensor& index, double scale) {
  const c10::DeviceGuard guard(query.device());
  const int64_t L = query.size(2), G = index.size(2), K = index.size(3);
  at::Tensor out = empty_heads_last(query);
  at::Tensor logsumexp = at::empty(group.sizes(), query.options().dtype(at::kFloat));
  if (group.numel() == 0) return {out, logsumexp};

  const at::Tensor q = aligned_rows(query), k = aligned_rows(key);
  const at::Tensor v = aligned_rows(value);
  if (has_few_tokens(q)) {
    masked_attention(q, k, v, group, index, scale, out, logsumexp);
    return {out, logsumexp};
  }
  dispatch_tokens(q, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    constexpr int kWidth = decltype(width)::value;
    const Forward<T> to{Rows<const T>(q),
                        Rows<const T>(k),
                        Rows<const T>(v),
                        group.const_data_ptr<int>(),
                        index.const_data_ptr<int>(),
                        Rows<T>(out),
                        logsumexp.mutable_data_ptr<float>(),
                        Sizes(query, G, K),
                        static_cast<float>(scale)};
    const int warps = block_warps<T, kWidth>(L, G);
    const SortedQueries sorted = sort_queries(group, G, 16 * warps);
    dispatch_block<T, kWidth>(warps, K, [&](auto block, auto stage) {
      constexpr int kWarps = decltype(block)::value;
      constexpr int kKeys = decltype(stage)::value;
      const int64_t tiles = sorted.tiles.size(2);
      launch(
          attend_kernel<T, kWidth, kWarps, kKeys>,
          grid_of_heads(resident_blocks(tiles, kResidentWarps<T, kWidth> / kWarps, query),
                        query),
          32 * kWarps, Memory<T, kWidth, kWarps, kKeys>::kBytes, to,
          sorted.order.const_data_ptr<int>(),
          static_cast<const int4*>(sorted.tiles.const_data_ptr()),
          static_cast<int>(tiles));
    });
  });
  return {out, logsumexp};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
choose_and_attend_cuda(const at::Tensor& query, const at::Tensor& key,
                       const at::Tensor& value, const at::Tensor& centroids,
                       int64_t num_keys, double scale, bool with_sums) {
  const c10::DeviceGuard guard(query.device());
  const int64_t B = query.size(0), H = query.size(1), L = query.size(2);
  const int64_t G = centroids.size(1);
  const auto ints = query.options().dtype(at::kInt);
  at::Tensor out = empty_heads_last(query);
  at::Tensor logsumexp = at::empty({B, H, L}, query.options().dtype(at::kFloat));
  at::Tensor group = at::empty({B, H, L}, ints);
  at::Tensor masks = at::empty({B, H, G, kMaskWords}, ints);
  const int64_t parts = with_sums && group.numel() > 0 ? B : 0;
  at::Tensor parts_of_sums = at::empty({parts, H, G, query.size(3)}, logsumexp.options());
  at::Tensor parts_of_counts = at::empty({parts, H, G}, ints);
  if (group.numel() > 0) {
    choose_and_attend(aligned_rows(query), aligned_rows(key), aligned_rows(value),
                      aligned_centroids(centroids), num_keys, scale, out, logsumexp,
                      group, masks, parts_of_sums, parts_of_counts);
  }
  const auto [sums, counts] =
      with_sums ? add_parts(parts_of_sums, parts_of_counts) : no_sums(query.options());
  return {out, logsumexp, group, masks, sums, counts};
}

}  // namespace mmdgt::cuda
