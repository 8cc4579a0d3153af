// Parts that the forward and the backward pass of attention for few tokens share: a
// block serves one head of one image, all of whose keys it holds in shared memory. One
// bit per group and key tells who sees what.
//
// The tensor cores multiply what a query does not see too, with a probability of zero.
// That goes wrong where a number is not finite, or a row of probabilities leaves the
// range of the type: such rows are noticed by their results, and done again one key at
// a time.
#pragma once

#include "../common/limits.h"
#include "../common/score_order.h"
#include "attention.cuh"
#include "masked_attention.h"

namespace mmdgt::cuda::masked {

constexpr int kDim = kMaxFewHeadDim;
constexpr int kMaxTokens = kMaxFewTokens;
constexpr int kMaxWarps = kMaxTokens / 32;

template <typename T>
using Shared = SharedRows<T, kDim>;
template <typename T>
using Row = RowFragment<T, kDim>;

// Rows of shared memory for so many tokens: whole tiles of 16.
MMDGT_HOST_DEVICE int padded_rows(int num_tokens) { return (num_tokens + 15) / 16 * 16; }

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
inline int warps_for(const Sizes& sizes) {
  return static_cast<int>(ceil_div(sizes.num_tokens, 32));
}

}  // namespace mmdgt::cuda::masked
