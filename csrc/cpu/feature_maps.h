// What the operators ask of feature maps (B, C, H, W).
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>

#include "kernels.h"

#define MMDGT_DISPATCH(TENSOR, NAME, ...)                                           \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, (TENSOR).scalar_type(), \
                                  NAME, __VA_ARGS__)

namespace mmdgt::cpu {

inline void check_map(const at::Tensor& x) {
  TORCH_CHECK(x.dim() == 4 && x.numel() > 0 && x.size(1) % kChannelStep == 0,
              "x must have shape (B, C, H, W), not be empty and have a C that ",
              kChannelStep, " divides, got ", x.sizes());
  TORCH_CHECK(x.is_contiguous(at::MemoryFormat::ChannelsLast),
              "x must be stored channels last, got strides ", x.strides());
}

inline void check_gradient(const at::Tensor& grad, const at::Tensor& x) {
  TORCH_CHECK(grad.sizes() == x.sizes() && grad.scalar_type() == x.scalar_type() &&
                  grad.is_contiguous(at::MemoryFormat::ChannelsLast),
              "grad must be ", x.scalar_type(), " of shape ", x.sizes(),
              ", stored channels last, got ", grad.scalar_type(), " of shape ",
              grad.sizes(), " with strides ", grad.strides());
}

}  // namespace mmdgt::cpu
