// What csrc/cuda/launch.cuh asks of a GPU, on a CPU. The kernels serve CPU tensors.
#pragma once

#include <utility>

#include "block.h"

#define REGISTER_KERNELS(op_impl, function) REGISTER_DEVICE_IMPL(op_impl, CPU, function)

namespace mmdgt {

// So few that small inputs keep a block busy for several turns.
inline int64_t num_multiprocessors() { return 4; }

inline size_t max_shared_bytes() {
  return emulation::option("MMDGT_EMULATE_SHARED_BYTES", emulation::kMaxSharedBytes);
}

inline char* dynamic_shared() { return emulation::dynamic_memory; }

template <typename... Parameters, typename... Arguments>
void start(void (*kernel)(Parameters...), dim3 grid, int threads, size_t shared_bytes,
           Arguments&&... arguments) {
  emulation::run_grid(grid, threads, shared_bytes, [&] { kernel(arguments...); });
}

}  // namespace mmdgt
