// Group attention for few tokens, forward.
#include "masked_attention.cuh"

#include "few_keys.cuh"
#include "scores.cuh"
#include "sum_queries.cuh"

namespace mmdgt::cuda {

using namespace masked;

namespace {

// Warps of the multiprocessor: three blocks at the 196 tokens of ImageNet.
constexpr int kResidentWarps = 21;

// What is added to scores: nothing where a key is seen, else a number so low that its
// probability is zero. `hidden` has one bit per key of 32, the own columns' in front.
struct Bias {
  uint32_t even, odd;  // the bits of every eight keys' own columns, at bits 7, 15...

  __device__ __forceinline__ explicit Bias(uint32_t seen) {
    const uint32_t hidden = ~seen >> 2 * (threadIdx.x % 4);
    even = hidden << 7;
    odd = hidden << 6;
  }
  // -2^127 for eight keys' own column, or 0.
  template <int kTile>
  __device__ __forceinline__ float2 columns() const {
    return make_float2(__uint_as_float(ptx::top_sign_byte<kTile>(even)),
                       __uint_as_float(ptx::top_sign_byte<kTile>(odd)));
  }
};

// Scores of 16 rows by 8 columns of `rows`, hidden ones pushed out of sight.
template <typename T, int kTile>
__device__ __forceinline__ void score_tile(float (&s)[4], const Row<T> (&q)[2],
                                           const Shared<T>& keys, int from,
                                           const Bias (&bias)[2]) {
  const float2 low = bias[0].template columns<kTile>();
  const float2 high = bias[1].template columns<kTile>();
  s[0] = low.x;
  s[1] = low.y;
  s[2] = high.x;
  s[3] = high.y;
  const Row<T> k = keys.load_rows(from + 8 * kTile);
#pragma unroll
  for (int step = 0; step < kDim / 16; ++step) {
    mma(s, operand_a(q[0], q[1], step), k.operand_b(step));
  }
}

template <typename T>
__device__ __forceinline__ float square_sum(const Row<T>& row) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(row.x[0][i]);
    sum = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, sum));
  }
  return quad_sum(sum);
}

// Attention of rows first + {0..15}, whose fragments are q, to the keys and values in
// shared memory. `group` has those of rows lane / 4 and lane / 4 + 8. `key_norm` is at
// least the length of every key. By a whole warp.
template <typename T>
__device__ __forceinline__ void attend_tile(const Forward<T>& to,
                                            const Row<T> (&queries)[2],
                                            const Shared<T>& keys,
                                            const Shared<T>& values,
                                            const uint32_t* masks, const int (&group)[2],
                                            int first, float key_norm) {
  constexpr float kMaxExponent = 100.f;
  const int lane = threadIdx.x % 32;
  const int padded = padded_rows(to.sizes.num_tokens);
  const uint32_t* seen[2] = {masks + group[0] * kMaskWords,
                             masks + group[1] * kMaskWords};
  const float scale_log2 = positive_scale_log2(to.scale);
  Row<T> q[2] = {queries[0], queries[1]};
  if (to.scale < 0.f) {
    q[0].negate();
    q[1].negate();
  }
  // Probabilities are 2^(score * scale_log2 - shift). What keeps them within bfloat16
  // follows from the lengths; float16 has to know the maximum.
  SoftmaxRows<T, kDim> rows;
  float (&shift)[2] = rows.shift;
  if constexpr (std::is_same_v<T, __half>) {
    shift[0] = shift[1] = -INFINITY;
    for (int from = 0; from < padded; from += 32) {
      const Bias bias[2] = {Bias(seen[0][from / 32]), Bias(seen[1][from / 32])};
      const auto look = [&](auto tile) {
        float s[4];
        score_tile<T, decltype(tile)::value>(s, q, keys, from, bias);
#pragma unroll
        for (int i = 0; i < 4; ++i) shift[i / 2] = fmaxf(shift[i / 2], s[i] * scale_log2);
      };
      look(std::integral_constant<int, 0>());
      look(std::integral_constant<int, 1>());
      if (from + 16 < padded) {
        look(std::integral_constant<int, 2>());
        look(std::integral_constant<int, 3>());
      }
    }
    shift[0] = quad_max(shift[0]);
    shift[1] = quad_max(shift[1]);
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float bound = sqrtf(square_sum(q[half])) * key_norm * scale_log2;
      shift[half] = fmaxf(bound - kMaxExponent, 0.f);
    }
  }

  for (int from = 0; from < padded; from += 32) {
    const Bias bias[2] = {Bias(seen[0][from / 32]), Bias(seen[1][from / 32])};
    float s[2][4];
    score_tile<T, 0>(s[0], q, keys, from, bias);
    score_tile<T, 1>(s[1], q, keys, from, bias);
    rows.add(s, scale_log2, values, from);
    if (from + 16 < padded) {
      score_tile<T, 2>(s[0], q, keys, from, bias);
      score_tile<T, 3>(s[1], q, keys, from, bias);
      rows.add(s, scale_log2, values, from + 16);
    }
  }
  int token[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int own = first + 8 * half + lane / 4;
    token[half] = own < to.sizes.num_tokens ? own : -1;
  }
  uint32_t again[2];
  rows.store(to, token, again);
  each_row_again(again, [&](int row) {
    const int own_group = __shfl_sync(~0u, row < 8 ? group[0] : group[1], 4 * (row % 8));
    const uint32_t* words = masks + own_group * kMaskWords;
    attend_row<T, kDim>(to, first + row, to.sizes.num_tokens,
                        [&](int t) { return words[t / 32] >> t % 32 & 1 ? t : -1; });
  });
}

