// Kernels for any machine; those for float64 everywhere.
#include "kernel_includes.h"

#include "product.h"
#include "routing_kernels.h"
#include "attention_kernels.h"
#include "gelu_norm_kernels.h"

namespace mmdgt {

template <class T>
Kernels<T> portable_kernels() {
  using Attention = Portable<accumulate_t<T>>;
  return {assign<Portable<float>, T>,
          select<Portable<float>, T>,
          attend<Attention, SinglesLayout<Attention, T>, T>,
          attend_backward<Attention, T>,
          add_rows<Attention>,
          store_rows<Attention, T>,
          gelu_statistics<Attention, T>,
          gelu_norm<Attention, T>,
          gelu_norm_sums<Attention, T>,
          gelu_norm_backward<Attention, T>};
}

template Kernels<float> portable_kernels();
template Kernels<double> portable_kernels();
template Kernels<c10::Half> portable_kernels();
template Kernels<c10::BFloat16> portable_kernels();

}  // namespace mmdgt
