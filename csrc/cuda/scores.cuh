// Scores of tokens by centroids, e_j . x, to float32 accuracy on tensor cores.
#pragma once

#include "rows.cuh"

namespace mmdgt {

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
      FragmentA<T> operand[kTerms<T>];
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        const int group = first + 16 * tile + lane / 4 + 8 * (x % 2);
        // The elements that RowFragment puts there.
        const int column =
            32 * (step / 2) + 8 * (lane % 4) + 4 * (step % 2) + 2 * (x / 2);
        float rest[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          rest[i] = group >= num_groups ? __int_as_float(0x7fc00000)
                    : column + i < dim  ? centroids[group * dim + column + i]
                                        : 0.f;
          if (nan_group != nullptr && group < num_groups && isnan(rest[i])) {
            atomicMin(nan_group, group);
          }
        }
#pragma unroll
        for (int term = 0; term < kTerms<T>; ++term) {
          operand[term].x[x] = pack<T>(rest[0], rest[1]);
          const float2 taken = unpack<T>(operand[term].x[x]);
          rest[0] -= taken.x;
          rest[1] -= taken.y;
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

// Loads the operand rows of 8 * N tokens of one head, the i-th of which is
// token_at(i); negative ones are zero.
template <typename T, int D, int N, typename TokenAt>
__device__ __forceinline__ void load_tokens(RowFragment<T, D> (&tokens)[N], const T* head,
                                            int token_stride, int dim,
                                            TokenAt&& token_at) {
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int token = token_at(8 * n + threadIdx.x % 32 / 4);
    if (token >= 0) {
      tokens[n].load(head + static_cast<int64_t>(token) * token_stride, dim);
    } else {
      tokens[n].clear();
    }
  }
}

}  // namespace mmdgt
