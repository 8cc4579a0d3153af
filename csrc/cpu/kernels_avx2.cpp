#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "../common/score_order.h"
#include "kernels_for.h"
#include "simd_portable.h"

#if defined(__x86_64__)
#include <immintrin.h>

MMDGT_TARGET_BEGIN("avx2,fma,f16c")
#include "simd_avx2.h"
#include "product.h"
#include "routing_kernels.h"
#include "attention_kernels.h"
MMDGT_TARGET_END

namespace mmdgt {

template <class T>
Kernels<T> avx2_kernels() {
  return {assign<Avx2, T>, select<Avx2, T>, attend<Avx2, SinglesLayout<Avx2, T>, T>,
          attend_backward<Avx2, T>, store_rows<Avx2, T>};
}

template Kernels<float> avx2_kernels();
template Kernels<c10::Half> avx2_kernels();
template Kernels<c10::BFloat16> avx2_kernels();

}  // namespace mmdgt

#endif
