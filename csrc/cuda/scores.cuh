// Scores of tokens by centroids, e_j . x, to float32 accuracy on tensor cores.
#pragma once

#include "rows.cuh"

namespace mmdgt::cuda {

// How many numbers of type T hold one float32 centroid element: a token's
// elements are exact in T, so the scores are as accurate as this sum.
template <typename T>
constexpr int kTerms = 1;
template <>
constexpr int kTerms<__half> = 2;
template <>
constexpr int kTerms<bfloat16> = 3;

// Tokens that a warp scores at a time, in tiles of 8.
template <typename T, int D>
constexpr int kTokenTiles = (D <= 64 ? 8 : 4) / sizeof(T);

// The centroids of one head as A operands, in the order in which threads read
// them: [group tile of 16][step of 16 over D][term][lane].
template <typename T, int D>
struct CentroidOperands {
  static constexpr int kSteps = D / 16;
  static constexpr int kPerTile = kSteps * kTerms<T> * 32;

  FragmentA<T>* memory;

  static constexpr size_t kTileBytes = kPerTile * sizeof(FragmentA<T>);

  static size_t bytes(int64_t num_groups) { return (num_groups + 15) / 16 * kTileBytes; }

  __device__ __forceinline__ const FragmentA<T>& operand(int tile, int step,
                                                         int term) const {
    return memory[(tile * kSteps + step) * kTerms<T> * 32 + term * 32 + threadIdx.x % 32];
  }

  // Fills the operands with groups [first, first + 16 * tiles) of centroids (G,D)
  // of one head, by all threads of the block. Groups that do not exist are NaN:
  // no comparison lets them win. Lowers *nan_group to the first one that does.
  __device__ void fill(const float* centroids, int first, int tiles, int num_groups,
                       int dim, int* nan_group = nullptr) const {
    const int lanes = tiles * kSteps * 32;
    for (int i = threadIdx.x; i < lanes; i += blockDim.x) {
      const int lane = i % 32, step = i / 32 % kSteps, tile = i / 32 / kSteps;
      // All loads first: they are under way at once.
      float2 rest[4];
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int group = first + 16 * tile + lane / 4 + 8 * (x % 2);
        // The elements that RowFragment puts there.
        const int column =
            32 * (step / 2) + 8 * (lane % 4) + 4 * (step % 2) + 2 * (x / 2);
        rest[x] = make_float2(0.f, 0.f);
        if (group < num_groups && column < dim) {
          rest[x] = *reinterpret_cast<const float2*>(centroids + group * dim + column);
        }
        if (group >= num_groups) rest[x].x = __int_as_float(0x7fc00000);
      }
      FragmentA<T> operand[kTerms<T>];
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int group = first + 16 * tile + lane / 4 + 8 * (x % 2);
        if (nan_group != nullptr && group < num_groups && isnan(rest[x].x + rest[x].y)) {
          atomicMin(nan_group, group);
        }
#pragma unroll
        for (int term = 0; term < kTerms<T>; ++term) {
          operand[term].x[x] = pack<T>(rest[x].x, rest[x].y);
          const float2 taken = unpack<T>(operand[term].x[x]);
          rest[x].x -= taken.x;
          rest[x].y -= taken.y;
        }
      }
#pragma unroll
      for (int term = 0; term < kTerms<T>; ++term) {
        memory[(i / 32 * kTerms<T> + term) * 32 + lane] = operand[term];
      }
    }
  }
};

// Scores of N tiles of 8 tokens by one tile of 16 groups. A thread gets
// score[n][0..1] of group lane / 4 and score[n][2..3] of group lane / 4 + 8, for
// the tokens 8 * n + 2 * (lane % 4) + {0, 1}.
template <typename T, int D, int N>
__device__ __forceinline__ void score_tokens(const CentroidOperands<T, D>& centroids,
                                             int tile,
                                             const RowFragment<T, D> (&tokens)[N],
                                             float (&score)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) score[n][i] = 0.f;
  }
#pragma unroll
  for (int step = 0; step < D / 16; ++step) {
#pragma unroll
    for (int term = kTerms<T> - 1; term >= 0; --term) {
      const FragmentA<T> a = centroids.operand(tile, step, term);
#pragma unroll
      for (int n = 0; n < N; ++n) mma(score[n], a, tokens[n].operand_b(step));
    }
  }
}

// One step of a reduction over the lanes that hold the groups: halves the columns
// that a lane is responsible for, as long as there are several.
template <int kBit, int kColumns, int kAll>
__device__ __forceinline__ void reduce_columns(float (&best)[kAll], int (&group)[kAll],
                                               int& column) {
  constexpr int kKept = kColumns > 1 ? kColumns / 2 : 1;
  const bool upper = kColumns > 1 && (threadIdx.x & kBit);
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    constexpr int kOther = kColumns > 1 ? kKept : 0;
    const float sent = upper ? best[i] : best[i + kOther];
    const int sent_group = upper ? group[i] : group[i + kOther];
    if (upper) {
      best[i] = best[i + kOther];
      group[i] = group[i + kOther];
    }
    const float other = __shfl_xor_sync(~0u, sent, kBit);
    const int other_group = __shfl_xor_sync(~0u, sent_group, kBit);
    // The lowest group wins a tie.
    if (other > best[i] || (other == best[i] && other_group < group[i])) {
      best[i] = other;
      group[i] = other_group;
    }
  }
  if (upper) column += kKept;
}

