// Kernels for AVX-512 (F, BW, DQ, VL).
#include "kernel_includes.h"

#if defined(__x86_64__)
MMDGT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "simd_avx512.h"
#include "kernel_table.h"
MMDGT_TARGET_END

namespace mmdgt::cpu {

template <class T>
Kernels<T> avx512_kernels() {
  using V = Avx512;
  return kernel_table<V, V, SinglesLayout<V, T>, T>();
}

template Kernels<float> avx512_kernels();
template Kernels<c10::Half> avx512_kernels();
template Kernels<c10::BFloat16> avx512_kernels();

}  // namespace mmdgt::cpu

#endif
