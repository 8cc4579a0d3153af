// Assignment of the queries to groups and selection of the keys: both score
// tokens against centroids, one centroid per vector lane. To be included inside a
// target region (target.h).
#pragma once

namespace mmdgt::cpu {

constexpr int64_t kScoredTokens = 24;  // at a time; their scores stay in L1

// Scores tokens against all centroids in float32, whatever the tokens' type.
template <class V, class T>
class Scorer {
 public:
  static int64_t scratch_bytes(int64_t groups, int64_t head_dim) {
    const int64_t width = round_up(groups, V::kWidth);
    const int64_t depth = padded_depth(head_dim);
    return sizeof(float) *
           ((width + kScoredTokens) * depth + width * depth + kScoredTokens * width);
  }

  Scorer(Rows<const T> tokens, int64_t count, const float* centroids, int64_t groups,
         int64_t head_dim, Scratch& scratch)
      : tokens_(tokens),
        count_(count),
        head_dim_(head_dim),
        width_(round_up(groups, V::kWidth)) {
    const int64_t depth = padded_depth(head_dim);
    float* rows = scratch.take<float>(width_ * depth);
    for (int64_t g = 0; g < width_; ++g) {
      // The lanes past the last group repeat the first: on a tie it wins.
      copy_row<V>(centroids + (g < groups ? g : 0) * head_dim, rows + g * depth, head_dim,
                  depth);
    }
    centroids_ = scratch.take<float>(depth * width_);
    transpose<V>(rows, depth, centroids_, width_, width_, depth);
    rows_ = scratch.take<float>(kScoredTokens * depth);
    scores_ = scratch.take<float>(kScoredTokens * width_);
  }

  // Scores tokens first, first + stride, .. (`count` of them).
  MMDGT_INLINE void score(int64_t first, int64_t stride, int64_t count) {
    // Copies even of float32: rows far apart would be waited for one by one.
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = first + i * stride;
      prefetch(tokens_[std::min(token + kScoredTokens * stride, count_ - 1)], head_dim_);
      copy_row<V>(tokens_[token], rows_ + i * head_dim_, head_dim_, head_dim_);
    }
    product<V, Singles<V>>(Left<float>{rows_, head_dim_, 1},
                           Right<float>{centroids_, width_},
                           round_up(count, V::kTileRows), head_dim_, width_ / V::kWidth,
                           StoreTile<V>{scores_, width_});
  }

  // Of the i-th token scored: its D numbers, and its score for every centroid.
  const float* row(int64_t i) const { return rows_ + i * head_dim_; }
  const float* scores(int64_t i) const { return scores_ + i * width_; }
  int64_t width() const { return width_; }

 private:
  static int64_t padded_depth(int64_t head_dim) { return round_up(head_dim, V::kWidth); }

  Rows<const T> tokens_;
  int64_t count_, head_dim_, width_;
  float *centroids_, *rows_, *scores_;  // (D, width), (tokens, D), (tokens, width)
};

// The index of the first maximum; NaN counts as the largest, as in torch.argmax.
template <class V>
MMDGT_INLINE int32_t first_maximum(const float* scores, int64_t width) {
  auto best = V::load(scores);
  uint32_t nan = V::unordered(best, best);
  for (int64_t g = V::kWidth; g < width; g += V::kWidth) {
    const auto now = V::load(scores + g);
    nan |= V::unordered(now, now);
    best = V::max(best, now);
  }
  const auto maximum = V::broadcast(V::largest(best));
  // Which vector holds it is hard to predict: look at 64 lanes before branching.
  for (int64_t base = 0; base < width; base += 64) {
    uint64_t found = 0;
    for (int64_t g = base; g < std::min(base + 64, width); g += V::kWidth) {
      const auto now = V::load(scores + g);
      const uint64_t here = nan ? V::unordered(now, now) : V::equal(now, maximum);
      found |= here << (g - base);
    }
    if (found) return static_cast<int32_t>(base + __builtin_ctzll(found));
  }
  return 0;
}

