// (B, H, L, D) tensors as B * H slices of rows, and tasks shared among threads.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <atomic>
#include <type_traits>
#include <vector>

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

// Calls run(task, scratch) for every task. Tasks differ in size, so each thread takes
// one after the other: first of its own share, which is the same in every call and may
// be in its cache, then of the others'. What tasks compute must not depend on the order.
template <class Run>
void parallel_tasks(int64_t tasks, const Run& run) {
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  std::vector<std::atomic<int64_t>> taken(threads);
  at::parallel_for(0, threads, 1, [&](int64_t own, int64_t) {
    Scratch scratch;
    for (int64_t i = 0; i < threads; ++i) {
      const int64_t share = (own + i) % threads;
      const int64_t first = tasks * share / threads;
      const int64_t count = tasks * (share + 1) / threads - first;
      for (int64_t next = taken[share]++; next < count; next = taken[share]++) {
        run(first + next, scratch);
      }
    }
  });
}

}  // namespace mmdgt::cpu
