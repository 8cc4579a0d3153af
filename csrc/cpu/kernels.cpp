#include "kernels.h"

#include <ATen/Version.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <string>
#include <type_traits>

#include "kernels_for.h"

namespace mmdgt::cpu {
namespace {

template <class T>
Kernels<T> choose() {
#if defined(__x86_64__)
  if constexpr (!std::is_same_v<T, double>) {
    const std::string machine = at::get_cpu_capability();
    if constexpr (std::is_same_v<T, c10::BFloat16>) {
      if (machine == "AVX512" && __builtin_cpu_supports("avx512bf16")) {
        return avx512_bf16_kernels();
      }
    }
    if (machine == "AVX512") return avx512_kernels<T>();
    if (machine == "AVX2") return avx2_kernels<T>();
  }
#endif
  return portable_kernels<T>();
}

}  // namespace

template <class T>
const Kernels<T>& kernels() {
  static const Kernels<T> best = choose<T>();
  return best;
}

template const Kernels<float>& kernels();
template const Kernels<double>& kernels();
template const Kernels<c10::Half>& kernels();
template const Kernels<c10::BFloat16>& kernels();

}  // namespace mmdgt::cpu
