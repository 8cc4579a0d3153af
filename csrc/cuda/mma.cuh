// The tensor cores' 16x8x16 product for bfloat16, float16 and float32 operands,
// always accumulated in float32.
//
// All three types share PTX's m16n8k16 layout, counted in pairs of neighbouring
// elements. With r = lane / 4 and q = lane % 4 a thread holds
//   A (16x16): x[0] = A[r][2q..], x[1] = A[r+8][2q..], x[2], x[3] = the same at 2q+8
//   B (16x8):  x[0] = B[2q..][r], x[1] = B[2q+8..][r]
//   C (16x8):  c[0..1] = C[r][2q..], c[2..3] = C[r+8][2q..]
#pragma once

#include "ptx.cuh"

namespace mmdgt::cuda {

using bfloat16 = __nv_bfloat16;

template <typename T>
struct PairOf {
  using type = uint32_t;  // two 16-bit numbers, the first in the low half
};
template <>
struct PairOf<float> {
  using type = float2;
};
template <typename T>
using Pair = typename PairOf<T>::type;

template <typename T>
struct alignas(4 * sizeof(Pair<T>)) FragmentA {
  Pair<T> x[4];
};
template <typename T>
struct FragmentB {
  Pair<T> x[2];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(bfloat16 x) { return __bfloat162float(x); }

// PyTorch compiles without the conversions that CUDA's types would have.
template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bfloat16 from_float<bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

template <typename T>
__device__ __forceinline__ Pair<T> pack(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack<bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ float2 pack<float>(float first, float second) {
  return make_float2(first, second);
}

template <typename T>
__device__ __forceinline__ float2 unpack(Pair<T> pair);
template <>
__device__ __forceinline__ float2 unpack<bfloat16>(uint32_t pair) {
  return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&pair));
}
template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}
template <>
__device__ __forceinline__ float2 unpack<float>(float2 pair) {
  return pair;
}

// Two neighbouring C tiles, rounded to T, are one A operand: columns become k.
template <typename T>
__device__ __forceinline__ FragmentA<T> as_operand(const float (&left)[4],
                                                   const float (&right)[4]) {
  return {{pack<T>(left[0], left[1]), pack<T>(left[2], left[3]),
           pack<T>(right[0], right[1]), pack<T>(right[2], right[3])}};
}

__device__ __forceinline__ void mma(float (&c)[4], const FragmentA<bfloat16>& a,
                                    const FragmentB<bfloat16>& b) {
  ptx::mma_m16n8k16_bf16(c, a.x, b.x);
}

__device__ __forceinline__ void mma(float (&c)[4], const FragmentA<__half>& a,
                                    const FragmentB<__half>& b) {
  ptx::mma_m16n8k16_f16(c, a.x, b.x);
}

// A float32 as the sum of two tf32, which keeps 22 of its 24 bits.
struct SplitFloat {
  uint32_t high, low;
  // nvcc hands an initialiser list to the host's compiler, which knows no intrinsics.
  __device__ __forceinline__ explicit SplitFloat(float x) {
    high = ptx::round_to_tf32(x);
    low = ptx::round_to_tf32(x - __uint_as_float(high));
  }
};

// Two products over 8 elements each. Which k stands in which slot does not matter
// as long as A and B agree: the slots q and q + 4 take a pair's two elements.
__device__ __forceinline__ void mma(float (&c)[4], const FragmentA<float>& a,
                                    const FragmentB<float>& b) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const SplitFloat a0(a.x[2 * half].x), a1(a.x[2 * half + 1].x);
    const SplitFloat a2(a.x[2 * half].y), a3(a.x[2 * half + 1].y);
    const SplitFloat b0(b.x[half].x), b1(b.x[half].y);
    const uint32_t a_high[4] = {a0.high, a1.high, a2.high, a3.high};
    const uint32_t a_low[4] = {a0.low, a1.low, a2.low, a3.low};
    const uint32_t b_high[2] = {b0.high, b1.high}, b_low[2] = {b0.low, b1.low};
    ptx::mma_m16n8k8_tf32(c, a_low, b_high);
    ptx::mma_m16n8k8_tf32(c, a_high, b_low);
    ptx::mma_m16n8k8_tf32(c, a_high, b_high);
  }
}

// The product of what operands are to the first approximation, through which an infinity
// goes as it does through multiplications.
template <typename T>
__device__ __forceinline__ void mma_leading(float (&c)[4], const FragmentA<T>& a,
                                            const FragmentB<T>& b) {
  mma(c, a, b);
}
template <>
__device__ __forceinline__ void mma_leading<float>(float (&c)[4],
                                                   const FragmentA<float>& a,
                                                   const FragmentB<float>& b) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float2 low = a.x[2 * half], high = a.x[2 * half + 1];
    const uint32_t a_high[4] = {ptx::round_to_tf32(low.x), ptx::round_to_tf32(high.x),
                                ptx::round_to_tf32(low.y), ptx::round_to_tf32(high.y)};
    const uint32_t b_high[2] = {ptx::round_to_tf32(b.x[half].x),
                                ptx::round_to_tf32(b.x[half].y)};
    ptx::mma_m16n8k8_tf32(c, a_high, b_high);
  }
}

}  // namespace mmdgt::cuda
