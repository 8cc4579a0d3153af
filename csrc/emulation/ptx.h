// The instructions of csrc/cuda/ptx.cuh on a CPU. An address within shared memory is
// the distance to where dynamic shared memory begins.
#pragma once

#include "cuda.h"

namespace mmdgt::ptx {

inline uint32_t shared_address(const void* memory) {
  return static_cast<const char*>(memory) - emulation::dynamic_memory;
}

// What a kernel reads or writes there, `bytes` at once.
inline char* shared_memory(uint32_t address, int bytes) {
  if (address % bytes != 0) emulation::fail("a misaligned access of shared memory");
  return emulation::dynamic_memory + static_cast<int32_t>(address);
}

void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

inline uint32_t round_to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (isnan(x)) return 0x7fffffffu;
  return std::isinf(x) ? bits : (bits + 0x1000u) & 0xffffe000u;
}

inline float opaque(float x) { return x; }

template <int kByte>
uint32_t top_sign_byte(uint32_t x) {
  return x >> (8 * kByte + 7) & 1 ? 0xff000000u : 0u;
}

inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.f : y;
}

inline float load_shared(uint32_t address) {
  return *reinterpret_cast<const float*>(shared_memory(address, 4));
}

inline uint4 load_shared_16_bytes(uint32_t address) {
  return *reinterpret_cast<const uint4*>(shared_memory(address, 16));
}

template <typename T>
void store_shared(uint32_t address, T x) {
  *reinterpret_cast<T*>(shared_memory(address, sizeof(T))) = x;
}

uint4 load_matrices(uint32_t address);
uint4 load_matrices_transposed(uint32_t address);

inline void copy_async(uint32_t shared, const void* source, int bytes, bool valid) {
  if (reinterpret_cast<uintptr_t>(source) % bytes != 0) {
    emulation::fail("a misaligned asynchronous copy");
  }
  emulation::this_thread().copies.start(
      {reinterpret_cast<uint32_t*>(shared_memory(shared, bytes)),
       static_cast<const uint32_t*>(source), bytes / 4, valid});
}
inline void copy_16_bytes_async(uint32_t shared, const void* source, bool valid) {
  copy_async(shared, source, 16, valid);
}
inline void copy_4_bytes_async(uint32_t shared, const void* source, bool valid) {
  copy_async(shared, source, 4, valid);
}
inline void commit_copies() { emulation::this_thread().copies.commit(); }
template <int kPending>
void wait_for_copies() {
  emulation::this_thread().copies.wait(kPending);
}

inline void store_if(bool valid, void* target, uint32_t first, uint32_t second) {
  const uint32_t words[2] = {first, second};
  if (valid) std::memcpy(target, words, sizeof(words));
}

}  // namespace mmdgt::ptx