// The largest of what the block's warps bring, which have to meet afterwards.
__device__ __forceinline__ float block_max(float x, float (&scratch)[kMaxWarps]) {
  x = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(x)));  // x >= 0
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  for (int w = 0; w < blockDim.x / 32; ++w) x = fmaxf(x, scratch[w]);
  return x;
}

// Attention to the keys of index (B,H,G,K) for queries of group (B,H,L). A warp serves
// 32 queries. Shared memory: keys, values, masks.
template <typename T, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kResidentWarps / kWarps)
    masked_kernel(Forward<T> to) {
  __shared__ float scratch[kMaxWarps];
  char* shared = dynamic_shared();
  const Sizes& sizes = to.sizes;
  const int64_t bh = own_head();
  const int padded = padded_rows(sizes.num_tokens);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Shared<T> keys(shared), values(shared + padded * Shared<T>::kRowBytes);
  auto* masks = reinterpret_cast<uint32_t*>(shared + 2 * padded * Shared<T>::kRowBytes);
  copy_head(keys, to.key, sizes, padded);
  copy_head(values, to.value, sizes, padded);
  ptx::commit_copies();
  fill_masks(masks, to.index + bh * sizes.num_groups * sizes.num_keys, sizes);
  Row<T> q[4];
  int own_group[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int token = min(32 * warp + 8 * i + lane / 4, sizes.num_tokens - 1);
    q[i].load(to.query.row(to.query.head(), token), sizes.dim);
    own_group[i] =
        min(max(to.group[bh * sizes.num_tokens + token], 0), sizes.num_groups - 1);
  }
  ptx::wait_for_copies<0>();
  __syncthreads();
  float key_norm = 0.f;
  for (int row = 32 * warp; row < min(32 * warp + 32, padded); row += 8) {
    key_norm = fmaxf(key_norm, sqrtf(square_sum(keys.load_rows(row))));
  }
  key_norm = block_max(key_norm, scratch);
  attend_tile(to, {q[0], q[1]}, keys, values, masks, {own_group[0], own_group[1]},
              32 * warp, key_norm);
  if (32 * warp + 16 >= sizes.num_tokens) return;
  attend_tile(to, {q[2], q[3]}, keys, values, masks, {own_group[2], own_group[3]},
              32 * warp + 16, key_norm);
}

