// Kernels for any machine; those for float64 everywhere.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../common/score_order.h"
#include "kernels_for.h"
#include "simd_portable.h"
// Not compiled for a particular target:
#include "product.h"
#include "routing_kernels.h"
#include "attention_kernels.h"

namespace mmdgt {

template <class T>
Kernels<T> portable_kernels() {
  using Attention = Portable<accumulate_t<T>>;
  return {assign<Portable<float>, T>, select<Portable<float>, T>,
          attend<Attention, SinglesLayout<Attention, T>, T>,
          attend_backward<Attention, T>, store_rows<Attention, T>};
}

template Kernels<float> portable_kernels();
template Kernels<double> portable_kernels();
template Kernels<c10::Half> portable_kernels();
template Kernels<c10::BFloat16> portable_kernels();

}  // namespace mmdgt
