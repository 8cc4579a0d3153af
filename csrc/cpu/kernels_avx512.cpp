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

MMDGT_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "simd_avx512.h"
#include "product.h"
#include "routing_kernels.h"
#include "attention_kernels.h"
MMDGT_TARGET_END

namespace mmdgt {

template <class T>
Kernels<T> avx512_kernels() {
  return {assign<Avx512, T>, select<Avx512, T>, attend<Avx512, SinglesLayout<Avx512, T>, T>,
          attend_backward<Avx512, T>, store_rows<Avx512, T>};
}

template Kernels<float> avx512_kernels();
template Kernels<c10::Half> avx512_kernels();
template Kernels<c10::BFloat16> avx512_kernels();

}  // namespace mmdgt

#endif
