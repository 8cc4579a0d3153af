// Queries ordered by group, for kernels that serve a group at a time, and choices
// ordered by token, for those that serve a token.
#pragma once

#include <ATen/core/Tensor.h>

namespace mmdgt::cuda {

struct SortedQueries {
  at::Tensor order;    // (B,H,L) int32: tokens by group, then by token
  at::Tensor offsets;  // (B,H,G+1) int32: where each group begins in it
  // (B,H,max_tiles,4) int32: the groups cut into tiles of a size, one after the
  // other, each as group, begin, end, 0; begin = end where there is no tile.
  at::Tensor tiles;
};

// An upper bound of the tiles of a head, known without looking at the groups.
inline int64_t max_tiles(int64_t num_tokens, int64_t num_groups, int64_t size) {
  return num_tokens / size + num_groups;
}

// group (B,H,L) int32. Tiles of tile_size queries.
SortedQueries sort_queries(const at::Tensor& group, int64_t num_groups,
                           int64_t tile_size);

// The choices of index (B,H,G,K) int32 by token, then by group.
struct SortedChoices {
  at::Tensor begins;    // (B,H,L+1) int32: where each token's choices begin
  at::Tensor choosers;  // (B,H,G*K,2) int32: the group, and the place in its row of K
};
SortedChoices sort_choices(const at::Tensor& index, int64_t num_tokens);

}  // namespace mmdgt::cuda