// Groups whose scores are in shared memory at a time, in tiles of 16.
constexpr int kScoredTiles = 3;

// Shared memory of choose_and_attend_kernel. Values and, for the sums of eq. 3, the
// normalised queries take the place of scores, the groups' members that of operands.
template <typename T>
struct ChoiceMemory {
  using Operands = CentroidOperands<T, kDim>;
  int scores, queries, operands, masks, scratch, end;  // offsets, in bytes

  MMDGT_HOST_DEVICE ChoiceMemory(const Sizes& sizes, int warps) {
    const int padded = padded_rows(sizes.num_tokens);
    const int groups = (sizes.num_groups + 15) / 16;
    const int tiles = groups < kScoredTiles ? groups : kScoredTiles;
    const int rows = padded * Shared<T>::kRowBytes;
    const int score_bytes = 16 * tiles * stride(sizes) * 4;
    const int query_bytes = padded * kDim * static_cast<int>(sizeof(float));
    scores = rows;
    queries = scores + rows;
    const int end_of_scores = scores + score_bytes, end_of_rows = queries + query_bytes;
    operands = end_of_scores > end_of_rows ? end_of_scores : end_of_rows;
    const int operand_bytes = tiles * static_cast<int>(Operands::kTileBytes);
    // What follows is read 16 bytes at a time.
    const int member_bytes = (warps * sizes.num_groups * 4 + 15) / 16 * 16;
    masks = operands + (operand_bytes > member_bytes ? operand_bytes : member_bytes);
    scratch = masks + sizes.num_groups * kMaskWords * 4;
    end = scratch + warps * static_cast<int>(sizeof(FewKeysScratch));
  }
  // From one group's scores to the next one's, padded against bank conflicts.
  static MMDGT_HOST_DEVICE int stride(const Sizes& sizes) {
    return padded_rows(sizes.num_tokens) + 8;
  }
};

struct Choice {
  const float* centroids;  // (H,G,D)
  int* group;              // (B,H,L)
  uint32_t* masks;         // (B,H,G,kMaskWords)
  float* sums;             // (B,H,G,D), or null: neither sums nor counts
  int* counts;             // (B,H,G)
};

// Leaves the queries of the rows from `first` on, normalised, in rows of kDim.
template <typename T, int N>
__device__ __forceinline__ void store_normalised(float* queries, const Row<T> (&q)[N],
                                                 int first, int padded) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    if (first + 8 * n >= padded) continue;
    const float factor = inverse_norm(square_sum(q[n]));
    float* row = queries + (first + 8 * n + lane / 4) * kDim + 8 * (lane % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 x = unpack<T>(q[n].x[0][2 * i]), y = unpack<T>(q[n].x[0][2 * i + 1]);
      *reinterpret_cast<float4*>(row + 4 * i) = {x.x * factor, x.y * factor, y.x * factor,
                                                 y.y * factor};
    }
  }
}

