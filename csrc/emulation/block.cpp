#include "block.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>

#ifndef __x86_64__
#error "switch_stacks is written for x86-64"
#endif

// Saves the registers that a function has to preserve on this stack, its address in
// *from, and goes on with what was saved at `to`.
extern "C" void mmdgt_switch_stacks(void** from, void* to);
asm(R"(
.text
.type mmdgt_switch_stacks, @function
mmdgt_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mmdgt_switch_stacks, . - mmdgt_switch_stacks
)");

namespace mmdgt::emulation {

Thread* running = nullptr;
dim3 block_index, block_size, grid_size;
alignas(1024) char dynamic_memory[kMaxSharedBytes];

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr int kMaxThreads = 1024;

Thread launcher;  // which started the grid
std::vector<std::unique_ptr<Thread>> threads;
const std::function<void()>* kernel;
bool copies_early, shuffled;
std::mt19937 dice;

// Of the block that runs.
int num_threads, num_live;
std::vector<Thread*> ready, at_barrier;
bool any_predicate, barrier_result;
struct Warp {
  Meeting meetings[32];
  uint32_t open = 0;  // one bit for each that has begun and not ended
} warps[kMaxThreads / 32];

// For ThreadSanitizer. Barriers take turns, so that a thread that has not yet left one
// does not learn what others did after it.
char block_begin, block_end, barrier_order[2], warp_order[kMaxThreads / 32][2];
int num_barriers, num_warp_syncs[kMaxThreads / 32];

void switch_to(Thread& next) {
  Thread& last = *running;
  running = &next;
  void* const stack = next.stack_pointer;  // read by the last fiber, not the next
  announce_switch(next.fiber);
  mmdgt_switch_stacks(&last.stack_pointer, stack);
}

// Runs another thread, the launcher if there is none.
void sleep() {
  if (ready.empty()) return switch_to(launcher);
  if (shuffled) std::swap(ready[dice() % ready.size()], ready.back());
  Thread* next = ready.back();
  ready.pop_back();
  if (next != running) switch_to(*next);
}

// A fiber's whole life: one kernel after the other.
void live() {
  while (true) {
    acquire(&block_begin);
    (*kernel)();
    release(&block_end);
    const Unwatched unwatched;
    --num_live;
    this_thread().copies.clear();
    sleep();
  }
}

std::unique_ptr<Thread> new_thread(int index) {
  auto thread = std::make_unique<Thread>();
  thread->index = dim3(index, 0, 0);
  thread->warp = index / 32;
  thread->lane = index % 32;
  thread->fiber = new_fiber();
  // The page at the end of the stack catches what overflows it.
  void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, 4096, PROT_NONE) != 0) {
    fail("no memory for the stack of a thread");
  }
  // As mmdgt_switch_stacks leaves it: six registers and where to go on, above it the
  // address that live() would return to.
  void** top = reinterpret_cast<void**>(static_cast<char*>(memory) + kStackBytes) - 8;
  top[6] = reinterpret_cast<void*>(live);
  thread->stack_pointer = top;
  return thread;
}

std::string deadlock() {
  std::string text = std::to_string(num_live) + " threads wait for others, " +
                     std::to_string(at_barrier.size()) + " of them at a barrier";
  for (int warp = 0; warp < num_threads / 32; ++warp) {
    for (int i = 0; i < 32; ++i) {
      if (!(warps[warp].open >> i & 1)) continue;
      const Meeting& meeting = warps[warp].meetings[i];
      char line[160];
      std::snprintf(line, sizeof(line), "; of warp %d lanes %08x in %s, arrived %08x",
                    warp, meeting.lanes, meeting.instruction->name(), meeting.arrived);
      text += line;
    }
  }
  return text;
}

void run_block() {
  num_live = num_threads;
  for (int i = num_threads - 1; i >= 0; --i) ready.push_back(threads[i].get());
  launcher.fiber = this_fiber();
  running = &launcher;
  release(&block_begin);
  sleep();
  acquire(&block_end);
  if (num_live > 0) fail(deadlock());
}

}  // namespace

size_t option(const char* name, size_t otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr ? otherwise : std::strtoull(value, nullptr, 10);
}

void fail(const std::string& what) {
  std::fprintf(stderr, "emulation: block (%u, %u, %u)", block_index.x, block_index.y,
               block_index.z);
  if (running != nullptr && running != &launcher) {
    std::fprintf(stderr, ", thread %u", running->index.x);
  }
  std::fprintf(stderr, ": %s\n", what.c_str());
  std::abort();
}

