// The kernels of each instruction set. The x86 ones exist on x86 only.
#pragma once

#include "kernels.h"

namespace mmdgt {

template <class T>
Kernels<T> portable_kernels();
template <class T>
Kernels<T> avx2_kernels();
template <class T>
Kernels<T> avx512_kernels();

}  // namespace mmdgt