template <class V, class T>
void assign(const AssignTask<T>& task, Scratch& scratch) {
  scratch.start(Scorer<V, T>::scratch_bytes(task.groups, task.head_dim));
  Scorer<V, T> scorer(task.query, task.tokens, task.centroids, task.groups, task.head_dim,
                      scratch);
  const int64_t head_dim = task.head_dim;
  for (int64_t first = 0; first < task.tokens; first += kScoredTokens) {
    const int64_t count = std::min(kScoredTokens, task.tokens - first);
    scorer.score(first, 1, count);
    for (int64_t i = 0; i < count; ++i) {
      const int32_t group = first_maximum<V>(scorer.scores(i), scorer.width());
      task.group[first + i] = group;
      if (!task.sums) continue;
      ++task.counts[group];
      const float* row = scorer.row(i);
      float* sum = task.sums + group * head_dim;
      auto squares = V::zero();
      int64_t d = 0;
      for (; d + V::kWidth <= head_dim; d += V::kWidth) {
        const auto part = V::load(row + d);
        squares = V::fmadd(part, part, squares);
      }
      float square = V::sum(squares);
      for (int64_t e = d; e < head_dim; ++e) square += row[e] * row[e];
      const float inverse = 1.0f / std::max(std::sqrt(square), 1e-12f);
      const auto factor = V::broadcast(inverse);
      for (d = 0; d + V::kWidth <= head_dim; d += V::kWidth) {
        V::store(sum + d, V::fmadd(V::load(row + d), factor, V::load(sum + d)));
      }
      for (; d < head_dim; ++d) sum[d] += row[d] * inverse;
    }
  }
}

// By bisection scores that `wanted` of the tokens reach, centroid by centroid, or not
// many more. scores (tokens, width) -> thresholds (width).
template <class V>
void find_thresholds(const float* scores, int64_t tokens, int64_t width, float wanted,
                     float* thresholds) {
  constexpr int kSteps = 10;
  for (int64_t g = 0; g < width; g += V::kWidth) {
    auto high = V::load(scores + g), low = high;
    for (int64_t i = 1; i < tokens; ++i) {
      const auto score = V::load(scores + i * width + g);
      high = V::max(high, score);
      low = -V::max(-low, -score);
    }
    for (int step = 0; step < kSteps; ++step) {
      const auto middle = V::broadcast(0.5f) * (low + high);
      typename V::Reg count[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
      int64_t i = 0;
      for (; i + 4 <= tokens; i += 4) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          count[j] =
              V::count_not_below(count[j], V::load(scores + (i + j) * width + g), middle);
        }
      }
      for (; i < tokens; ++i) {
        count[0] = V::count_not_below(count[0], V::load(scores + i * width + g), middle);
      }
      const auto reached = (count[0] + count[1]) + (count[2] + count[3]);
      const auto enough = reached >= V::broadcast(wanted);
      low = enough ? middle : low;
      high = enough ? high : middle;
    }
    V::store(thresholds + g, low);
  }
}

// Estimates from a sample a score that more than `num_keys` of the tokens reach,
// but not many more. It needn't be right: too few or too many candidates cost time
// only.
template <class V, class T>
void estimate_thresholds(Scorer<V, T>& scorer, int64_t tokens, int64_t num_keys,
                         int64_t samples, float* sampled, float* thresholds) {
  const int64_t width = scorer.width();
  // An odd stride, or else an image of even width is sampled in few columns.
  const int64_t stride = (tokens / samples - 1) | 1;
  for (int64_t first = 0; first < samples; first += kScoredTokens) {
    scorer.score(first * stride, stride, kScoredTokens);
    std::copy(scorer.scores(0), scorer.scores(0) + kScoredTokens * width,
              sampled + first * width);
  }
  // Four standard deviations above the expected number, and some.
  const float expected = static_cast<float>(num_keys) * samples / tokens;
  const float wanted = expected + 4 * std::sqrt(expected) + 4;
  find_thresholds<V>(sampled, samples, width, wanted, thresholds);
}

// The keys that passed the threshold of one group, in the order of the tokens.
template <class V>
class Candidates {
 public:
  // The arrays have room for `capacity` candidates, of which `wanted` are wanted.
  Candidates(uint32_t* bits, int32_t* tokens, int64_t capacity, int64_t wanted)
      : bits_(bits), tokens_(tokens), capacity_(capacity), wanted_(wanted) {}

  int64_t size() const { return size_; }
  bool full() const { return size_ == capacity_; }
  void clear() { size_ = 0; }
  MMDGT_INLINE void add(float score, int64_t token) {
    bits_[size_] = ordered_bits(score);
    tokens_[size_++] = static_cast<int32_t>(token);
  }

  // The scores of tokens 0 to count - 1.
  MMDGT_INLINE void add_all(const float* scores, int64_t count) {
    for (int64_t i = 0; i < count; ++i) bits_[i] = ordered_bits(scores[i]);
    std::iota(tokens_, tokens_ + count, 0);
    size_ = count;
  }

