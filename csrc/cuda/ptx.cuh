// All inline assembly, one function an instruction. Everything else that is particular
// to a GPU stands in launch.cuh. With MMDGT_EMULATE both come from csrc/emulation,
// which runs the kernels on a CPU.
//
// Addresses within shared memory are 32 bits wide (shared_address).
#pragma once

#ifdef MMDGT_EMULATE
#include "../emulation/ptx.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mmdgt::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* memory) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

// C (16x8) += A (16x16) B (16x8), operands as mma.cuh has them.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4],
                                                  const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ __forceinline__ void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// C (16x8) += A (16x8) B (8x8). With r = lane / 4 and q = lane % 4:
//   a[0] = A[r][q], a[1] = A[r+8][q], a[2], a[3] = the same at q+4
//   b[0] = B[q][r], b[1] = B[q+4][r]
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4],
                                                 const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The nearest tf32, as float32 bits.
__device__ __forceinline__ uint32_t round_to_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(bits) : "f"(x));
  return bits;
}

// x, of which the compiler does not know that a loop leaves it as it is: what is
// computed from x is computed in every pass instead of kept in registers.
__device__ __forceinline__ float opaque(float x) {
  asm volatile("" : "+f"(x));
  return x;
}

// The sign bit of byte kByte of x in all bits of the top byte; zeros below.
template <int kByte>
__device__ __forceinline__ uint32_t top_sign_byte(uint32_t x) {
  uint32_t bits;
  asm("prmt.b32 %0, %1, 0, %2;\n" : "=r"(bits) : "r"(x), "n"((8 | kByte) << 12 | 0x444));
  return bits;
}

// 2^x, denormal results being zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float load_shared(uint32_t address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];\n" : "=f"(x) : "r"(address) : "memory");
  return x;
}

__device__ __forceinline__ uint4 load_shared_16_bytes(uint32_t address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;\n" ::"r"(address), "r"(x) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, float2 x) {
  asm volatile("st.shared.v2.f32 [%0], {%1,%2};\n" ::"r"(address), "f"(x.x), "f"(x.y)
               : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, uint4 x) {
  asm volatile("st.shared.v4.u32 [%0], {%1,%2,%3,%4};\n" ::"r"(address), "r"(x.x),
               "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

// Four 8x8 matrices of 16-bit numbers: lane 8 * i + j names row j of matrix i. A
// thread gets elements [lane / 4][2 * (lane % 4)..] of matrix i in the i-th word.
__device__ __forceinline__ uint4 load_matrices(uint32_t address) {
  uint4 x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// The same of the transposed matrices: elements [2 * (lane % 4)..][lane / 4].
__device__ __forceinline__ uint4 load_matrices_transposed(uint32_t address) {
  uint4 x;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "r"(address)
               : "memory");
  return x;
}

// Start to copy from device memory, or zeros where the source is not valid.
__device__ __forceinline__ void copy_16_bytes_async(uint32_t shared, const void* source,
                                                    bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared),
               "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_4_bytes_async(uint32_t shared, const void* source,
                                                   bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(shared),
               "l"(source), "r"(valid ? 4 : 0)
               : "memory");
}

// Makes a group of the copies that this thread has started since the last one.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

// Waits until at most `kPending` of the thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// A predicated store; as a branch it would cost several times as much.
__device__ __forceinline__ void store_if(bool valid, void* target, uint32_t first,
                                         uint32_t second) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n"
      "@p st.global.v2.b32 [%1], {%2, %3};\n}\n" ::"r"(static_cast<uint32_t>(valid)),
      "l"(target), "r"(first), "r"(second)
      : "memory");
}

}  // namespace mmdgt::ptx

#endif
