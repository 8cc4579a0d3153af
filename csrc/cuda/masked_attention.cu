// Group attention for few tokens: a block serves one head of one image, all of whose
// keys it holds in shared memory. One bit per group and key tells who sees what.
//
// The tensor cores multiply what a query does not see too, with a probability of zero.
// That goes wrong where a number is not finite, or a row of probabilities leaves the
// range of the type: such rows are noticed by their results, and done again one key at
// a time.
#include "masked_attention.h"

#include "attention.cuh"
#include "few_keys.cuh"
#include "scores.cuh"

namespace mmdgt::cuda {
namespace {

constexpr int kDim = kMaxFewHeadDim;
constexpr int kMaxTokens = kMaxFewTokens;
constexpr int kMaxWarps = kMaxTokens / 32;
// Warps of the multiprocessor: three blocks at the 196 tokens of ImageNet.
constexpr int kResidentWarps = 21;

template <typename T>
using Shared = SharedRows<T, kDim>;
template <typename T>
using Row = RowFragment<T, kDim>;

// Copies the rows of one head to shared memory; rows up to `padded` become zero.
template <typename T>
__device__ __forceinline__ void copy_head(const Shared<T>& shared,
                                          const Rows<const T>& rows, const Sizes& sizes,
                                          int padded) {
  constexpr int kChunks = Shared<T>::kChunks;
  const T* head = rows.head();
  for (int i = threadIdx.x; i < padded * kChunks; i += blockDim.x) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool valid =
        row < sizes.num_tokens && chunk * Shared<T>::kChunkElements < sizes.dim;
    shared.copy_async(row, chunk, rows.row(head, valid ? row : 0), valid);
  }
}

// masks[group][word]: which keys each group sees, from index (G,K) of the head, one bit
// per key. By all threads of the block, which have to meet before and after.
__device__ __forceinline__ void fill_masks(uint32_t* masks, const int* __restrict__ index,
                                           const Sizes& sizes) {
  constexpr int kBatch = 4;  // loads under way at once
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int g = warp; g < sizes.num_groups; g += blockDim.x / 32) {
    uint32_t* words = masks + g * kMaskWords;
    if (lane < kMaskWords) words[lane] = 0;
    __syncwarp();
    for (int i = lane; i < sizes.num_keys; i += 32 * kBatch) {
      int token[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int at = min(i + 32 * j, sizes.num_keys - 1);  // the last one twice
        token[j] = index[g * sizes.num_keys + at];
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        // A token out of range must not do harm.
        const int own = min(max(token[j], 0), sizes.num_tokens - 1);
        atomicOr(&words[own / 32], 1u << own % 32);
      }
    }
  }
}

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

// Not so small that a bias times it is not negligible.
__device__ __forceinline__ float masked_scale_log2(float scale) {
  return fmaxf(fabsf(scale) * kLog2E, 0x1p-100f);
}

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
  const Row<T> k = keys.load_row(from + 8 * kTile + threadIdx.x % 32 / 4);
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

