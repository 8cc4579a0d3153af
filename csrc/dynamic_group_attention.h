// The operators of Dynamic Group attention. Each `*_impl` is an entry of mmcv's
// device registry (pytorch_device_registry.hpp): a device's kernels are registered with
// REGISTER_DEVICE_IMPL(name_impl, DEVICE, function).
//
// Letters: B batch, H heads, L tokens, D head dim, G groups, K keys per group.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <tuple>

#include "common/limits.h"

namespace mmdgt {

// query (B,H,L,D), centroids (H,G,D) float32
// -> group (B,H,L) int32, sums (H,G,D) float32, counts (H,G) int32.
// The sums and counts of eq. 3 have shape (0,) unless with_sums.
std::tuple<at::Tensor, at::Tensor, at::Tensor> assign_queries_impl(
    const at::Tensor& query, const at::Tensor& centroids, bool with_sums);

// key (B,H,L,D), centroids (H,G,D) float32 -> index (B,H,G,K) int32 (eq. 1),
// K = num_keys, which is at most L.
at::Tensor select_keys_impl(const at::Tensor& key, const at::Tensor& centroids,
                            int64_t num_keys, bool sorted);

// query, key, value (B,H,L,D), group (B,H,L) int32, index (B,H,G,K) int32
// -> out (B,H,L,D), in memory (B,L,H,D), and logsumexp (B,H,L) (eq. 2).
std::tuple<at::Tensor, at::Tensor> group_attention_impl(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& group, const at::Tensor& index, double scale);

// -> the gradients of query, key and value, each (B,H,L,D), in memory (B,L,H,D).
std::tuple<at::Tensor, at::Tensor, at::Tensor> group_attention_backward_impl(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& group, const at::Tensor& index,
    const at::Tensor& out, const at::Tensor& logsumexp, double scale);

// For up to kMaxFewTokens tokens, on a GPU: assigns, selects and attends in one go.
// query, key, value (B,H,L,D), centroids (H,G,D) float32 -> out and logsumexp as from
// group_attention; group, sums, counts as from assign_queries; masks
// (B,H,G,kMaxFewTokens / 32) int32, bit t % 32 of word t / 32 for key t of a group.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>
choose_and_attend_impl(const at::Tensor& query, const at::Tensor& key,
                       const at::Tensor& value, const at::Tensor& centroids,
                       int64_t num_keys, double scale, bool with_sums);

// As group_attention_backward, from the masks.
std::tuple<at::Tensor, at::Tensor, at::Tensor> choose_and_attend_backward_impl(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key,
    const at::Tensor& value, const at::Tensor& group, const at::Tensor& masks,
    const at::Tensor& out, const at::Tensor& logsumexp, double scale);

// A new (B,H,L,D) tensor with memory order (B,L,H,D), so that merging the heads
// into (B,L,C) costs nothing.
inline at::Tensor empty_heads_last(const at::Tensor& like) {
  return at::empty({like.size(0), like.size(2), like.size(1), like.size(3)},
                   like.options())
      .transpose(1, 2);
}

}  // namespace mmdgt
