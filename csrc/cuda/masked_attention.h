// Group attention for few tokens, where dense products with one bit per query and
// key beat any gathering.
#pragma once

#include <ATen/core/Tensor.h>

namespace mmdgt::cuda {

// Whether these kernels serve (B,H,L,D) tokens.
bool has_few_tokens(const at::Tensor& tokens);

// Arguments and results as in dynamic_group_attention.h; rows are aligned.
void masked_attention(const at::Tensor& query, const at::Tensor& key,
                      const at::Tensor& value, const at::Tensor& group,
                      const at::Tensor& index, double scale, at::Tensor& out,
                      at::Tensor& logsumexp);

// Assigns, selects and attends in one go; centroids and results as in
// dynamic_group_attention.h. The sums (B,H,G,D) and counts (B,H,G) of eq. 3 are those of
// each image, left out if empty.
void choose_and_attend(const at::Tensor& query, const at::Tensor& key,
                       const at::Tensor& value, const at::Tensor& centroids,
                       int64_t num_keys, double scale, at::Tensor& out,
                       at::Tensor& logsumexp, at::Tensor& group, at::Tensor& masks,
                       at::Tensor& sums, at::Tensor& counts);

// `choice` is index (B,H,G,K) or, if `from_masks`, the masks of choose_and_attend.
void masked_attention_backward(const at::Tensor& grad_out, const at::Tensor& query,
                               const at::Tensor& key, const at::Tensor& value,
                               const at::Tensor& group, const at::Tensor& choice,
                               const at::Tensor& out, const at::Tensor& logsumexp,
                               double scale, bool from_masks, at::Tensor& grad_query,
                               at::Tensor& grad_key, at::Tensor& grad_value);

}  // namespace mmdgt::cuda
