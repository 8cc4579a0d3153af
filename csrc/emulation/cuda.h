// What CUDA C++ offers the kernels of csrc/cuda, on a CPU: qualifiers, built-in
// variables, types and functions. As in CUDA, most names are global.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static  // blocks run one after the other

#define threadIdx (::mmdgt::emulation::this_thread().index)
#define blockIdx (::mmdgt::emulation::block_index)
#define blockDim (::mmdgt::emulation::block_size)
#define gridDim (::mmdgt::emulation::grid_size)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}

using __half = c10::Half;
using __nv_bfloat16 = c10::BFloat16;
struct alignas(4) __half2 {
  __half x, y;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __half2float(__half x) { return x; }
inline float __bfloat162float(__nv_bfloat16 x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {x, y}; }
inline float2 __half22float2(__half2 x) { return {x.x, x.y}; }
inline float2 __bfloat1622float2(__nv_bfloat162 x) { return {x.x, x.y}; }

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline float __int_as_float(int bits) { return __uint_as_float(bits); }

template <typename A, typename B>
std::common_type_t<A, B> min(A a, B b) {
  return std::min<std::common_type_t<A, B>>(a, b);
}
template <typename A, typename B>
std::common_type_t<A, B> max(A a, B b) {
  return std::max<std::common_type_t<A, B>>(a, b);
}
using std::isnan;
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __logf(float x) { return std::log(x); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline int __ffs(uint32_t x) { return __builtin_ffs(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint64_t>(a) * b >> 32;
}

template <typename T>
T __ldg(const T* source) {
  return *source;
}
inline int atomicAdd(int* target, int x) {
  return __atomic_fetch_add(target, x, __ATOMIC_RELAXED);
}
inline uint32_t atomicAdd(uint32_t* target, uint32_t x) {
  return __atomic_fetch_add(target, x, __ATOMIC_RELAXED);
}
inline uint32_t atomicOr(uint32_t* target, uint32_t x) {
  return __atomic_fetch_or(target, x, __ATOMIC_RELAXED);
}
inline int atomicMin(int* target, int x) {
  int old = __atomic_load_n(target, __ATOMIC_RELAXED);
  while (x < old && !__atomic_compare_exchange_n(target, &old, x, true, __ATOMIC_RELAXED,
                                                 __ATOMIC_RELAXED)) {
  }
  return old;
}

inline void __syncthreads() { mmdgt::emulation::sync_threads(); }
inline int __syncthreads_or(int predicate) {
  return mmdgt::emulation::sync_threads(predicate != 0);
}
inline void __syncwarp(uint32_t lanes = ~0u) { mmdgt::emulation::sync_warp(lanes); }

namespace mmdgt::emulation {

// The value of lane `source`.
uint32_t shuffle(uint32_t lanes, uint32_t value, int source);

// Every lane gets combine(combine(a, b), c)... of the values of all.
uint32_t reduce(uint32_t lanes, uint32_t value, uint32_t (*combine)(uint32_t, uint32_t));

template <typename T>
T shuffle_as_bits(uint32_t lanes, T value, int source) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  bits = shuffle(lanes, bits, source);
  std::memcpy(&value, &bits, sizeof(bits));
  return value;
}

}  // namespace mmdgt::emulation

template <typename T>
T __shfl_sync(uint32_t lanes, T value, int source, int width = 32) {
  const int lane = mmdgt::emulation::this_thread().lane;
  return mmdgt::emulation::shuffle_as_bits(lanes, value,
                                           lane / width * width + source % width);
}
template <typename T>
T __shfl_xor_sync(uint32_t lanes, T value, int bits) {
  const int lane = mmdgt::emulation::this_thread().lane;
  return mmdgt::emulation::shuffle_as_bits(lanes, value, lane ^ bits);
}
template <typename T>
T __shfl_up_sync(uint32_t lanes, T value, int delta, int width = 32) {
  const int lane = mmdgt::emulation::this_thread().lane;
  return mmdgt::emulation::shuffle_as_bits(lanes, value,
                                           lane % width >= delta ? lane - delta : lane);
}
inline uint32_t __reduce_add_sync(uint32_t lanes, uint32_t x) {
  return mmdgt::emulation::reduce(lanes, x, [](uint32_t a, uint32_t b) { return a + b; });
}
inline uint32_t __reduce_min_sync(uint32_t lanes, uint32_t x) {
  return mmdgt::emulation::reduce(lanes, x, min<uint32_t, uint32_t>);
}
inline uint32_t __reduce_max_sync(uint32_t lanes, uint32_t x) {
  return mmdgt::emulation::reduce(lanes, x, max<uint32_t, uint32_t>);
}
inline uint32_t __ballot_sync(uint32_t lanes, int predicate) {
  const uint32_t bit = 1u << mmdgt::emulation::this_thread().lane;
  return mmdgt::emulation::reduce(lanes, predicate != 0 ? bit : 0,
                                  [](uint32_t a, uint32_t b) { return a | b; });
}
// The lanes whose value is the same.
uint32_t __match_any_sync(uint32_t lanes, int value);