  // Keeps the best `wanted`, in the same order, and returns the least score kept.
  float prune() {
    uint32_t smallest = bits_[0], largest = bits_[0];
    for (int64_t i = 1; i < size_; ++i) {
      smallest = std::min(smallest, bits_[i]);
      largest = std::max(largest, bits_[i]);
    }
    // Bisects for the bits that exactly `wanted` reach, or more only by ties.
    uint64_t low = smallest, high = uint64_t{largest} + 1;
    while (high - low > 1) {
      const uint64_t middle = (low + high) / 2;
      const int64_t reached = count_from(middle);
      (reached < wanted_ ? high : low) = middle;
      if (reached == wanted_) break;
    }
    const auto least = static_cast<uint32_t>(low);
    int64_t kept = 0;
    if (count_from(low) == wanted_) {
      for (int64_t i = 0; i < size_; ++i) kept = keep(i, kept, bits_[i] >= least);
    } else {
      // Of equal scores the first, which are the lower tokens, win.
      int64_t ties = wanted_ - count_from(low + 1);
      for (int64_t i = 0; i < size_; ++i) {
        const bool tie = bits_[i] == least && ties > 0;
        kept = keep(i, kept, bits_[i] > least || tie);
        ties -= tie;
      }
    }
    size_ = kept;
    return score_of_bits(least);
  }

  // The tokens into `to`; `work` has room for `wanted` ranks.
  void write(bool sorted, int32_t* to, uint64_t* work) const {
    if (!sorted) {
      std::copy(tokens_, tokens_ + size_, to);
      return;
    }
    for (int64_t i = 0; i < size_; ++i) work[i] = rank_of_bits(bits_[i], tokens_[i]);
    std::sort(work, work + size_, std::greater<uint64_t>());
    for (int64_t i = 0; i < size_; ++i) {
      to[i] = static_cast<int32_t>(token_of_rank(work[i]));
    }
  }

 private:
  // Moves the i-th candidate behind those kept, to stay if it is wanted.
  MMDGT_INLINE int64_t keep(int64_t i, int64_t kept, bool wanted) {
    bits_[kept] = bits_[i];
    tokens_[kept] = tokens_[i];
    return kept + wanted;
  }

  int64_t count_from(uint64_t least) const {
    if (least > 0xffffffffu) return 0;
    const auto limit = static_cast<uint32_t>(least);
    uint32_t count = 0;
    for (int64_t i = 0; i < size_; ++i) count += bits_[i] >= limit;
    return count;
  }

  uint32_t* bits_;  // ordered_bits of the scores
  int32_t* tokens_;
  int64_t capacity_, wanted_;
  int64_t size_ = 0;
};

// Writes the tokens of the scores that are not less, and returns their number. `to` has
// room for kWidth more.
template <class V>
MMDGT_INLINE int64_t write_not_less(const float* scores, int64_t tokens, float threshold,
                                    int32_t* to) {
  const auto limit = V::broadcast(threshold);
  int64_t count = 0;
  for (int64_t first = 0; first < tokens; first += V::kWidth) {
    const uint32_t bits = V::not_less(V::load(scores + first), limit);
    V::store_set(to + count, static_cast<int32_t>(first), bits);
    count += __builtin_popcount(bits);
  }
  return count;
}

// With few tokens all are candidates.
template <class V, class T>
void select_of_few(const SelectTask<T>& task, Scratch& scratch) {
  const int64_t tokens = task.tokens, groups = task.groups, wanted = task.num_keys;
  const int64_t width = round_up(groups, V::kWidth);
  const int64_t padded = round_up(tokens, V::kWidth);
  scratch.start(Scorer<V, T>::scratch_bytes(groups, task.head_dim) +
                (2 * padded + 1) * width * sizeof(float) +
                (padded + V::kWidth) * (sizeof(uint32_t) + sizeof(int32_t)) +
                wanted * sizeof(uint64_t));
  Scorer<V, T> scorer(task.key, tokens, task.centroids, groups, task.head_dim, scratch);
  float* scores = scratch.take<float>(padded * width);      // (tokens, groups)
  float* transposed = scratch.take<float>(width * padded);  // (groups, tokens)
  float* thresholds = scratch.take<float>(width);
  uint32_t* bits = scratch.take<uint32_t>(tokens);
  int32_t* places = scratch.take<int32_t>(padded + V::kWidth);
  uint64_t* work = scratch.take<uint64_t>(wanted);
  for (int64_t first = 0; first < tokens; first += kScoredTokens) {
    const int64_t count = std::min(kScoredTokens, tokens - first);
    scorer.score(first, 1, count);
    std::copy(scorer.scores(0), scorer.scores(0) + count * width, scores + first * width);
  }
  std::fill(scores + tokens * width, scores + padded * width,
            -std::numeric_limits<float>::infinity());
  find_thresholds<V>(scores, tokens, width, static_cast<float>(wanted), thresholds);
  transpose<V>(scores, width, transposed, padded, padded, width);
  for (int64_t g = 0; g < groups; ++g) {
    const float* row = transposed + g * padded;
    int32_t* index = task.index + g * wanted;
    // NaN passes, as it should. Seldom do more keys pass than are wanted.
    if (!task.sorted && write_not_less<V>(row, padded, thresholds[g], places) == wanted) {
      std::copy(places, places + wanted, index);
      continue;
    }
    Candidates<V> candidates(bits, places, tokens, wanted);
    candidates.add_all(row, tokens);
    candidates.prune();
    candidates.write(task.sorted, index, work);
  }
}

