// Batch norm of GELU on the CPU: how the work is divided.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "kernels.h"
#include "slices.h"

namespace mmdgt::cpu {
namespace {

// Numbers in the rows of one task: few enough for a core's cache. Fixed, so that sums
// are added up in the same order whatever the number of threads.
constexpr int64_t kTaskNumbers = 32768;

using OptionalTensor = std::optional<at::Tensor>;

void check_rows(const at::Tensor& x, const char* name, const at::Tensor& first) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.sizes() == first.sizes() &&
                  x.scalar_type() == first.scalar_type(),
              name, " must be contiguous ", first.scalar_type(), " of shape ",
              first.sizes(), ", got ", x.scalar_type(), " of shape ", x.sizes(),
              " with strides ", x.strides());
}

void check_input(const at::Tensor& x, const OptionalTensor& residual) {
  TORCH_CHECK(x.dim() == 2 && x.size(0) > 0 && x.size(1) % kChannelStep == 0,
              "x must have shape (N, C) with N > 0 and C a multiple of ", kChannelStep,
              ", got ", x.sizes());
  check_rows(x, "x", x);
  if (residual) check_rows(*residual, "residual", x);
}

void check_channels(const at::Tensor& numbers, const char* name, const at::Tensor& x) {
  TORCH_CHECK(numbers.dim() == 1 && numbers.size(0) == x.size(1) &&
                  numbers.is_contiguous() && numbers.scalar_type() == accumulate_type(x),
              name, " must be contiguous ", accumulate_type(x), " of shape (", x.size(1),
              "), got ", numbers.scalar_type(), " of shape ", numbers.sizes());
}

// The rows of x, and of a residual where there is one, a task at a time.
template <class T>
class Tasks {
 public:
  Tasks(const at::Tensor& x, const OptionalTensor& residual)
      : x_(x.const_data_ptr<T>()),
        residual_(residual ? residual->const_data_ptr<T>() : nullptr),
        rows_(x.size(0)),
        channels_(x.size(1)),
        share_(std::max<int64_t>(1, kTaskNumbers / channels_)) {}

  int64_t count() const { return (rows_ + share_ - 1) / share_; }
  int64_t first(int64_t task) const { return task * share_ * channels_; }
  GeluRows<T> operator[](int64_t task) const {
    return {x_ + first(task), residual_ ? residual_ + first(task) : nullptr,
            std::min(share_, rows_ - task * share_), channels_};
  }

 private:
  const T* x_;
  const T* residual_;
  int64_t rows_, channels_, share_;
};

#define MMDGT_DISPATCH(TENSOR, NAME, ...)                                           \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, (TENSOR).scalar_type(), \
                                  NAME, __VA_ARGS__)

std::tuple<at::Tensor, at::Tensor> gelu_statistics_cpu(const at::Tensor& x,
                                                       const OptionalTensor& residual) {
  check_input(x, residual);
  const int64_t channels = x.size(1);
  auto mean = at::zeros({channels}, x.options().dtype(at::kDouble));
  auto deviation = at::zeros_like(mean);
  double* to_mean = mean.mutable_data_ptr<double>();
  double* to_deviation = deviation.mutable_data_ptr<double>();
  MMDGT_DISPATCH(x, "gelu_statistics", [&] {
    using sum_t = accumulate_t<scalar_t>;
    const Tasks<scalar_t> tasks(x, residual);
    auto parts =
        at::empty({tasks.count(), 2, channels}, x.options().dtype(accumulate_type(x)));
    sum_t* part = parts.mutable_data_ptr<sum_t>();
    scalar_t* place = residual ? residual->mutable_data_ptr<scalar_t>() : nullptr;
    parallel_tasks(tasks.count(), [&](int64_t task, Scratch& scratch) {
      sum_t* to = part + task * 2 * channels;
      kernels<scalar_t>().gelu_statistics(tasks[task],
                                          place ? place + tasks.first(task) : nullptr, to,
                                          to + channels, scratch);
    });
    // Chan, Golub and LeVeque: means and squared deviations of disjoint samples.
    double rows = 0;
    for (int64_t task = 0; task < tasks.count(); ++task) {
      const auto count = static_cast<double>(tasks[task].count);
      rows += count;
      for (int64_t c = 0; c < channels; ++c, ++part) {
        const double apart = *part - to_mean[c];
        to_mean[c] += apart * count / rows;
        to_deviation[c] += part[channels] + apart * apart * count * (rows - count) / rows;
      }
      part += channels;
    }
  });
  const auto type = accumulate_type(x);
  return {mean.to(type), deviation.div_(x.size(0)).to(type)};
}