// Assigns, selects and attends in one go. A warp serves 32 keys and 32 queries.
template <typename T, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kResidentWarps / kWarps)
    choose_and_attend_kernel(Forward<T> to, Choice choice) {
  __shared__ float norm_scratch[kMaxWarps];
  __shared__ int nan_group;
  constexpr int N = 4;
  char* shared = dynamic_shared();
  const Sizes& sizes = to.sizes;
  const int64_t bh = own_head();
  const int padded = padded_rows(sizes.num_tokens);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = 32 * warp;
  const ChoiceMemory<T> memory(sizes, blockDim.x / 32);
  const int stride = ChoiceMemory<T>::stride(sizes);
  const Shared<T> keys(shared), values(shared + memory.scores);
  auto* scores = reinterpret_cast<float*>(shared + memory.scores);
  const CentroidOperands<T, kDim> operands{
      reinterpret_cast<FragmentA<T>*>(shared + memory.operands)};
  auto* masks = reinterpret_cast<uint32_t*>(shared + memory.masks);
  auto* normalised = reinterpret_cast<float*>(shared + memory.queries);
  auto* members = reinterpret_cast<uint32_t*>(shared + memory.operands);
  auto& scratch = reinterpret_cast<FewKeysScratch*>(shared + memory.scratch)[warp];

  copy_head(keys, to.key, sizes, padded);
  ptx::commit_copies();
  // Loaded twice: registers are scarce between.
  const auto load_queries = [&](Row<T>(&q)[N]) {
    load_tokens(q, to.query.head(), to.query.token_stride, sizes.dim,
                [&](int i) { return min(first + i, sizes.num_tokens - 1); });
  };
  if (threadIdx.x == 0) nan_group = sizes.num_groups;
  ptx::wait_for_copies<0>();
  __syncthreads();
  const float* centroids = choice.centroids + blockIdx.y * sizes.num_groups * sizes.dim;
  float key_norm = 0.f;
  float best = -INFINITY;
  int group = 0;  // of query first + lane
  for (int from = 0; from < sizes.num_groups; from += 16 * kScoredTiles) {
    const int groups = min(sizes.num_groups - from, 16 * kScoredTiles);
    operands.fill(centroids, from, (groups + 15) / 16, sizes.num_groups, sizes.dim,
                  &nan_group);
    __syncthreads();
    Row<T> q[N], k[N];
    load_queries(q);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      k[i].clear();
      if (first + 8 * i >= padded) continue;
      k[i] = keys.load_rows(first + 8 * i);
      if (from == 0) key_norm = fmaxf(key_norm, sqrtf(square_sum(k[i])));
    }
    bool infinite = false;
    for (int tile = 0; 16 * tile < groups; ++tile) {
      float score[N][4];
      score_tokens<T, kDim, N>(operands, tile, k, score);
      if (tile == 0) infinite = has_infinity(score);
      if (infinite) repair_scores(operands, tile, k, score);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (first + 8 * n >= padded) continue;
        float* target =
            scores + (16 * tile + lane / 4) * stride + first + 8 * n + 2 * (lane % 4);
        *reinterpret_cast<float2*>(target) = make_float2(score[n][0], score[n][1]);
        *reinterpret_cast<float2*>(target + 8 * stride) =
            make_float2(score[n][2], score[n][3]);
      }
    }
    NearestGroups<N> nearest;
    for (int tile = 0; 16 * tile < groups; ++tile) {
      float score[N][4];
      score_tokens<T, kDim, N>(operands, tile, q, score);
      if (tile == 0) infinite = has_infinity(score);
      if (infinite) repair_scores(operands, tile, q, score);
      nearest.add(score, from / 16 + tile);
    }
    nearest.reduce();
    const float other = __shfl_sync(~0u, nearest.best[0], lane_of_token(lane));
    const int other_group = __shfl_sync(~0u, nearest.group[0], lane_of_token(lane));
    if (other > best) {  // the lowest group wins a tie
      best = other;
      group = other_group;
    }
    __syncthreads();
    for (int g = warp; g < groups; g += blockDim.x / 32) {
      const uint32_t word =
          choose_few(scores + g * stride, sizes.num_tokens, sizes.num_keys, scratch);
      if (lane < kMaskWords) {
        masks[(from + g) * kMaskWords + lane] = word;
        choice.masks[(bh * sizes.num_groups + from + g) * kMaskWords + lane] = word;
      }
      __syncwarp();  // before the scratch is used again
    }
    __syncthreads();
  }
  copy_head(values, to.value, sizes, padded);
  ptx::commit_copies();
  Row<T> q[N];
  load_queries(q);
  if (nan_group < sizes.num_groups) group = nan_group;
  const bool exists = first + lane < sizes.num_tokens;
  if (exists) choice.group[bh * sizes.num_tokens + first + lane] = group;
  if (choice.sums != nullptr) {
    store_members(members + warp * sizes.num_groups, exists ? group : -1,
                  sizes.num_groups);
    store_normalised(normalised, q, first, padded);
  }
  int own_group[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    own_group[i] = __shfl_sync(~0u, group, 8 * i + lane / 4);
  }
  ptx::wait_for_copies<0>();
  key_norm = block_max(key_norm, norm_scratch);
  attend_tile(to, {q[0], q[1]}, keys, values, masks, {own_group[0], own_group[1]}, first,
              key_norm);
  if (first + 16 < sizes.num_tokens) {
    attend_tile(to, {q[2], q[3]}, keys, values, masks, {own_group[2], own_group[3]},
                first + 16, key_norm);
  }
  if (choice.sums != nullptr) {
    const int64_t from = bh * sizes.num_groups;
    sum_head(normalised, members, sizes, choice.sums + from * sizes.dim,
             choice.counts + from);
  }
}

