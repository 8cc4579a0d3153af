// What every launch needs: the GPU, types and head dims as template arguments, grids.
#pragma once

#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <type_traits>

#include "rows.cuh"

#ifdef MMDGT_EMULATE
#include "../emulation/launch.h"
#endif

namespace mmdgt::cuda {

// Bytes of shared memory that kernels declare themselves beside what they ask for, at the
// most.
constexpr size_t kDeclaredBytes = 4096;

}  // namespace mmdgt::cuda

#ifndef MMDGT_EMULATE  // clang-format tears >>> apart after #else

#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>

namespace mmdgt::cuda {

inline int64_t num_multiprocessors() {
  return at::cuda::getCurrentDeviceProperties()->multiProcessorCount;
}

// Bytes of shared memory that a block can ask for.
inline size_t max_shared_bytes() {
  return at::cuda::getCurrentDeviceProperties()->sharedMemPerBlockOptin;
}

// The shared memory that the launch asked for.
__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

// Starts a kernel on the current stream. Blocks get more than 48 KB of shared memory,
// what they declare themselves included, only after asking for it: always for the most
// there is, as another thread may be about to start the same kernel with more.
template <typename... Parameters, typename... Arguments>
void start(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
           Arguments&&... arguments) {
  if (shared_bytes > 32 << 10) {
    C10_CUDA_CHECK(
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(max_shared_bytes() - kDeclaredBytes)));
  }
  kernel<<<grid, threads, shared_bytes, at::cuda::getCurrentCUDAStream()>>>(
      std::forward<Arguments>(arguments)...);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace mmdgt::cuda

#endif

namespace mmdgt::cuda {

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

// The grid of so many blocks for each head of (B,H,...) tensors.
inline dim3 grid_of_heads(int64_t blocks, const at::Tensor& tokens) {
  TORCH_CHECK(blocks <= INT32_MAX && tokens.size(0) <= 65535 && tokens.size(1) <= 65535,
              "shape ", tokens.sizes(),
              " needs more thread blocks than a launch "
              "can have (B and H up to 65535); split the batch");
  return dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(tokens.size(1)),
              static_cast<unsigned>(tokens.size(0)));
}

// Whether a block can have so much shared memory, beside what its kernel declares.
inline bool fits(size_t shared_bytes) {
  return shared_bytes + kDeclaredBytes <= max_shared_bytes();
}

// Starts a kernel. Who asks for more shared memory than the smallest GPUs have (99 KB)
// makes sure before that it fits.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
            Arguments&&... arguments) {
  TORCH_INTERNAL_ASSERT(fits(shared_bytes), "a kernel needs ", shared_bytes,
                        " bytes of shared memory, this GPU has ", max_shared_bytes());
  start(kernel, grid, threads, shared_bytes, std::forward<Arguments>(arguments)...);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks for each head that take turns with its `pieces` of work, so that about
// `per_processor` blocks run on every multiprocessor at once.
inline int64_t resident_blocks(int64_t pieces, int64_t per_processor,
                               const at::Tensor& tokens) {
  const int64_t blocks = per_processor * num_multiprocessors();
  const int64_t heads = tokens.size(0) * tokens.size(1);
  return std::clamp<int64_t>(blocks / heads, 1, pieces);
}

// Tokens of one head that a block serves, `step` at a time: as many as leave every
// multiprocessor a few blocks, and all blocks of a head about equally many.
inline int64_t tokens_per_block(int64_t num_tokens, int64_t heads, int64_t step) {
  const int64_t blocks = 4 * num_multiprocessors();
  const int64_t steps =
      std::clamp<int64_t>(ceil_div(heads * num_tokens, step * blocks), 1, 16);
  return ceil_div(ceil_div(num_tokens, ceil_div(num_tokens, step * steps)), 32) * 32;
}

}  // namespace mmdgt::cuda
