// Depth-wise 3x3 convolutions on the CPU: how the work is divided.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "feature_maps.h"
#include "kernels.h"
#include "slices.h"

namespace mmdgt::cpu {
namespace {

// The gradient of the weights is summed up in so many parts at least, where there are
// as many rows of pixels. Fixed, so that it does not depend on the number of threads.
constexpr int64_t kParts = 16;

void check_weight(const at::Tensor& weight, const at::Tensor& x) {
  TORCH_CHECK(weight.sizes() == at::IntArrayRef({x.size(1), 1, 3, 3}),
              "weight must have shape (", x.size(1), ", 1, 3, 3), got ", weight.sizes());
}

// The rows of pixels of all images, each with its neighbours.
template <class T>
class MapRows {
 public:
  explicit MapRows(const at::Tensor& x)
      : x_(x.const_data_ptr<T>()),
        height_(x.size(2)),
        width_(x.size(3)),
        channels_(x.size(1)),
        zeros_(channels_) {}

  int64_t step() const { return width_ * channels_; }
  ThreeRows<T> operator[](int64_t row) const {
    const T* middle = x_ + row * step();
    const int64_t y = row % height_;
    return {{y > 0 ? middle - step() : nullptr, middle,
             y + 1 < height_ ? middle + step() : nullptr},
            zeros_.data(),
            width_,
            channels_};
  }

 private:
  const T* x_;
  int64_t height_, width_, channels_;
  std::vector<T> zeros_;
};

// taps: (9, C) of the weights, bias: (C), both in the type of sums.
at::Tensor convolve(const at::Tensor& x, const at::Tensor& taps, const at::Tensor& bias) {
  auto out = at::empty_like(x);
  MMDGT_DISPATCH(x, "depthwise_conv", [&] {
    using sum_t = accumulate_t<scalar_t>;
    const MapRows<scalar_t> rows(x);
    const sum_t* weight = taps.const_data_ptr<sum_t>();
    const sum_t* summand = bias.const_data_ptr<sum_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    parallel_tasks(x.size(0) * x.size(2), [&](int64_t row, Scratch&) {
      kernels<scalar_t>().depthwise_conv(rows[row], weight, summand,
                                         to + row * rows.step());
    });
  });
  return out;
}

at::Tensor taps_of(const at::Tensor& weight, const at::Tensor& x) {
  return weight.reshape({x.size(1), 9}).t().to(accumulate_type(x)).contiguous();
}

at::Tensor depthwise_conv_cpu(const at::Tensor& x, const at::Tensor& weight,
                              const at::Tensor& bias) {
  check_map(x);
  check_weight(weight, x);
  TORCH_CHECK(bias.sizes() == at::IntArrayRef({x.size(1)}), "bias must have shape (",
              x.size(1), "), got ", bias.sizes());
  return convolve(x, taps_of(weight, x), bias.to(accumulate_type(x)).contiguous());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> depthwise_conv_backward_cpu(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight) {
  check_map(x);
  check_weight(weight, x);
  check_gradient(grad, x);
  const int64_t channels = x.size(1), count = x.size(0) * x.size(2);
  const auto taps = taps_of(weight, x);
  // Backwards a pixel gives to those that it took from.
  auto grad_x = convolve(grad, taps.flip(0).contiguous(), at::zeros_like(taps[0]));

  const int64_t share = (count + kParts - 1) / kParts;
  const int64_t tasks = (count + share - 1) / share;
  auto parts = at::zeros({tasks, 10, channels}, taps.options());
  MMDGT_DISPATCH(x, "depthwise_conv_backward", [&] {
    using sum_t = accumulate_t<scalar_t>;
    const MapRows<scalar_t> rows(x);
    const scalar_t* from = grad.const_data_ptr<scalar_t>();
    sum_t* part = parts.mutable_data_ptr<sum_t>();
    parallel_tasks(tasks, [&](int64_t task, Scratch&) {
      const int64_t end = std::min(count, (task + 1) * share);
      for (int64_t row = task * share; row < end; ++row) {
        kernels<scalar_t>().depthwise_conv_backward_weight(
            rows[row], from + row * rows.step(), part + task * 10 * channels);
      }
    });
  });
  const auto sums = parts.sum(0, false, at::kDouble).to(weight.scalar_type());
  return {grad_x, sums.narrow(0, 0, 9).t().reshape(weight.sizes()),
          sums.select(0, 9).clone()};
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdgt, CPU, library) {
  library.impl("depthwise_conv", depthwise_conv_cpu);
  library.impl("depthwise_conv_backward", depthwise_conv_backward_cpu);
}

}  // namespace mmdgt::cpu
