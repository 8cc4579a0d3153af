// What csrc/cuda/launch.cuh asks of a GPU, on a CPU.
#pragma once

#include <utility>

#include "block.h"

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
