// Group attention, forward (eq. 2): softmax attention of every query over the
// keys of its group.
#include "../dynamic_group_attention.h"
#include "attention.cuh"
#include "masked_attention.h"
#include "sort_queries.h"

namespace mmdgt {
namespace {

// A block serves up to 16 queries per warp, all of one group.
template <typename T, int D, int kWarps, int kKeys>
__global__ void __launch_bounds__(32 * kWarps,
                                  D * sizeof(T) > 64 ? 1 : 16 / kWarps)
    attend_kernel(Rows<const T> query, Rows<const T> key, Rows<const T> value,
                  const int* __restrict__ order, const int4* __restrict__ tiles,
                  const int* __restrict__ index, Rows<T> out,
                  float* __restrict__ logsumexp, int num_tokens, int num_groups,
                  int num_keys, int dim, float scale) {
  extern __shared__ __align__(128) char shared[];
  const auto [group, begin, end, unused] = tiles[own_head() * gridDim.x + blockIdx.x];
  if (begin == end) return;
  order += own_head() * num_tokens;
  logsumexp += own_head() * num_tokens;

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
  const T* queries = query.head();
  RowFragment<T, D> q[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (token[half] >= 0) {
      q[half].load(query.row(queries, token[half]), dim);
    } else {
      q[half].clear();
    }
    // The maximum is taken before scaling, which must not turn the order round.
    if (scale < 0.f) q[half].negate();
  }
  const float scale_log2 = positive_scale_log2(scale);

  OnlineSoftmax<T, D> softmax;
  pipeline.run([&](int stage) {
    if (!active) return;
    const SharedRows<T, D> keys = pipeline.keys(stage);
    float s[kKeys / 8][4];
#pragma unroll
    for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = 0.f;
      const RowFragment<T, D> k = keys.load_row(8 * n + lane / 4);
#pragma unroll
      for (int step = 0; step < D / 16; ++step) {
        mma(s[n], operand_a(q[0], q[1], step), k.operand_b(step));
      }
    }
    const int count = num_keys - stage * kKeys;
    if (count < kKeys) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        if (8 * n + 8 <= count) continue;
#pragma unroll
        for (int i = 0; i < 4; ++i) {  // columns without a key
          if (8 * n + 2 * (lane % 4) + i % 2 >= count) s[n][i] = -INFINITY;
        }
      }
    }
    softmax.template add<kKeys>(s, scale_log2, pipeline.values(stage), 0);
  });
  if (!active) return;

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    T* row = token[half] >= 0 ? out.row(out.head(), token[half]) : nullptr;
    softmax.store(half, scale_log2, dim, row, logsumexp + token[half]);
  }
}

std::tuple<at::Tensor, at::Tensor> group_attention_cuda(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& group, const at::Tensor& index, double scale) {
  const c10::cuda::CUDAGuard guard(query.device());
  const int64_t L = query.size(2), G = index.size(2), K = index.size(3);
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
  dispatch_tokens(q, [&](auto type, auto width) {
    using T = typename decltype(type)::type;
    constexpr int kWidth = decltype(width)::value;
    const int warps = block_warps<T, kWidth>(L, G);
    const SortedQueries sorted = sort_queries(group, G, 16 * warps);
    dispatch_block<T, kWidth>(warps, K, [&](auto block, auto stage) {
      constexpr int kWarps = decltype(block)::value;
      constexpr int kKeys = decltype(stage)::value;
      launch(attend_kernel<T, kWidth, kWarps, kKeys>,
             grid_of_heads(sorted.tiles.size(2), query), 32 * kWarps,
             (K > kKeys ? 4 : 2) * kKeys * kWidth * sizeof(T), Rows<const T>(q),
             Rows<const T>(k), Rows<const T>(v), sorted.order.const_data_ptr<int>(),
             static_cast<const int4*>(sorted.tiles.const_data_ptr()),
             index.const_data_ptr<int>(), Rows<T>(out),
             logsumexp.mutable_data_ptr<float>(), static_cast<int>(L),
             static_cast<int>(G), static_cast<int>(K),
             static_cast<int>(query.size(3)), static_cast<float>(scale));
    });
  });
  return {out, logsumexp};
}

}  // namespace

REGISTER_DEVICE_IMPL(group_attention_impl, CUDA, group_attention_cuda);

}  // namespace mmdgt