// Sum over the lanes of a warp.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// One row of attention, one key at a time, an element of D per lane.
template <typename T>
__device__ __forceinline__ void attend_row(const Forward<T>& to, int token,
                                           const uint32_t* seen) {
  const int lane = threadIdx.x % 32;
  const bool inside = lane < to.sizes.dim;
  const auto element = [&](const Rows<const T>& rows, int t) {
    return inside ? to_float(rows.row(rows.head(), t)[lane]) : 0.f;
  };
  const float q = element(to.query, token);
  float highest = -INFINITY, sum = 0.f, o = 0.f;
  for (int t = 0; t < to.sizes.num_tokens; ++t) {
    if (!(seen[t / 32] >> t % 32 & 1)) continue;
    const float score = warp_sum(q * element(to.key, t)) * to.scale;
    const float high = fmaxf(highest, score), base = high == -INFINITY ? 0.f : high;
    const float factor = expf(highest - base), p = expf(score - base);
    highest = high;
    sum = sum * factor + p;
    o = o * factor + p * element(to.value, t);
  }
  if (inside) to.out.row(to.out.head(), token)[lane] = static_cast<T>(o / sum);
  if (lane == 0) {
    to.logsumexp[own_head() * to.sizes.num_tokens + token] = highest + logf(sum);
  }
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
  const int padded = (to.sizes.num_tokens + 15) / 16 * 16;
  const uint32_t* seen[2] = {masks + group[0] * kMaskWords,
                             masks + group[1] * kMaskWords};
  const float scale_log2 = masked_scale_log2(to.scale);
  Row<T> q[2] = {queries[0], queries[1]};
  if (to.scale < 0.f) {
    q[0].negate();
    q[1].negate();
  }
  // Probabilities are 2^(score * scale_log2 - shift). What keeps them within bfloat16
  // follows from the lengths; float16 has to know the maximum.
  float shift[2];
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

  // The output is divided by the sum of the probabilities as they were rounded, so that
  // a key that stands alone comes out as it is. The logsumexp has them before that.
  const FragmentB<T> ones{{pack<T>(1.f, 1.f), pack<T>(1.f, 1.f)}};
  float o[kDim / 8][4] = {}, rounded[4] = {}, sum[2] = {0.f, 0.f};
  for (int from = 0; from < padded; from += 32) {
    const Bias bias[2] = {Bias(seen[0][from / 32]), Bias(seen[1][from / 32])};
    float p[4][4];
    const auto attend = [&](auto tile) {
      constexpr int kTile = decltype(tile)::value;
      score_tile<T, kTile>(p[kTile], q, keys, from, bias);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        p[kTile][i] = ptx::exp2_approx(fmaf(p[kTile][i], scale_log2, -shift[i / 2]));
        sum[i / 2] += p[kTile][i];
      }
      if constexpr (kTile % 2 == 1) {
        const FragmentA<T> a = as_operand<T>(p[kTile - 1], p[kTile]);
        mma(rounded, a, ones);
#pragma unroll
        for (int pair = 0; pair < kDim / 16; ++pair) {
          FragmentB<T> v[2];
          values.load_columns(from + 8 * (kTile - 1), pair, v);
          mma(o[2 * pair], a, v[0]);
          mma(o[2 * pair + 1], a, v[1]);
        }
      }
    };
    attend(std::integral_constant<int, 0>());
    attend(std::integral_constant<int, 1>());
    if (from + 16 < padded) {
      attend(std::integral_constant<int, 2>());
      attend(std::integral_constant<int, 3>());
    }
  }

  // One bit per lane whose part of row lane / 4 (+ 8) has to be done again.
  uint32_t again[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] = quad_sum(sum[half]);
    float size = sum[half];  // not finite if an element is not
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      size += fabsf(o[n][2 * half]) + fabsf(o[n][2 * half + 1]);
    }
    const int token = first + 8 * half + lane / 4;
    const bool exists = token < to.sizes.num_tokens;
    const bool good = sum[half] >= 0x1p-80f && size <= 3e38f;
    again[half] = __ballot_sync(~0u, exists && !good);
    const bool write = exists && (again[half] >> (lane & 28) & 15) == 0;
    store_row<T, kDim>(o, half, __frcp_rn(rounded[2 * half]),
                       write ? to.out.row(to.out.head(), token) : nullptr, to.sizes.dim);
    if (write && lane % 4 == 0) {
      to.logsumexp[own_head() * to.sizes.num_tokens + token] =
          kLn2 * (shift[half] + log2f(sum[half]));
    }
  }
  if ((again[0] | again[1]) == 0) return;
  for (int row = 0; row < 16; ++row) {
    if (((row < 8 ? again[0] : again[1]) >> 4 * (row % 8) & 15) == 0) continue;
    const int own_group = row < 8 ? group[0] : group[1];
    attend_row(to, first + row,
               masks + __shfl_sync(~0u, own_group, 4 * (row % 8)) * kMaskWords);
  }
}

// The largest of what the block's warps bring, which have to meet afterwards.
__device__ __forceinline__ float block_max(float x, float (&scratch)[kMaxWarps]) {
  x = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(x)));  // x >= 0
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  for (int w = 0; w < blockDim.x / 32; ++w) x = fmaxf(x, scratch[w]);
  return x;
}

