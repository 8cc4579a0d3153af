// All kernels for one kind of vectors.
#pragma once

#include "product-inl.h"
#include "routing-inl.h"
#include "attention-inl.h"
#include "attention_of_few-inl.h"
#include "gelu_batch_norm-inl.h"

namespace mmdgt::cpu {

// Routing always takes vectors of floats.
template <class Routing, class V, class Layout, class T>
Kernels<T> kernel_table() {
  return {
      assign<Routing, T>,
      select<Routing, T>,
      attend<V, Layout, T>,
      attend_backward<V, T>,
      add_rows<V>,
      store_rows<V, T>,
      gelu_batch_norm_stats<V, T>,
      gelu_batch_norm_elemt<V, T>,
      gelu_batch_norm_backward_reduce<V, T>,
      gelu_batch_norm_backward_elemt<V, T>,
  };
}

}  // namespace mmdgt::cpu