void gelu_norm_into(const at::Tensor& x, const OptionalTensor& residual,
                    const at::Tensor& scale, const at::Tensor& shift, at::Tensor& out) {
  check_input(x, residual);
  check_channels(scale, "scale", x);
  check_channels(shift, "shift", x);
  MMDGT_DISPATCH(x, "gelu_norm", [&] {
    using sum_t = accumulate_t<scalar_t>;
    const Tasks<scalar_t> tasks(x, residual);
    const sum_t* factor = scale.const_data_ptr<sum_t>();
    const sum_t* summand = shift.const_data_ptr<sum_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    parallel_tasks(tasks.count(), [&](int64_t task, Scratch&) {
      kernels<scalar_t>().gelu_norm(tasks[task], factor, summand, to + tasks.first(task));
    });
  });
}

at::Tensor gelu_norm_cpu(const at::Tensor& x, const OptionalTensor& residual,
                         const at::Tensor& scale, const at::Tensor& shift) {
  auto out = at::empty_like(x);
  gelu_norm_into(x, residual, scale, shift, out);
  return out;
}

void gelu_norm_in_place_cpu(at::Tensor& x, const OptionalTensor& residual,
                            const at::Tensor& scale, const at::Tensor& shift) {
  gelu_norm_into(x, residual, scale, shift, x);
}

std::tuple<at::Tensor, at::Tensor> gelu_norm_sums_cpu(at::Tensor& grad,
                                                      const OptionalTensor& more,
                                                      const at::Tensor& x,
                                                      const at::Tensor& mean) {
  check_input(x, std::nullopt);
  check_rows(grad, "grad", x);
  if (more) check_rows(*more, "more", x);
  check_channels(mean, "mean", x);
  const int64_t channels = x.size(1);
  auto sums = at::empty({0}, mean.options());
  MMDGT_DISPATCH(x, "gelu_norm_sums", [&] {
    using sum_t = accumulate_t<scalar_t>;
    const Tasks<scalar_t> tasks(x, std::nullopt);
    auto parts = at::empty({tasks.count(), 2, channels}, mean.options());
    sum_t* part = parts.mutable_data_ptr<sum_t>();
    const sum_t* center = mean.const_data_ptr<sum_t>();
    scalar_t* gradient = grad.mutable_data_ptr<scalar_t>();
    const scalar_t* summand = more ? more->const_data_ptr<scalar_t>() : nullptr;
    parallel_tasks(tasks.count(), [&](int64_t task, Scratch&) {
      const int64_t first = tasks.first(task);
      sum_t* to = part + task * 2 * channels;
      kernels<scalar_t>().gelu_norm_sums(tasks[task], gradient + first,
                                         summand ? summand + first : nullptr, center, to,
                                         to + channels);
    });
    sums = parts.sum(0, false, at::kDouble).to(mean.scalar_type());
  });
  return {sums.select(0, 0).clone(), sums.select(0, 1).clone()};
}

void gelu_norm_backward_cpu(at::Tensor& grad, const at::Tensor& x,
                            const OptionalTensor& s, const at::Tensor& scale,
                            const at::Tensor& slope, const at::Tensor& shift) {
  check_input(x, std::nullopt);
  check_rows(grad, "grad", x);
  if (s) check_rows(*s, "s", x);
  check_channels(scale, "scale", x);
  check_channels(slope, "slope", x);
  check_channels(shift, "shift", x);
  MMDGT_DISPATCH(x, "gelu_norm_backward", [&] {
    using sum_t = accumulate_t<scalar_t>;
    const Tasks<scalar_t> tasks(x, std::nullopt);
    const sum_t* a = scale.const_data_ptr<sum_t>();
    const sum_t* b = slope.const_data_ptr<sum_t>();
    const sum_t* c = shift.const_data_ptr<sum_t>();
    scalar_t* gradient = grad.mutable_data_ptr<scalar_t>();
    scalar_t* sum = s ? s->mutable_data_ptr<scalar_t>() : nullptr;
    parallel_tasks(tasks.count(), [&](int64_t task, Scratch&) {
      const int64_t first = tasks.first(task);
      kernels<scalar_t>().gelu_norm_backward(tasks[task], a, b, c, gradient + first,
                                             sum ? sum + first : nullptr);
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdgt, CPU, library) {
  library.impl("gelu_statistics", gelu_statistics_cpu);
  library.impl("gelu_norm", gelu_norm_cpu);
  library.impl("gelu_norm_", gelu_norm_in_place_cpu);
  library.impl("gelu_norm_sums", gelu_norm_sums_cpu);
  library.impl("gelu_norm_backward_", gelu_norm_backward_cpu);
}

}  // namespace mmdgt::cpu