// Rows of shared memory for so many tokens: whole tiles of 16.
MMDGT_HOST_DEVICE int padded_rows(int num_tokens) { return (num_tokens + 15) / 16 * 16; }

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
    key_norm = fmaxf(key_norm, sqrtf(square_sum(keys.load_row(row + lane / 4))));
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

// Shared memory of choose_and_attend_kernel. Values take the place of scores.
template <typename T>
struct ChoiceMemory {
  using Operands = CentroidOperands<T, kDim>;
  int scores, operands, masks, scratch, end;  // offsets, in bytes

  MMDGT_HOST_DEVICE ChoiceMemory(const Sizes& sizes, int warps) {
    const int padded = padded_rows(sizes.num_tokens);
    const int groups = (sizes.num_groups + 15) / 16;
    const int tiles = groups < kScoredTiles ? groups : kScoredTiles;
    const int rows = padded * Shared<T>::kRowBytes;
    const int score_bytes = 16 * tiles * stride(sizes) * 4;
    scores = rows;
    operands = scores + (score_bytes > rows ? score_bytes : rows);
    masks = operands + tiles * static_cast<int>(Operands::kTileBytes);
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
};

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
  const auto token_at = [&](int i) {
    return first + i < sizes.num_tokens ? first + i : -1;
  };
  float key_norm = 0.f;
  NearestGroups<N> nearest;
  bool infinite_key = false, infinite_query = false;
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
      k[i] = keys.load_row(first + 8 * i + lane / 4);
      if (from == 0) key_norm = fmaxf(key_norm, sqrtf(square_sum(k[i])));
    }
    for (int tile = 0; 16 * tile < groups; ++tile) {
      float score[N][4];
      score_tokens<T, kDim, N>(operands, tile, k, score);
      if (tile == 0 && from == 0) infinite_key = has_infinity(score);
      if (infinite_key) {
        repair_scores(score, to.key, centroids, from + 16 * tile, sizes, token_at);
      }
#pragma unroll
      for (int n = 0; n < N; ++n) {
        if (first + 8 * n >= padded) continue;
        float* target =
            scores + (16 * tile + lane / 4) * stride + first + 8 * n + 2 * (lane % 4);
        *reinterpret_cast<float2*>(target) = make_float2(score[n][0], score[n][1]);
        *reinterpret_cast<float2*>(target + 8 * stride) =
            make_float2(score[n][2], score[n][3]);
      }
      score_tokens<T, kDim, N>(operands, tile, q, score);
      if (tile == 0 && from == 0) infinite_query = has_infinity(score);
      if (infinite_query) {
        repair_scores(score, to.query, centroids, from + 16 * tile, sizes, token_at);
      }
      nearest.add(score, from / 16 + tile);
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
  nearest.reduce();
  const int group = nan_group < sizes.num_groups ? nan_group : nearest.group[0];
  const int own = first + nearest.own_token(0);
  if (own < sizes.num_tokens) choice.group[bh * sizes.num_tokens + own] = group;
  int own_group[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    own_group[i] = __shfl_sync(~0u, group, lane_of_token(8 * i + lane / 4));
  }
  ptx::wait_for_copies<0>();
  key_norm = block_max(key_norm, norm_scratch);
  attend_tile(to, {q[0], q[1]}, keys, values, masks, {own_group[0], own_group[1]}, first,
              key_norm);
  if (first + 16 >= sizes.num_tokens) return;
  attend_tile(to, {q[2], q[3]}, keys, values, masks, {own_group[2], own_group[3]},
              first + 16, key_norm);
}

// The gradient of one query, one key at a time, an element of D per lane.
template <typename T>
__device__ __forceinline__ void grad_query_row(const Backward<T>& to, int token,
                                               const uint32_t* seen, float2 statistic) {
  const int lane = threadIdx.x % 32;
  const bool inside = lane < to.sizes.dim;
  const auto element = [&](const Rows<const T>& rows, int t) {
    return inside ? to_float(rows.row(rows.head(), t)[lane]) : 0.f;
  };
  const float q = element(to.query, token), d_out = element(to.grad_out, token);
  float sum = 0.f;
  for (int t = 0; t < to.sizes.num_tokens; ++t) {
    if (!(seen[t / 32] >> t % 32 & 1)) continue;
    const float k = element(to.key, t);
    const float score = warp_sum(q * k) * to.scale * kLog2E;
    const float d_p = warp_sum(d_out * element(to.value, t));
    sum += exp2f(score - statistic.x) * (d_p - statistic.y) * k;
  }
  if (inside) {
    to.grad_query.row(to.grad_query.head(), token)[lane] = static_cast<T>(sum * to.scale);
  }
}

