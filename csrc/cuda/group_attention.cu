// Group attention, forward (eq. 2): softmax attention of every query over the
// keys of its group.
#include "../dynamic_group_attention.h"
#include "attention.cuh"
#include "masked_attention.h"
#include "sort_queries.h"

namespace mmdgt {
namespace {

// A block serves up to 16 queries per warp, all of one group. The keys and values
// of the group pass through two stages of shared memory; the softmax is online.
template <typename T, int D>
__global__ void __launch_bounds__(256, D == 32 ? 2 : 1)
    attend_kernel(Rows<const T> query, Rows<const T> key, Rows<const T> value,
                  const int* __restrict__ order, const int* __restrict__ offsets,
                  const int* __restrict__ index, Rows<T> out,
                  float* __restrict__ logsumexp, int64_t num_tokens,
                  int num_groups, int num_keys, int dim, float scale, int tiles) {
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
  int token[2];
  RowFragment<T, D> q[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int place = tile.begin + 16 * warp + 8 * half + lane / 4;
    token[half] = place < tile.end ? order[bh * num_tokens + place] : -1;
    if (token[half] >= 0) {
      q[half].load(query.row(bh, token[half]), dim);
    } else {
      q[half].clear();
    }
    // The maximum is taken before scaling, which must not turn the order round.
    if (scale < 0.f) q[half].negate();
  }
  const float scale_log2 = positive_scale_log2(scale);

  OnlineSoftmax<T, D> softmax;
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
      float s[kKeys / 8][4];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = 0.f;
        if (8 * n < count) {
          const RowFragment<T, D> k = keys.load_row(8 * n + lane / 4);
#pragma unroll
          for (int step = 0; step < D / 16; ++step) {
            mma(s[n], operand_a(q[0], q[1], step), k.operand_b(step));
          }
        }
        if (8 * n + 8 > count) {  // columns without a key
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (8 * n + 2 * (lane % 4) + i % 2 >= count) s[n][i] = -INFINITY;
          }
        }
      }
      softmax.template add<kKeys>(s, count, scale_log2, values, 0);
    }
    __syncthreads();
  }
  if (!active) return;

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* row = token[half] >= 0 ? out.row(bh, token[half]) : nullptr;
    softmax.store(half, scale_log2, dim, row,
                  logsumexp + bh * num_tokens + token[half]);
  }
}

std::tuple<at::Tensor, at::Tensor> group_attention_cuda(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& group, const at::Tensor& index, double scale) {
  const c10::cuda::CUDAGuard guard(query.device());
  const int64_t heads = query.size(0) * query.size(1), L = query.size(2);
  const int64_t G = index.size(2), K = index.size(3);
  at::Tensor out = empty_heads_last(query);
  at::Tensor logsumexp =
      at::empty(group.sizes(), query.options().dtype(at::kFloat));
  if (group.numel() == 0) return {out, logsumexp};

  const at::Tensor q = aligned_rows(query), k = aligned_rows(key);
  const at::Tensor v = aligned_rows(value);
  if (has_few_tokens(q)) {
    masked_attention(q, k, v, group, index, scale, out, logsumexp);
    return {out, logsumexp};
  }
  const SortedQueries sorted = sort_queries(group, G);
  dispatch_tokens(q, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    constexpr int kWidth = decltype(width)::value;
    const int warps = attention_warps(L, G);
    const int64_t tiles = max_tiles(L, G, 16 * warps);
    const int stages = K > kStageKeys<T, kWidth> ? 2 : 1;
    launch(attend_kernel<T, kWidth>, heads * tiles, 32 * warps,
           stages * 2 * kStageKeys<T, kWidth> * kWidth * sizeof(T),
           Rows<const T>(q), Rows<const T>(k), Rows<const T>(v),
           sorted.order.const_data_ptr<int>(),
           sorted.offsets.const_data_ptr<int>(), index.const_data_ptr<int>(),
           Rows<T>(out), logsumexp.mutable_data_ptr<float>(), L,
           static_cast<int>(G), static_cast<int>(K),
           static_cast<int>(query.size(3)), static_cast<float>(scale),
           static_cast<int>(tiles));
  });
  return {out, logsumexp};
}

}  // namespace

REGISTER_DEVICE_IMPL(group_attention_impl, CUDA, group_attention_cuda);

}  // namespace mmdgt
