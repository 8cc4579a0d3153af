// What every launch needs: types and head dims as template arguments, the current
// stream, and a check.
#pragma once

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>

#include <type_traits>

#include "rows.cuh"

namespace mmdgt {

template <typename T>
struct Type {
  using type = T;
};

// Calls run(Type<T>, integral_constant<int, D>) with the data type of `tokens`
// and the smallest compiled D that holds its head dim; the rest is zeros.
template <typename Run>
void dispatch_tokens(const at::Tensor& tokens, Run&& run) {
  const auto with_dim = [&](auto type) {
    if (tokens.size(3) <= 32) return run(type, std::integral_constant<int, 32>());
    if (tokens.size(3) <= 64) return run(type, std::integral_constant<int, 64>());
    run(type, std::integral_constant<int, 128>());
  };
  switch (tokens.scalar_type()) {
    case at::kBFloat16:
      return with_dim(Type<bfloat16>());
    case at::kHalf:
      return with_dim(Type<__half>());
    default:
      return with_dim(Type<float>());
  }
}

// Launches a kernel on the current stream. Blocks get more than 48 KB of shared
// memory only after asking for it.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads,
            size_t shared_bytes, Arguments&&... arguments) {
  if (blocks == 0) return;
  TORCH_CHECK(blocks <= INT32_MAX, "the input needs ", blocks,
              " thread blocks, more than a launch can have; split the batch");
  if (shared_bytes > 48 << 10) {
    C10_CUDA_CHECK(cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel),
        cudaFuncAttributeMaxDynamicSharedMemorySize,
        static_cast<int>(shared_bytes)));
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes,
           at::cuda::getCurrentCUDAStream()>>>(
      std::forward<Arguments>(arguments)...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace mmdgt