// The best groups of 8 * N tokens, whose scores come a tile of 16 groups at a time.
template <int N>
struct NearestGroups {
  // The reduction halves the columns three times and leaves a lane one token.
  static_assert(2 * N <= 8);

  // Column i stands for token 8 * (i / 2) + 2 * (lane % 4) + i % 2.
  float best[2 * N];
  int group[2 * N];
  int column = 0;

  __device__ __forceinline__ NearestGroups() {
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      best[i] = -INFINITY;
      group[i] = 0;
    }
  }
  __device__ __forceinline__ void add(const float (&score)[N][4], int tile) {
    const int low = 16 * tile + threadIdx.x % 32 / 4;
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      if (score[i / 2][i % 2] > best[i]) {
        best[i] = score[i / 2][i % 2];
        group[i] = low;
      }
      if (score[i / 2][2 + i % 2] > best[i]) {
        best[i] = score[i / 2][2 + i % 2];
        group[i] = low + 8;
      }
    }
  }
  // By a whole warp; then best[0] and group[0] are those of the own token.
  __device__ __forceinline__ void reduce() {
    reduce_columns<16, 2 * N>(best, group, column);
    reduce_columns<8, (2 * N > 2 ? N : 1)>(best, group, column);
    reduce_columns<4, (2 * N > 4 ? N / 2 : 1)>(best, group, column);
  }
  // Whether this lane is the first that has its token: there may be fewer columns than
  // lanes.
  __device__ __forceinline__ bool owns_token() const {
    constexpr int kShared = N >= 4 ? 0 : N == 2 ? 4 : 12;
    return (threadIdx.x & kShared) == 0;
  }
  __device__ __forceinline__ int own_token() const {
    return 8 * (column / 2) + 2 * (threadIdx.x % 4) + column % 2;
  }
};

// The lane whose own token is `token` after NearestGroups<4>::reduce().
__device__ __forceinline__ int lane_of_token(int token) {
  return (token & 24) | (token & 1) << 2 | (token >> 1 & 3);
}

// The score of one token as plain multiply-adds.
template <typename T>
__device__ __forceinline__ float plain_score(const T* token, const float* centroid,
                                             int dim) {
  float sum = 0.f;
  for (int c = 0; c < dim; c += 8) {
    Pair<T> pairs[4];
#pragma unroll
    for (int v = 0; v < static_cast<int>(sizeof(Pair<T>) / 4); ++v) {
      reinterpret_cast<uint4*>(pairs)[v] =
          __ldg(reinterpret_cast<const uint4*>(token + c) + v);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 x = unpack<T>(pairs[i]);
      sum = fmaf(x.x, centroid[c + 2 * i], sum);
      sum = fmaf(x.y, centroid[c + 2 * i + 1], sum);
    }
  }
  return sum;
}

// Whether a token's score by the first group of a tile is not finite. Then the token
// or a centroid holds an infinity or a NaN. The same for the whole warp.
template <int N>
__device__ __forceinline__ bool has_infinity(const float (&score)[N][4]) {
  bool finite = true;
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) finite &= fabsf(score[i / 2][i % 2]) <= 3e38f;
  return __ballot_sync(~0u, threadIdx.x % 32 < 4 && !finite) != 0;
}

// Terms of either sign times an infinity add up to NaN. Makes such scores of a tile of
// groups those of the leading terms, whose infinities have the sign of the whole.
template <typename T, int D, int N>
__device__ __forceinline__ void repair_scores(const CentroidOperands<T, D>& centroids,
                                              int tile,
                                              const RowFragment<T, D> (&tokens)[N],
                                              float (&score)[N][4]) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    float leading[4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      mma_leading(leading, centroids.operand(tile, step, 0), tokens[n].operand_b(step));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (isnan(score[n][i])) score[n][i] = leading[i];
    }
  }
}

// Loads the operand rows of 8 * N tokens of one head, the i-th of which is
// token_at(i); negative ones are zero.
template <typename T, int D, int N, typename TokenAt>
__device__ __forceinline__ void load_tokens(RowFragment<T, D> (&tokens)[N], const T* head,
                                            int token_stride, int dim,
                                            TokenAt&& token_at) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int token = token_at(8 * n + threadIdx.x % 32 / 4);
    // Loads without branches are under way together.
    tokens[n].load(head + static_cast<int64_t>(max(token, 0)) * token_stride, dim);
    if (token < 0) tokens[n].clear();
  }
}

}  // namespace mmdgt::cuda
