// Kernels for AVX2 with FMA and F16C.
#include "kernel_includes.h"

#if defined(__x86_64__)
MMDGT_TARGET_BEGIN("avx2,fma,f16c")
#include "simd_avx2.h"
#include "kernel_table.h"
MMDGT_TARGET_END

namespace mmdgt::cpu {

template <class T>
Kernels<T> avx2_kernels() {
  using V = Avx2;
  return kernel_table<V, V, SinglesLayout<V, T>, T>();
}

template Kernels<float> avx2_kernels();
template Kernels<c10::Half> avx2_kernels();
template Kernels<c10::BFloat16> avx2_kernels();

}  // namespace mmdgt::cpu

#endif
