// The tensor cores' 16x8x16 product for bfloat16, float16 and float32 operands,
// always accumulated in float32.
//
// All three types share PTX's m16n8k16 layout, counted in pairs of neighbouring
// elements. With r = lane / 4 and q = lane % 4 a thread holds
//   A (16x16): x[0] = A[r][2q..], x[1] = A[r+8][2q..], x[2], x[3] = the same at 2q+8
//   B (16x8):  x[0] = B[2q..][r], x[1] = B[2q+8..][r]
//   C (16x8):  c[0..1] = C[r][2q..], c[2..3] = C[r+8][2q..]
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mmdgt {

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
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
}

__device__ __forceinline__ void mma(float (&c)[4], const FragmentA<__half>& a,
                                    const FragmentB<__half>& b) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x[0]), "r"(a.x[1]), "r"(a.x[2]), "r"(a.x[3]), "r"(b.x[0]), "r"(b.x[1]));
}

// A float32 as the sum of two tf32, which keeps 22 of its 24 bits.
struct SplitFloat {
  uint32_t high, low;
  __device__ __forceinline__ explicit SplitFloat(float x) {
    asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(high) : "f"(x));
    asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(low) : "f"(x - __uint_as_float(high)));
  }
};

__device__ __forceinline__ void mma_tf32(float (&c)[4], uint32_t a0, uint32_t a1,
                                         uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Two products over 8 elements each. Which k stands in which slot does not matter
// as long as A and B agree: the slots q and q + 4 take a pair's two elements.
__device__ __forceinline__ void mma(float (&c)[4], const FragmentA<float>& a,
                                    const FragmentB<float>& b) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const SplitFloat a0(a.x[2 * half].x), a1(a.x[2 * half + 1].x);
    const SplitFloat a2(a.x[2 * half].y), a3(a.x[2 * half + 1].y);
    const SplitFloat b0(b.x[half].x), b1(b.x[half].y);
    mma_tf32(c, a0.low, a1.low, a2.low, a3.low, b0.high, b1.high);
    mma_tf32(c, a0.high, a1.high, a2.high, a3.high, b0.low, b1.low);
    mma_tf32(c, a0.high, a1.high, a2.high, a3.high, b0.high, b1.high);
  }
}

}  // namespace mmdgt
