// All kernels for one kind of vectors. To be included inside a target region
// (target.h).
#pragma once

#include "product.h"
#include "routing_kernels.h"
#include "attention_kernels.h"
#include "gelu_norm_kernels.h"

namespace mmdgt::cpu {

// Routing always takes vectors of floats.
template <class Routing, class V, class Layout, class T>
Kernels<T> kernel_table() {
  return {
      assign<Routing, T>,       select<Routing, T>, finite<V, T>,
      attend<V, Layout, T>,     attend_backward<V, T>,
      add_rows<V>,              store_rows<V, T>,
      gelu_statistics<V, T>,    gelu_norm<V, T>,    gelu_norm_sums<V, T>,
      gelu_norm_backward<V, T>,
  };
}

}  // namespace mmdgt::cpu
