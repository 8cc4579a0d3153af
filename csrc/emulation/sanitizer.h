// What AddressSanitizer and ThreadSanitizer have to be told: which fiber runs, what
// orders memory, and which memory a block may use. Without them, nothing happens.
#pragma once

#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
// For functions that read what the emulation, not the kernel, shares.
#define MMDGT_UNWATCHED __attribute__((noinline, no_sanitize("thread")))
#else
#define MMDGT_UNWATCHED
#endif

namespace mmdgt::emulation {

#ifdef __SANITIZE_THREAD__
// While it lives, the fiber's reads and writes are not those of a kernel.
struct Unwatched {
  Unwatched() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
// What happened before release(x) happened before what follows acquire(x).
inline void release(void* object) { __tsan_release(object); }
inline void acquire(void* object) { __tsan_acquire(object); }
inline void* this_fiber() { return __tsan_get_current_fiber(); }
inline void* new_fiber() { return __tsan_create_fiber(0); }
inline void announce_switch(void* fiber) {
  __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
}
#else
struct Unwatched {
  Unwatched() {}
};
inline void release(void*) {}
inline void acquire(void*) {}
inline void* this_fiber() { return nullptr; }
inline void* new_fiber() { return nullptr; }
inline void announce_switch(void*) {}
#endif

// Forbids the memory from `used` bytes on, allows what lies before.
inline void limit_memory(const char* memory, size_t used, size_t size) {
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(memory, used);
  ASAN_POISON_MEMORY_REGION(memory + used, size - used);
#endif
}

}  // namespace mmdgt::emulation