// The gradients of one key and its value, one query at a time.
template <typename T>
__device__ __forceinline__ void grad_key_row(const Backward<T>& to, int token,
                                             const uint32_t* seen,
                                             const float2* statistic) {
  const int lane = threadIdx.x % 32;
  const bool inside = lane < to.sizes.dim;
  const auto element = [&](const Rows<const T>& rows, int t) {
    return inside ? to_float(rows.row(rows.head(), t)[lane]) : 0.f;
  };
  const float k = element(to.key, token), v = element(to.value, token);
  float d_key = 0.f, d_value = 0.f;
  for (int t = 0; t < to.sizes.num_tokens; ++t) {
    if (!(seen[t * kMaskWords + token / 32] >> token % 32 & 1)) continue;
    const float q = element(to.query, t), d_out = element(to.grad_out, t);
    const float score = warp_sum(q * k) * to.scale * kLog2E;
    const float p = exp2f(score - statistic[t].x);
    d_value += p * d_out;
    d_key += p * (warp_sum(d_out * v) - statistic[t].y) * q;
  }
  if (!inside) return;
  to.grad_key.row(to.grad_key.head(), token)[lane] = static_cast<T>(d_key * to.scale);
  to.grad_value.row(to.grad_value.head(), token)[lane] = static_cast<T>(d_value);
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

// First dQ, query by query, then dK and dV, key by key. Masks (B,H,G,kMaskWords)
// are made from the index where there are none.
template <typename T, int kWarps>
__global__ void __launch_bounds__(32 * kWarps, kResidentWarps / kWarps)
    masked_backward_kernel(Backward<T> to, const uint32_t* __restrict__ masks) {
  __shared__ float2 statistic[kMaxTokens];  // logsumexp * log2(e), delta
  char* shared = dynamic_shared();
  const Sizes& sizes = to.sizes;
  const int64_t bh = own_head();
  const int padded = padded_rows(sizes.num_tokens);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int bytes = padded * Shared<T>::kRowBytes;
  const Shared<T> keys(shared), values(shared + bytes);
  const Shared<T> queries(shared + 2 * bytes), grads(shared + 3 * bytes);
  auto* seen = reinterpret_cast<uint32_t*>(shared + 4 * bytes);  // [query][word]
  uint32_t* of_group = seen + padded * kMaskWords;
  copy_head(keys, to.key, sizes, padded);
  copy_head(values, to.value, sizes, padded);
  copy_head(queries, to.query, sizes, padded);
  copy_head(grads, to.grad_out, sizes, padded);
  ptx::commit_copies();
  if (masks == nullptr) {
    fill_masks(of_group, to.index + bh * sizes.num_groups * sizes.num_keys, sizes);
  } else {
    masks += bh * sizes.num_groups * kMaskWords;
    for (int i = threadIdx.x; i < sizes.num_groups * kMaskWords; i += blockDim.x) {
      of_group[i] = masks[i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < padded * kMaskWords; i += blockDim.x) {
    const int query = i / kMaskWords;
    seen[i] = 0;
    if (query < sizes.num_tokens) {
      const int g =
          min(max(to.group[bh * sizes.num_tokens + query], 0), sizes.num_groups - 1);
      seen[i] = of_group[g * kMaskWords + i % kMaskWords];
    }
  }
  ptx::wait_for_copies<0>();
  __syncthreads();

  const float scale_log2 = masked_scale_log2(to.scale);
  for (int first = 16 * warp; first < sizes.num_tokens; first += blockDim.x / 2) {
    Row<T> q[2], g[2];
    float lse_log2[2], delta[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first + 8 * half + lane / 4;
      q[half] = queries.load_row(token);
      if (to.scale < 0.f) q[half].negate();
      g[half] = grads.load_row(token);
      Row<T> o;
      o.clear();
      lse_log2[half] = 0.f;
      delta[half] = 0.f;
      if (token < sizes.num_tokens) {
        o.load(to.out.row(to.out.head(), token), sizes.dim);
        lse_log2[half] = to.logsumexp[bh * sizes.num_tokens + token] * kLog2E;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 a = unpack<T>(g[half].x[0][i]), b = unpack<T>(o.x[0][i]);
        delta[half] += a.x * b.x + a.y * b.y;
      }
      delta[half] = quad_sum(delta[half]);
      if (lane % 4 == 0) statistic[token] = make_float2(lse_log2[half], delta[half]);
    }
    const uint32_t* own_seen = seen + (first + lane / 4) * kMaskWords;
    float d_query[kDim / 8][4] = {};
    for (int from = 0; from < padded; from += 32) {
      const Bias bias[2] = {Bias(own_seen[from / 32]),
                            Bias(own_seen[8 * kMaskWords + from / 32])};
      float ds[4][4];
      const auto add = [&](auto tile) {
        constexpr int kTile = decltype(tile)::value;
        score_tile<T, kTile>(ds[kTile], q, keys, from, bias);
        float dp[4] = {};
        const Row<T> v = values.load_row(from + 8 * kTile + lane / 4);
#pragma unroll
        for (int step = 0; step < kDim / 16; ++step) {
          mma(dp, operand_a(g[0], g[1], step), v.operand_b(step));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float p =
              ptx::exp2_approx(fmaf(ds[kTile][i], scale_log2, -lse_log2[i / 2]));
          ds[kTile][i] = p * (dp[i] - delta[i / 2]);
        }
        if constexpr (kTile % 2 == 1) {
          const FragmentA<T> a = as_operand<T>(ds[kTile - 1], ds[kTile]);
#pragma unroll
          for (int pair = 0; pair < kDim / 16; ++pair) {
            FragmentB<T> k[2];
            keys.load_columns(from + 8 * (kTile - 1), pair, k);
            mma(d_query[2 * pair], a, k[0]);
            mma(d_query[2 * pair + 1], a, k[1]);
          }
        }
      };
      add(std::integral_constant<int, 0>());
      add(std::integral_constant<int, 1>());
      if (from + 16 < padded) {
        add(std::integral_constant<int, 2>());
        add(std::integral_constant<int, 3>());
      }
    }
    uint32_t again[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first + 8 * half + lane / 4;
      const bool exists = token < sizes.num_tokens;
      const bool good = row_is_finite(d_query, half);
      again[half] = __ballot_sync(~0u, exists && !good);
      store_row<T, kDim>(
          d_query, half, to.scale,
          exists && good ? to.grad_query.row(to.grad_query.head(), token) : nullptr,
          sizes.dim);
    }
    if ((again[0] | again[1]) == 0) continue;
    __syncwarp();  // for the statistics
    for (int row = 0; row < 16; ++row) {
      if (((row < 8 ? again[0] : again[1]) >> 4 * (row % 8) & 1) == 0) continue;
      grad_query_row(to, first + row, seen + (first + row) * kMaskWords,
                     statistic[first + row]);
    }
  }
  __syncthreads();

  for (int first = 16 * warp; first < sizes.num_tokens; first += blockDim.x / 2) {
    Row<T> k[2], v[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      k[half] = keys.load_row(first + 8 * half + lane / 4);
      if (to.scale < 0.f) k[half].negate();
      v[half] = values.load_row(first + 8 * half + lane / 4);
    }
    float d_key[kDim / 8][4] = {}, d_value[kDim / 8][4] = {};
    for (int from = 0; from < padded; from += 16) {
      float p[2][4], ds[2][4] = {};  // P^T, dS^T
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const int row = from + 8 * n;
        float2 own[2];  // of columns 2 * (lane % 4) + {0, 1}
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const int column = row + 2 * (lane % 4) + odd;
          own[odd] = statistic[column];
          const uint32_t bits = seen[column * kMaskWords + first / 32] >> first % 32;
          const uint32_t hidden = ~bits << (7 - lane / 4);
          p[n][odd] = __uint_as_float(ptx::top_sign_byte<0>(hidden));
          p[n][2 + odd] = __uint_as_float(ptx::top_sign_byte<1>(hidden));
        }
        const Row<T> q = queries.load_row(row + lane / 4);
        const Row<T> g = grads.load_row(row + lane / 4);
#pragma unroll
        for (int step = 0; step < kDim / 16; ++step) {
          mma(p[n], operand_a(k[0], k[1], step), q.operand_b(step));
          mma(ds[n], operand_a(v[0], v[1], step), g.operand_b(step));
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          p[n][i] = ptx::exp2_approx(fmaf(p[n][i], scale_log2, -own[i % 2].x));
          ds[n][i] = p[n][i] * (ds[n][i] - own[i % 2].y);
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
    uint32_t again[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = first + 8 * half + lane / 4;
      const bool exists = token < sizes.num_tokens;
      const bool good_key = row_is_finite(d_key, half);  // by the whole warp, both
      const bool good = row_is_finite(d_value, half) && good_key;
      again[half] = __ballot_sync(~0u, exists && !good);
      const bool write = exists && good;
      store_row<T, kDim>(d_key, half, to.scale,
                         write ? to.grad_key.row(to.grad_key.head(), token) : nullptr,
                         sizes.dim);
      store_row<T, kDim>(d_value, half, 1.f,
                         write ? to.grad_value.row(to.grad_value.head(), token) : nullptr,
                         sizes.dim);
    }
    for (int row = 0; row < 16; ++row) {
      if (((row < 8 ? again[0] : again[1]) >> 4 * (row % 8) & 1) == 0) continue;
      grad_key_row(to, first + row, seen, statistic);
    }
  }
}

// Calls run(Type<T>, integral_constant<int, kWarps>): of at most so many warps.
template <typename Run>
void dispatch_few(const at::Tensor& tokens, int warps, Run&& run) {
  const auto with_warps = [&](auto type) {
    if (warps < kMaxWarps) return run(type, std::integral_constant<int, kMaxWarps - 1>());
    run(type, std::integral_constant<int, kMaxWarps>());
  };
  if (tokens.scalar_type() == at::kHalf) return with_warps(Type<__half>());
  with_warps(Type<bfloat16>());
}

// Warps of a block, of 32 tokens each.
int warps_for(const Sizes& sizes) {
  return static_cast<int>(ceil_div(sizes.num_tokens, 32));
}

// Bytes of shared memory: so many operands of all rows, masks of the groups and, in
// the backward pass, of the queries.
size_t masked_bytes(const Sizes& sizes, int operands, int masked_rows) {
  return operands * padded_rows(sizes.num_tokens) * kDim * 2 +
         (masked_rows + sizes.num_groups) * kMaskWords * 4;
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
           32 * warps_for(sizes), masked_bytes(sizes, 2, 0),
           forward_of<T>(query, key, value, group.const_data_ptr<int>(),
                         index.const_data_ptr<int>(), sizes, scale, out, logsumexp));
  });
}

void choose_and_attend(const at::Tensor& query, const at::Tensor& key,
                       const at::Tensor& value, const at::Tensor& centroids,
                       int64_t num_keys, double scale, at::Tensor& out,
                       at::Tensor& logsumexp, at::Tensor& group, at::Tensor& masks) {
  const Sizes sizes(query, centroids.size(1), num_keys);
  dispatch_few(query, warps_for(sizes), [&](auto type, auto warps) {
    using T = typename decltype(type)::type;
    launch(
        choose_and_attend_kernel<T, decltype(warps)::value>, grid_of_heads(1, query),
        32 * warps_for(sizes), ChoiceMemory<T>(sizes, warps_for(sizes)).end,
        forward_of<T>(query, key, value, nullptr, nullptr, sizes, scale, out, logsumexp),
        Choice{centroids.const_data_ptr<float>(), group.mutable_data_ptr<int>(),
               reinterpret_cast<uint32_t*>(masks.mutable_data_ptr<int>())});
  });
}

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
           32 * warps_for(sizes), masked_bytes(sizes, 4, padded_rows(sizes.num_tokens)),
           to, from_masks ? reinterpret_cast<const uint32_t*>(chosen) : nullptr);
  });
}

}  // namespace mmdgt::cuda
