// Batch norm of GELU on the CPU: how the work is divided.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "feature_maps.h"
#include "kernels.h"
#include "slices.h"

namespace mmdgt::cpu {
namespace {

// Numbers in the rows of one task: few enough for a core's cache. Fixed, so that sums
// are added up in the same order whatever the number of threads.
constexpr int64_t kTaskNumbers = 32768;

void check_channels(const at::Tensor& numbers, const char* name, const at::Tensor& x) {
  TORCH_CHECK(numbers.dim() == 1 && numbers.size(0) == x.size(1) &&
                  numbers.is_contiguous() && numbers.scalar_type() == accumulate_type(x),
              name, " must be contiguous ", accumulate_type(x), " of shape (", x.size(1),
              "), got ", numbers.scalar_type(), " of shape ", numbers.sizes());
}

// The pixels of x, rows of channels, a task at a time.
template <class T>
class Tasks {
 public:
  explicit Tasks(const at::Tensor& x)
      : x_(x.const_data_ptr<T>()),
        rows_(x.numel() / x.size(1)),
        channels_(x.size(1)),
        share_(std::max<int64_t>(1, kTaskNumbers / channels_)) {}

  int64_t count() const { return (rows_ + share_ - 1) / share_; }
  int64_t first(int64_t task) const { return task * share_ * channels_; }
  GeluRows<T> operator[](int64_t task) const {
    return {x_ + first(task), std::min(share_, rows_ - task * share_), channels_};
  }

 private:
  const T* x_;
  int64_t rows_, channels_, share_;
};

std::tuple<at::Tensor, at::Tensor> stats_cpu(const at::Tensor& x) {
  check_map(x);
  const int64_t channels = x.size(1);
  auto mean = at::zeros({channels}, x.options().dtype(at::kDouble));
  auto deviation = at::zeros_like(mean);
  double* to_mean = mean.mutable_data_ptr<double>();
  double* to_deviation = deviation.mutable_data_ptr<double>();
  MMDGT_DISPATCH(x, "gelu_batch_norm_stats", [&] {
    using sum_t = accumulate_t<scalar_t>;
    const Tasks<scalar_t> tasks(x);
    auto parts =
        at::empty({tasks.count(), 2, channels}, x.options().dtype(accumulate_type(x)));
    sum_t* part = parts.mutable_data_ptr<sum_t>();
    parallel_tasks(tasks.count(), [&](int64_t task, Scratch& scratch) {
      sum_t* to = part + task * 2 * channels;
      kernels<scalar_t>().gelu_batch_norm_stats(tasks[task], to, to + channels, scratch);
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
    deviation.div_(rows);
  });
  const auto type = accumulate_type(x);
  return {mean.to(type), deviation.to(type)};
}

void elemt_into(const at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift,
                at::Tensor& y) {
  check_map(x);
  check_channels(scale, "scale", x);
  check_channels(shift, "shift", x);
  MMDGT_DISPATCH(x, "gelu_batch_norm_elemt", [&] {
    using sum_t = accumulate_t<scalar_t>;
    const Tasks<scalar_t> tasks(x);
    const sum_t* factor = scale.const_data_ptr<sum_t>();
    const sum_t* summand = shift.const_data_ptr<sum_t>();
    scalar_t* to = y.mutable_data_ptr<scalar_t>();
    parallel_tasks(tasks.count(), [&](int64_t task, Scratch&) {
      kernels<scalar_t>().gelu_batch_norm_elemt(tasks[task], factor, summand,
                                                to + tasks.first(task));
    });
  });
}

at::Tensor elemt_cpu(const at::Tensor& x, const at::Tensor& scale,
                     const at::Tensor& shift) {
  auto y = at::empty_like(x);
  elemt_into(x, scale, shift, y);
  return y;
}

void elemt_in_place_cpu(at::Tensor& x, const at::Tensor& scale, const at::Tensor& shift) {
  elemt_into(x, scale, shift, x);
}

std::tuple<at::Tensor, at::Tensor> backward_reduce_cpu(const at::Tensor& grad,
                                                       const at::Tensor& x,
                                                       const at::Tensor& mean) {
  check_map(x);
  check_gradient(grad, x);
  check_channels(mean, "mean", x);
  const int64_t channels = x.size(1);
  at::Tensor sums;
  MMDGT_DISPATCH(x, "gelu_batch_norm_backward_reduce", [&] {
    using sum_t = accumulate_t<scalar_t>;
    const Tasks<scalar_t> tasks(x);
    auto parts = at::empty({tasks.count(), 2, channels}, mean.options());
    sum_t* part = parts.mutable_data_ptr<sum_t>();
    const sum_t* center = mean.const_data_ptr<sum_t>();
    const scalar_t* dy = grad.const_data_ptr<scalar_t>();
    parallel_tasks(tasks.count(), [&](int64_t task, Scratch&) {
      sum_t* to = part + task * 2 * channels;
      kernels<scalar_t>().gelu_batch_norm_backward_reduce(
          tasks[task], dy + tasks.first(task), center, to, to + channels);
    });
    sums = parts.sum(0, false, at::kDouble).to(mean.scalar_type());
  });
  return {sums.select(0, 0).clone(), sums.select(0, 1).clone()};
}

at::Tensor backward_elemt_cpu(const at::Tensor& grad, const at::Tensor& x,
                              const at::Tensor& scale, const at::Tensor& slope,
                              const at::Tensor& shift) {
  check_map(x);
  check_gradient(grad, x);
  check_channels(scale, "scale", x);
  check_channels(slope, "slope", x);
  check_channels(shift, "shift", x);
  auto grad_x = at::empty_like(x);
  MMDGT_DISPATCH(x, "gelu_batch_norm_backward_elemt", [&] {
    using sum_t = accumulate_t<scalar_t>;
    const Tasks<scalar_t> tasks(x);
    const sum_t* a = scale.const_data_ptr<sum_t>();
    const sum_t* b = slope.const_data_ptr<sum_t>();
    const sum_t* c = shift.const_data_ptr<sum_t>();
    const scalar_t* dy = grad.const_data_ptr<scalar_t>();
    scalar_t* dx = grad_x.mutable_data_ptr<scalar_t>();
    parallel_tasks(tasks.count(), [&](int64_t task, Scratch&) {
      const int64_t first = tasks.first(task);
      kernels<scalar_t>().gelu_batch_norm_backward_elemt(tasks[task], dy + first, a, b, c,
                                                         dx + first);
    });
  });
  return grad_x;
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdgt, CPU, library) {
  library.impl("gelu_batch_norm_stats", stats_cpu);
  library.impl("gelu_batch_norm_elemt", elemt_cpu);
  library.impl("gelu_batch_norm_elemt_", elemt_in_place_cpu);
  library.impl("gelu_batch_norm_backward_reduce", backward_reduce_cpu);
  library.impl("gelu_batch_norm_backward_elemt", backward_elemt_cpu);
}

}  // namespace mmdgt::cpu
