// Queries ordered by group, for kernels that serve a group at a time.
#pragma once

#include <ATen/core/Tensor.h>

namespace mmdgt {

struct SortedQueries {
  at::Tensor order;    // (B,H,L) int32: tokens by group, then by token
  at::Tensor offsets;  // (B,H,G+1) int32: where each group begins in it
};

// group (B,H,L) int32
SortedQueries sort_queries(const at::Tensor& group, int64_t num_groups);

}  // namespace mmdgt
