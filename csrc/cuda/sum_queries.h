// The sums of eq. 3.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace mmdgt::cuda {

// query (B,H,L,D), group (B,H,L) int32 in [0, G) -> sums (H,G,D) float32 of the
// normalised queries and counts (H,G) int32 of the groups.
std::tuple<at::Tensor, at::Tensor> sum_queries(const at::Tensor& query,
                                               const at::Tensor& group,
                                               int64_t num_groups);

// The sum of parts, sums (P,H,G,D) and counts (P,H,G), in a fixed order.
std::tuple<at::Tensor, at::Tensor> add_parts(const at::Tensor& sums,
                                             const at::Tensor& counts);

// What stands for sums and counts that nobody asked for, on the tensors' device.
std::tuple<at::Tensor, at::Tensor> no_sums(const at::TensorOptions& options);

}  // namespace mmdgt::cuda
