// Kernels for bfloat16 on AVX-512 with BF16.
#include "kernel_includes.h"

#if defined(__x86_64__)
MMDGT_TARGET_BEGIN("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "simd_avx512.h"
#include "kernel_table.h"
#include "simd_avx512_bf16.h"
MMDGT_TARGET_END

namespace mmdgt::cpu {

Kernels<c10::BFloat16> avx512_bf16_kernels() {
  using T = c10::BFloat16;
  using V = Avx512Bf16;
  return kernel_table<V, V, Bf16PairsLayout, T>();
}

}  // namespace mmdgt::cpu

#endif