template <typename T>
Forward<T> forward_of(const at::Tensor& query, const at::Tensor& key,
                      const at::Tensor& value, const int* group, const int* index,
                      const Sizes& sizes, double scale, at::Tensor& out,
                      at::Tensor& logsumexp) {
  return {Rows<const T>(query),
          Rows<const T>(key),
          Rows<const T>(value),
          group,
          index,
          Rows<T>(out),
          logsumexp.mutable_data_ptr<float>(),
          sizes,
          static_cast<float>(scale)};
}

}  // namespace

bool has_few_tokens(const at::Tensor& tokens) {
  return tokens.size(2) <= kMaxTokens && tokens.size(3) <= kDim &&
         tokens.element_size() == 2;
}

void masked_attention(const at::Tensor& query, const at::Tensor& key,
                      const at::Tensor& value, const at::Tensor& group,
                      const at::Tensor& index, double scale, at::Tensor& out,
                      at::Tensor& logsumexp) {
  const Sizes sizes(query, index.size(2), index.size(3));
  dispatch_few(query, warps_for(sizes), [&](auto type, auto warps) {
    using T = typename decltype(type)::type;
    launch(masked_kernel<T, decltype(warps)::value>, grid_of_heads(1, query),
           32 * warps_for(sizes),
           2 * padded_rows(sizes.num_tokens) * Shared<T>::kRowBytes +
               sizes.num_groups * kMaskWords * sizeof(uint32_t),
           forward_of<T>(query, key, value, group.const_data_ptr<int>(),
                         index.const_data_ptr<int>(), sizes, scale, out, logsumexp));
  });
}

void choose_and_attend(const at::Tensor& query, const at::Tensor& key,
                       const at::Tensor& value, const at::Tensor& centroids,
                       int64_t num_keys, double scale, at::Tensor& out,
                       at::Tensor& logsumexp, at::Tensor& group, at::Tensor& masks,
                       at::Tensor& sums, at::Tensor& counts) {
  const Sizes sizes(query, centroids.size(1), num_keys);
  dispatch_few(query, warps_for(sizes), [&](auto type, auto warps) {
    using T = typename decltype(type)::type;
    launch(
        choose_and_attend_kernel<T, decltype(warps)::value>, grid_of_heads(1, query),
        32 * warps_for(sizes), ChoiceMemory<T>(sizes, warps_for(sizes)).end,
        forward_of<T>(query, key, value, nullptr, nullptr, sizes, scale, out, logsumexp),
        Choice{centroids.const_data_ptr<float>(), group.mutable_data_ptr<int>(),
               reinterpret_cast<uint32_t*>(masks.mutable_data_ptr<int>()),
               sums.numel() > 0 ? sums.mutable_data_ptr<float>() : nullptr,
               counts.mutable_data_ptr<int>()});
  });
}

}  // namespace mmdgt::cuda
