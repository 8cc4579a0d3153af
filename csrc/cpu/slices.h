// (B, H, L, D) tensors as B * H slices of rows, and tasks shared among threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <atomic>
#include <type_traits>

#include "kernels.h"

namespace mmdgt::cpu {

// accumulate_t as PyTorch names it.
inline at::ScalarType accumulate_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

template <class T>
class Slices {
 public:
  template <class TensorLike>
  explicit Slices(const TensorLike& tensor)
      : heads_(tensor.size(1)),
        batch_step_(tensor.stride(0)),
        head_step_(tensor.stride(1)),
        token_step_(tensor.stride(2)) {
    if constexpr (std::is_const_v<T>) {
      data_ = tensor.template const_data_ptr<std::remove_const_t<T>>();
    } else {
      data_ = tensor.template mutable_data_ptr<T>();
    }
  }

  Rows<T> operator[](int64_t slice) const {
    return {data_ + slice / heads_ * batch_step_ + slice % heads_ * head_step_,
            token_step_};
  }

 private:
  T* data_;
  int64_t heads_, batch_step_, head_step_, token_step_;
};

// Calls run(task, scratch) for every task, each thread taking the next one when it
// is done: tasks differ in size. What they compute must not depend on the order.
template <class Run>
void parallel_tasks(int64_t tasks, const Run& run) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    Scratch scratch;
    for (int64_t task = next++; task < tasks; task = next++) run(task, scratch);
  });
}

}  // namespace mmdgt::cpu
