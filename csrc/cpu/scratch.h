// Working memory of one thread, kept from task to task.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace mmdgt::cpu {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { release(); }

  // Forgets what was taken and makes room for `bytes` in all, plus alignment for
  // up to 16 pieces.
  void start(int64_t bytes) {
    bytes += 16 * kAlignment;
    if (bytes > size_) {
      release();
      memory_ = static_cast<char*>(
          ::operator new(static_cast<size_t>(bytes), std::align_val_t{kAlignment}));
      size_ = bytes;
    }
    used_ = 0;
  }

  template <class T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(memory_ + used_);
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }

 private:
  static constexpr int64_t kAlignment = 64;  // a cache line, and a vector

  void release() {
    if (memory_) ::operator delete(memory_, std::align_val_t{kAlignment});
    memory_ = nullptr;
    size_ = 0;
  }

  char* memory_ = nullptr;
  int64_t size_ = 0;
  int64_t used_ = 0;
};

}  // namespace mmdgt::cpu
