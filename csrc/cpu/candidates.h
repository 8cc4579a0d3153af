// Candidates for the Top-K of one group. Not compiled per instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace mmdgt {

// The keys, as choice ranks (score_order.h), that passed the group's threshold, in
// the order of the tokens.
class Candidates {
 public:
  Candidates(uint64_t* ranks, int64_t capacity, int64_t wanted)
      : ranks_(ranks), capacity_(capacity), wanted_(wanted) {}

  int64_t size() const { return size_; }
  bool full() const { return size_ == capacity_; }
  void clear() { size_ = 0; }
  void add(uint64_t rank) { ranks_[size_++] = rank; }

  // Keeps the best `wanted` of them, in the same order, and returns the least of
  // these. `work` has room for `capacity` ranks.
  uint64_t prune(uint64_t* work) {
    std::copy(ranks_, ranks_ + size_, work);
    std::nth_element(work, work + wanted_ - 1, work + size_,
                     std::greater<uint64_t>());
    const uint64_t least = work[wanted_ - 1];
    int64_t kept = 0;
    for (int64_t i = 0; i < size_; ++i) {
      ranks_[kept] = ranks_[i];
      kept += ranks_[i] >= least;
    }
    size_ = kept;
    return least;
  }

 private:
  uint64_t* ranks_;
  int64_t capacity_, wanted_;
  int64_t size_ = 0;
};

}  // namespace mmdgt
