// The kernels of each instruction set. The x86 ones exist on x86 only.
#pragma once

#include <c10/util/BFloat16.h>

#include "kernels.h"

namespace mmdgt::cpu {

template <class T>
Kernels<T> portable_kernels();
template <class T>
Kernels<T> avx2_kernels();
template <class T>
Kernels<T> avx512_kernels();
Kernels<c10::BFloat16> avx512_bf16_kernels();

}  // namespace mmdgt::cpu
