// A CUDA block on a CPU core. Every thread of the block is a fiber, which runs until
// it has to wait: at a barrier for the block, in a warp's instruction for the lanes
// that take part. Then another one runs, the last that became ready or, in a shuffled
// schedule, any. Blocks run one after the other.
//
// Environment variables, read at each launch:
//   MMDGT_EMULATE_SHUFFLE=N       shuffles blocks and threads by the seed N > 0
//   MMDGT_EMULATE_COPIES=early    asynchronous copies happen when they start and not,
//                                 as is the default, when they are waited for
//   MMDGT_EMULATE_SHARED_BYTES=N  shared memory of a block, 227 KB by default
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <typeinfo>
#include <vector>

#include "sanitizer.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace mmdgt::emulation {

// An asynchronous copy; zeros are written where the source is not valid.
struct Copy {
  uint32_t* target;
  const uint32_t* source;
  int words;
  bool valid;
};

// The asynchronous copies of one thread.
class CopyQueue {
 public:
  void start(const Copy& copy);
  void commit();           // what was started becomes a group
  void wait(int pending);  // for all but the last so many groups
  void clear();

 private:
  std::vector<Copy> started_;
  std::vector<std::vector<Copy>> groups_;
};

struct Thread {
  dim3 index;
  int warp, lane;
  CopyQueue copies;
  void* stack_pointer;
  void* fiber;  // as ThreadSanitizer knows it
};

extern Thread* running;
MMDGT_UNWATCHED inline Thread& this_thread() { return *running; }

extern dim3 block_index, block_size, grid_size;

constexpr size_t kMaxSharedBytes = 227 << 10;
extern char dynamic_memory[kMaxSharedBytes];

// The value of an environment variable, a number.
size_t option(const char* name, size_t otherwise);

// Tells where the kernel is and what is wrong, and ends the process, as a trap on a
// GPU would end all that runs there.
[[noreturn]] void fail(const std::string& what);

// Runs kernel() in all threads of all blocks. Dynamic shared memory starts as NaN.
void run_grid(dim3 grid, int threads, size_t shared_bytes,
              const std::function<void()>& kernel);

// Waits for all threads of the block. Whether any of them had `predicate`.
bool sync_threads(bool predicate = false);

void sync_warp(uint32_t lanes);

// What each of `lanes` brings to an instruction of its warp.
template <typename T>
struct Lanes {
  void* const* values;
  uint32_t mask;

  bool take_part(int lane) const { return mask >> lane & 1; }
  T& operator[](int lane) const {
    if (!take_part(lane)) fail("reads from a lane that does not take part");
    return *static_cast<T*>(values[lane]);
  }
  template <typename Use>
  void for_each(Use&& use) const {
    for (int lane = 0; lane < 32; ++lane) {
      if (take_part(lane)) use((*this)[lane]);
    }
  }
};

struct Meeting {
  const std::type_info* instruction;
  uint32_t lanes, arrived;
  void* values[32];
};

// The meeting for the last lane that comes; the others wait for leave() and get none.
Meeting* meet(uint32_t lanes, void* own, const std::type_info& instruction);
void leave(const Meeting& meeting);

// An instruction of the warp's `lanes`, named by the type T: the last lane to come
// runs act(Lanes<T>) for all of them. Orders no memory, as on a GPU.
template <typename T, typename Act>
void exchange(uint32_t lanes, T& own, Act&& act) {
  const Unwatched unwatched;
  if (const Meeting* meeting = meet(lanes, &own, typeid(T))) {
    act(Lanes<T>{meeting->values, lanes});
    leave(*meeting);
  }
}

}  // namespace mmdgt::emulation
