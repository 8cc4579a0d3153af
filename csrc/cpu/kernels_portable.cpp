// Kernels for any machine; those for float64 everywhere.
#include "kernel_includes.h"

#include "kernel_table.h"

namespace mmdgt::cpu {

template <class T>
Kernels<T> portable_kernels() {
  using V = Portable<accumulate_t<T>>;
  return kernel_table<Portable<float>, V, SinglesLayout<V, T>, T>();
}

template Kernels<float> portable_kernels();
template Kernels<double> portable_kernels();
template Kernels<c10::Half> portable_kernels();
template Kernels<c10::BFloat16> portable_kernels();

}  // namespace mmdgt::cpu