// Streams the keys past one threshold per group. A group that collects too many
// candidates prunes them and raises its threshold; one that collects too few, for
// an unlucky sample, goes through the keys again without a threshold.
template <class V, class T>
void select(const SelectTask<T>& task, Scratch& scratch) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  const int64_t tokens = task.tokens, groups = task.groups, wanted = task.num_keys;
  const int64_t samples =
      round_up(std::clamp<int64_t>(tokens / 16, 384, 2048), kScoredTokens);
  if (tokens < 4 * samples || tokens < 4 * wanted) {
    select_of_few<V, T>(task, scratch);
    return;
  }
  const int64_t capacity = std::min(tokens, 4 * wanted + 256);
  const int64_t width = round_up(groups, V::kWidth);
  scratch.start(Scorer<V, T>::scratch_bytes(groups, task.head_dim) +
                groups * capacity * (sizeof(uint32_t) + sizeof(int32_t)) +
                wanted * sizeof(uint64_t) + (1 + samples) * width * sizeof(float));
  Scorer<V, T> scorer(task.key, tokens, task.centroids, groups, task.head_dim, scratch);
  uint32_t* bits = scratch.take<uint32_t>(groups * capacity);
  int32_t* places = scratch.take<int32_t>(groups * capacity);
  uint64_t* work = scratch.take<uint64_t>(wanted);
  float* thresholds = scratch.take<float>(width);
  estimate_thresholds(scorer, tokens, wanted, samples,
                      scratch.take<float>(samples * width), thresholds);

  std::vector<Candidates<V>> candidates;
  candidates.reserve(groups);
  std::vector<uint64_t> open((groups + 63) / 64, 0);  // one bit per group
  for (int64_t g = 0; g < groups; ++g) {
    candidates.emplace_back(bits + g * capacity, places + g * capacity, capacity, wanted);
    open[g / 64] |= uint64_t{1} << g % 64;
  }
  for (bool again = true; again;) {
    for (int64_t first = 0; first < tokens; first += kScoredTokens) {
      const int64_t count = std::min(kScoredTokens, tokens - first);
      scorer.score(first, 1, count);
      for (int64_t i = 0; i < count; ++i) {
        const float* scores = scorer.scores(i);
        for (int64_t base = 0; base < width; base += 64) {
          uint64_t passed = 0;
          const int64_t end = std::min<int64_t>(64, width - base);
          for (int64_t g = 0; g < end; g += V::kWidth) {
            const uint64_t found =
                V::not_less(V::load(scores + base + g), V::load(thresholds + base + g));
            passed |= found << g;
          }
          passed &= open[base / 64];
          for (; passed; passed &= passed - 1) {
            const int64_t g = base + __builtin_ctzll(passed);
            Candidates<V>& list = candidates[g];
            if (list.full()) {
              // A later token must beat the least of those kept.
              thresholds[g] = std::nextafter(list.prune(), kInfinity);
            }
            list.add(scores[g], first + i);
          }
        }
      }
    }
    again = false;
    std::fill(open.begin(), open.end(), 0);
    for (int64_t g = 0; g < groups; ++g) {
      if (candidates[g].size() >= wanted) continue;
      candidates[g].clear();
      thresholds[g] = -kInfinity;
      open[g / 64] |= uint64_t{1} << g % 64;
      again = true;
    }
  }

  for (int64_t g = 0; g < groups; ++g) {
    candidates[g].prune();
    candidates[g].write(task.sorted, task.index + g * wanted, work);
  }
}

}  // namespace mmdgt::cpu
