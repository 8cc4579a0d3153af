// What the kernels are told, and the choice of the best ones for this machine.
//
// Letters: L tokens, D head dim, G groups, K keys per group; a slice is one image
// and head, whose tokens are rows of D numbers, `step` numbers apart.
#pragma once

#include <cstdint>

#include "../common/limits.h"
#include "scratch.h"

namespace mmdgt::cpu {

template <class T>
struct Rows {
  T* data;
  int64_t step;

  T* operator[](int64_t token) const { return data + token * step; }
};

template <class T>
struct AssignTask {
  Rows<const T> query;
  int64_t tokens;
  const float* centroids;  // (G, D)
  int64_t groups, head_dim;
  int32_t* group;   // (tokens)
  float* sums;      // (G, D) to add to, or null
  int32_t* counts;  // (G) to add to, or null
};

template <class T>
struct SelectTask {
  Rows<const T> key;
  int64_t tokens;
  const float* centroids;  // (G, D)
  int64_t groups, head_dim, num_keys;
  bool sorted;
  int32_t* index;  // (G, K)
};

// The keys that each group selected.
struct Choices {
  const int32_t* group = nullptr;  // (L), of the slice
  const int32_t* index = nullptr;  // (G, K)
  int64_t num_keys = 0;

  explicit operator bool() const { return group; }
};

// Queries and the keys they attend to: those of one group, or with choices any
// queries, ordered by group, and all tokens as keys, of which each query sees its
// group's.
template <class T>
struct AttentionTask {
  Rows<const T> query, key, value;
  const int32_t* tokens;  // the queries' places in the slice
  int64_t num_queries;
  const int32_t* index;  // (K)
  int64_t num_keys, head_dim;
  double scale;
  Choices choices;
};

// float64 accumulates in itself, everything else in float32.
template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename AccumulateType<T>::type;

template <class T>
struct ForwardTask : AttentionTask<T> {
  Rows<T> out;
  accumulate_t<T>* logsumexp;  // (L), of the slice
};

template <class T>
struct BackwardTask : AttentionTask<T> {
  Rows<const T> out, grad_out;
  const accumulate_t<T>* logsumexp;  // (L), of the slice
  Rows<T> grad_query;
  // (K, padded_head_dim) each, of this task alone.
  accumulate_t<T>* grad_key;
  accumulate_t<T>* grad_value;
};

// Rows of channels, one after the other.
template <class T>
struct GeluRows {
  const T* x;  // (count, channels)
  int64_t count, channels;
};

constexpr int64_t round_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// Rows of gathered gradients are this long in memory, to hold whole vectors.
constexpr int64_t padded_head_dim(int64_t head_dim) { return round_up(head_dim, 16); }

template <class T>
struct Kernels {
  void (*assign)(const AssignTask<T>&, Scratch&);
  void (*select)(const SelectTask<T>&, Scratch&);
  void (*forward)(const ForwardTask<T>&, Scratch&);
  void (*backward)(const BackwardTask<T>&, Scratch&);
  // Adds numbers (count, padded_head_dim) to the rows that the index names.
  void (*add)(const accumulate_t<T>* from, const int32_t* index, int64_t count,
              Rows<accumulate_t<T>> to, int64_t head_dim);
  // (count, D) numbers into rows of D.
  void (*store)(const accumulate_t<T>* from, Rows<T> to, int64_t count, int64_t head_dim);
  void (*gelu_batch_norm_stats)(const GeluRows<T>&, accumulate_t<T>* mean,
                                accumulate_t<T>* deviation, Scratch&);
  void (*gelu_batch_norm_elemt)(const GeluRows<T>&, const accumulate_t<T>* scale,
                                const accumulate_t<T>* shift, T* y);
  void (*gelu_batch_norm_backward_reduce)(const GeluRows<T>&, const T* dy,
                                          const accumulate_t<T>* mean,
                                          accumulate_t<T>* sum_dy,
                                          accumulate_t<T>* sum_dy_xmu);
  void (*gelu_batch_norm_backward_elemt)(const GeluRows<T>&, const T* dy,
                                         const accumulate_t<T>* scale,
                                         const accumulate_t<T>* slope,
                                         const accumulate_t<T>* shift, T* dx);
};

// The fastest kernels that this machine can run. ATEN_CPU_CAPABILITY limits the
// choice, as it limits PyTorch's own: avx512, avx2 or default.
template <class T>
const Kernels<T>& kernels();

}  // namespace mmdgt::cpu