void run_grid(dim3 grid, int threads_of_block, size_t shared_bytes,
              const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (threads_of_block % 32 != 0 || threads_of_block > kMaxThreads) {
    fail("blocks must have whole warps and at most 1024 threads");
  }
  if (shared_bytes > kMaxSharedBytes) fail("too much shared memory");
  num_threads = threads_of_block;
  for (int i = threads.size(); i < num_threads; ++i) threads.push_back(new_thread(i));
  kernel = &body;
  grid_size = grid;
  block_size = dim3(num_threads);
  const char* copies = std::getenv("MMDGT_EMULATE_COPIES");
  copies_early = copies != nullptr && std::strcmp(copies, "early") == 0;
  const size_t seed = option("MMDGT_EMULATE_SHUFFLE", 0);
  shuffled = seed > 0;
  dice.seed(seed);

  std::vector<unsigned> order(static_cast<size_t>(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  if (shuffled) std::shuffle(order.begin(), order.end(), dice);
  limit_memory(dynamic_memory, shared_bytes, kMaxSharedBytes);
  for (const unsigned i : order) {
    std::memset(dynamic_memory, 0xff, shared_bytes);
    block_index = dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
    run_block();
  }
}

bool sync_threads(bool predicate) {
  const Unwatched unwatched;
  char* order = &barrier_order[num_barriers % 2];
  release(order);
  any_predicate |= predicate;
  at_barrier.push_back(running);
  if (static_cast<int>(at_barrier.size()) < num_threads) {
    sleep();
  } else {
    at_barrier.pop_back();  // this thread goes on
    ready.insert(ready.end(), at_barrier.begin(), at_barrier.end());
    at_barrier.clear();
    barrier_result = any_predicate;
    any_predicate = false;
    ++num_barriers;
  }
  acquire(order);
  return barrier_result;
}

void sync_warp(uint32_t lanes) {
  const Unwatched unwatched;
  int& count = num_warp_syncs[running->warp];
  char* order = &warp_order[running->warp][count % 2];
  release(order);
  struct SyncWarp {
  } own;
  exchange(lanes, own, [&](const Lanes<SyncWarp>&) { ++count; });
  acquire(order);
}

Meeting* meet(uint32_t lanes, void* own, const std::type_info& instruction) {
  const uint32_t me = 1u << running->lane;
  if (!(lanes & me)) fail("a lane names others but not itself");
  Warp& warp = warps[running->warp];
  int slot = -1;
  for (uint32_t open = warp.open; open != 0; open &= open - 1) {
    const int i = __builtin_ctz(open);
    const Meeting& meeting = warp.meetings[i];
    const bool same = meeting.lanes == lanes;
    if (same) slot = i;
    if (same ? *meeting.instruction != instruction
             : (meeting.lanes & me) && (lanes & meeting.arrived)) {
      fail("lanes of a warp wait for each other in different instructions");
    }
  }
  if (slot < 0) {
    slot = __builtin_ctz(~warp.open);
    warp.open |= 1u << slot;
    warp.meetings[slot].instruction = &instruction;
    warp.meetings[slot].lanes = lanes;
    warp.meetings[slot].arrived = 0;
  }
  Meeting& meeting = warp.meetings[slot];
  meeting.values[running->lane] = own;
  meeting.arrived |= me;
  if (meeting.arrived == lanes) return &meeting;
  sleep();
  return nullptr;
}

void leave(const Meeting& meeting) {
  Warp& warp = warps[running->warp];
  warp.open &= ~(1u << (&meeting - warp.meetings));
  for (int lane = 0; lane < 32; ++lane) {
    if (lane != running->lane && (meeting.lanes >> lane & 1)) {
      ready.push_back(threads[32 * running->warp + lane].get());
    }
  }
}

namespace {

// Word by word: ThreadSanitizer need not see into memcpy.
void run(const Copy& copy) {
  for (int i = 0; i < copy.words; ++i) {
    copy.target[i] = copy.valid ? copy.source[i] : 0;
  }
}

}  // namespace

void CopyQueue::start(const Copy& copy) {
  if (copies_early) return run(copy);
  const Unwatched unwatched;
  started_.push_back(copy);
}

void CopyQueue::commit() {
  const Unwatched unwatched;
  groups_.push_back(std::move(started_));
  started_.clear();
}

void CopyQueue::wait(int pending) {
  std::vector<std::vector<Copy>> done;
  {
    const Unwatched unwatched;
    const auto end = groups_.end() - std::min<size_t>(pending, groups_.size());
    done.assign(groups_.begin(), end);
    groups_.erase(groups_.begin(), end);
  }
  for (const auto& group : done) {
    for (const Copy& copy : group) run(copy);
  }
}

void CopyQueue::clear() {
  started_.clear();
  groups_.clear();
}

}  // namespace mmdgt::emulation
