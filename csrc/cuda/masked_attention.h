// Group attention for few tokens, where dense products with one bit per query and
// key beat any gathering.
#pragma once

#include <ATen/core/Tensor.h>

namespace mmdgt {

// Whether these kernels serve (B,H,L,D) tokens.
bool has_few_tokens(const at::Tensor& tokens);

// Arguments and results as in dynamic_group_attention.h; rows are aligned.
void masked_attention(const at::Tensor& query, const at::Tensor& key,
                      const at::Tensor& value, const at::Tensor& group,
                      const at::Tensor& index, double scale, at::Tensor& out,
                      at::Tensor& logsumexp);

void masked_attention_backward(const at::Tensor& grad_out, const at::Tensor& query,
                               const at::Tensor& key, const at::Tensor& value,
                               const at::Tensor& group, const at::Tensor& index,
                               const at::Tensor& out, const at::Tensor& logsumexp,
                               double scale, at::Tensor& grad_query, at::Tensor& grad_key,
                               at::Tensor& grad_value);

}  // namespace mmdgt
