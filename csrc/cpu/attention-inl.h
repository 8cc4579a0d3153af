// Softmax attention of one group's queries over the group's keys (eq. 2), and its
// gradients.
//
// K^T and V are packed once per task. Blocks of queries then pass through: the scores of
// a block become probabilities in registers and meet V while in cache.
#pragma once

namespace mmdgt::cpu {

constexpr int64_t kQueryBlock = 24;

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

// Up to this exponent on either side, 2^x summed over the keys neither overflows
// nor vanishes in float32, so the maximum need not be known.
constexpr float kSafeExponent = 60.0f;

// Rows that are gathered come from all over memory: asked for this far ahead, they
// are there in time.
constexpr int64_t kAhead = 16;

template <class T>
MMDGT_INLINE void prefetch_row(Rows<const T> from, const int32_t* index, int64_t place,
                               int64_t count, int64_t length) {
  if (place < count) prefetch(from[index[place]], length);
}

// The rows of the block that starts there.
template <class T>
MMDGT_INLINE void prefetch_rows(Rows<const T> from, const int32_t* index, int64_t first,
                                int64_t count, int64_t length) {
  for (int64_t i = 0; i < kQueryBlock; ++i) {
    prefetch_row(from, index, first + i, count, length);
  }
}

// How operands are laid out for Singles: in the working type, one number each.
template <class V, class T>
struct SinglesLayout {
  using Scalar = typename V::Scalar;
  using Multiply = Singles<V>;
  using Probability = Scalar;  // as stored between the two products

  static MMDGT_INLINE void pack_row(const T* from, Scalar* to, int64_t length,
                                    int64_t padded) {
    copy_row<V>(from, to, length, padded);
  }
  // value (K, D), gathered -> (K, padded), a right operand.
  static void pack_values(Rows<const T> value, const int32_t* index, int64_t num_keys,
                          Scalar* to, int64_t length, int64_t padded) {
    for (int64_t i = 0; i < num_keys; ++i) {
      prefetch_row(value, index, i + kAhead, num_keys, length);
      copy_row<V>(value[index[i]], to + i * padded, length, padded);
    }
  }
};

// Gathers rows and transposes them: (count, D) -> (D, padded count). The places
// past the last row repeat it, so that they change neither maximum nor norm. The
// gathered rows are left in `rows`, (padded, depth), or if they need not stay in as
// many as make a vector.
template <class V, class Layout, class T>
void pack_transposed(Rows<const T> from, const int32_t* index, int64_t count,
                     int64_t head_dim, int64_t depth, typename V::Scalar* to,
                     int64_t padded, typename V::Scalar* rows, bool rows_stay = false) {
  for (int64_t first = 0; first < padded; first += V::kWidth) {
    for (int64_t i = 0; i < V::kWidth; ++i) {
      const int64_t place = std::min(first + i, count - 1);
      prefetch_row(from, index, place + kAhead, count, head_dim);
      Layout::pack_row(from[index[place]], rows + i * depth, head_dim, depth);
    }
    transpose<V>(rows, depth, to + first, padded, V::kWidth, depth);
    if (rows_stay) rows += V::kWidth * depth;
  }
}

// The first `count` lanes, zeros in the others; all if there are fewer lanes.
template <class V>
MMDGT_INLINE typename V::Reg keep_first(typename V::Reg reg, int64_t count) {
  return count < V::kWidth ? V::keep(reg, (1u << count) - 1) : reg;
}

// 1 or -1: sign * score is largest where factor * score is.
template <class Scalar>
MMDGT_INLINE Scalar sign_of(Scalar factor) {
  return factor < 0 ? Scalar(-1) : Scalar(1);
}

// Row maxima of sign * score, lane by lane.
template <class V>
struct RowMaxima {
  typename V::Scalar* lanes;  // (rows, width)
  typename V::Scalar sign;

  template <int kRows, int kVectors>
  MMDGT_INLINE void operator()(int64_t row, int64_t first,
                               const typename V::Reg (&tile)[kRows][kVectors]) const {
    const auto signs = V::broadcast(sign);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      auto best = V::load(lanes + (row + r) * V::kWidth);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        best = V::max(best, tile[r][v] * signs);
      }
      V::store(lanes + (row + r) * V::kWidth, best);
    }
  }
};

// What the exponent of a score is. With its shift rounded, the largest factor * score
// of a row has an exponent other than 0: off by hundreds where scores are 2^31. So
// forward it is the scores that are shifted.
enum class Shift {
  kNone,        // factor * score
  kOfScore,     // factor * (score - shift)
  kOfExponent,  // factor * score - shift; backward, where the sums are in the shift
};

// Turns scores into powers of two, stores them and, forward, sums them by row.
template <class V, class Probability, Shift kShift>
struct Exponentials {
  using Scalar = typename V::Scalar;
  static constexpr bool kSums = kShift != Shift::kOfExponent;
  int64_t num_keys;  // zeros in the columns past the last
  Probability* to;   // (rows, step)
  int64_t step;
  Scalar factor;
  const Scalar* shifts;  // (rows)
  Scalar* sums;          // (rows, width), forward

  template <int kRows, int kVectors>
  MMDGT_INLINE void operator()(int64_t row, int64_t first,
                               const typename V::Reg (&tile)[kRows][kVectors]) const {
    const auto scale = V::broadcast(factor);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto shift =
          V::broadcast(kShift == Shift::kNone ? Scalar(0) : shifts[row + r]);
      Probability* line = to + (row + r) * step + first * V::kWidth;
      auto sum = kSums ? V::load(sums + (row + r) * V::kWidth) : V::zero();
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        auto power =
            V::exp2(kShift == Shift::kNone      ? tile[r][v] * scale
                    : kShift == Shift::kOfScore ? (tile[r][v] - shift) * scale
                                                : V::fmadd(tile[r][v], scale, -shift));
        const int64_t left = num_keys - (first + v) * V::kWidth;
        if (v == kVectors - 1) power = keep_first<V>(power, left);
        sum = sum + power;
        V::store(line + v * V::kWidth, power);
      }
      if constexpr (kSums) V::store(sums + (row + r) * V::kWidth, sum);
    }
  }
};

template <class V, class Layout, class T>
void attend_group(const ForwardTask<T>& task, Scratch& scratch) {
  using Scalar = typename V::Scalar;
  using Multiply = typename Layout::Multiply;
  using Probability = typename Layout::Probability;
  constexpr int kNumbers = Multiply::kNumbers;
  const int64_t num_keys = task.num_keys, head_dim = task.head_dim;
  const int64_t keys = round_up(num_keys, V::kWidth);  // a row of scores
  const int64_t key_depth = round_up(num_keys, kNumbers) / kNumbers;
  const int64_t depth = round_up(head_dim / kNumbers, V::kWidth);
  const int64_t columns = round_up(head_dim, V::kWidth);

  scratch.start(sizeof(Scalar) * (depth * keys + key_depth * columns +
                                  std::max<int64_t>(kQueryBlock, V::kWidth) * depth +
                                  kQueryBlock * (keys + columns + 2 * V::kWidth + 1)));
  Scalar* key = scratch.take<Scalar>(depth * keys);           // (D, K)
  Scalar* value = scratch.take<Scalar>(key_depth * columns);  // (K, D)
  Scalar* query = scratch.take<Scalar>(std::max<int64_t>(kQueryBlock, V::kWidth) *
                                       depth);  // (queries, D)
  Scalar* probability = scratch.take<Scalar>(kQueryBlock * keys);
  Scalar* out = scratch.take<Scalar>(kQueryBlock * columns);
  Scalar* sums = scratch.take<Scalar>(kQueryBlock * V::kWidth);
  Scalar* maxima = scratch.take<Scalar>(kQueryBlock * V::kWidth);
  Scalar* shifts = scratch.take<Scalar>(kQueryBlock);

  prefetch_rows(task.query, task.tokens, 0, task.num_queries, head_dim);
  pack_transposed<V, Layout>(task.key, task.index, num_keys, head_dim, depth, key, keys,
                             query);
  Layout::pack_values(task.value, task.index, num_keys, value, head_dim, columns);
  Scalar longest_key = 0;  // squared
  bool finite = true;
  for (int64_t i = 0; i < keys; i += V::kWidth) {
    auto squares = V::zero();
    for (int64_t d = 0; d < head_dim / kNumbers; ++d) {
      const auto part = V::load(key + d * keys + i);
      squares = Multiply::fmadd(part, part, squares);
    }
    finite = finite && !V::unordered(squares, squares);
    longest_key = std::max(longest_key, V::largest(squares));
  }

  const auto factor = static_cast<Scalar>(task.scale * kLog2E);
  const Scalar sign = sign_of(factor);
  const Scalar limit = kSafeExponent * kSafeExponent /
                       std::max(factor * factor * longest_key, Scalar(1e-30));
  for (int64_t first = 0; first < task.num_queries; first += kQueryBlock) {
    const int64_t count = std::min(kQueryBlock, task.num_queries - first);
    const int64_t rows = round_up(count, V::kTileRows);
    const int32_t* tokens = task.tokens + first;
    prefetch_rows(task.query, task.tokens, first + kQueryBlock, task.num_queries,
                  head_dim);
    bool bounded = finite;
    for (int64_t i = 0; i < rows; ++i) {
      Scalar* row = query + i * depth;
      Layout::pack_row(task.query[tokens[std::min(i, count - 1)]], row, head_dim, depth);
      auto squares = V::zero();
      for (int64_t d = 0; d < depth; d += V::kWidth) {
        const auto part = V::load(row + d);
        squares = Multiply::fmadd(part, part, squares);
      }
      bounded = bounded && V::sum(squares) <= limit;
    }

    const Left<Scalar> queries{query, depth, 1};
    const Right<Scalar> keys_t{key, keys};
    const int64_t vectors = keys / V::kWidth;
    std::fill(shifts, shifts + rows, Scalar(0));
    std::fill(sums, sums + rows * V::kWidth, Scalar(0));
    auto* const powers = reinterpret_cast<Probability*>(probability);
    if (bounded) {
      product<V, Multiply>(queries, keys_t, rows, head_dim / kNumbers, vectors,
                           Exponentials<V, Probability, Shift::kNone>{
                               num_keys, powers, keys, factor, shifts, sums});
    } else {
      std::fill(maxima, maxima + rows * V::kWidth,
                -std::numeric_limits<Scalar>::infinity());
      // The scores are cheaper to compute twice than to keep.
      product<V, Multiply>(queries, keys_t, rows, head_dim / kNumbers, vectors,
                           RowMaxima<V>{maxima, sign});
      for (int64_t i = 0; i < rows; ++i) {
        shifts[i] = sign * V::largest(V::load(maxima + i * V::kWidth));
      }
      product<V, Multiply>(queries, keys_t, rows, head_dim / kNumbers, vectors,
                           Exponentials<V, Probability, Shift::kOfScore>{
                               num_keys, powers, keys, factor, shifts, sums});
    }
    product<V, Multiply>(Left<Scalar>{probability, keys / kNumbers, 1},
                         Right<Scalar>{value, columns}, rows, key_depth,
                         columns / V::kWidth, StoreTile<V>{out, columns});

    for (int64_t i = 0; i < count; ++i) {
      const Scalar sum = V::sum(V::load(sums + i * V::kWidth));
      store_row<V>(out + i * columns, 1 / sum, task.out[tokens[i]], head_dim);
      task.logsumexp[tokens[i]] =
          static_cast<Scalar>(kLn2) * (factor * shifts[i] + std::log2(sum));
    }
  }
}

// Turns dP into dS = P (dP - delta).
template <class V>
struct ScoreGradients {
  using Scalar = typename V::Scalar;
  const Scalar* probability;  // (rows, step)
  const Scalar* deltas;       // (rows)
  Scalar* to;                 // (rows, step)
  int64_t step;

  template <int kRows, int kVectors>
  MMDGT_INLINE void operator()(int64_t row, int64_t first,
                               const typename V::Reg (&tile)[kRows][kVectors]) const {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const auto delta = V::broadcast(deltas[row + r]);
      const int64_t place = (row + r) * step + first * V::kWidth;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const auto p = V::load(probability + place + v * V::kWidth);
        V::store(to + place + v * V::kWidth, p * (tile[r][v] - delta));
      }
    }
  }
};

// Puts factor * tile into the first `rows` rows of a matrix, or adds it to them.
template <class V>
struct AddTile {
  typename V::Scalar* to;
  int64_t step, rows;
  typename V::Scalar factor;
  bool add;

  template <int kRows, int kVectors>
  MMDGT_INLINE void operator()(int64_t row, int64_t first,
                               const typename V::Reg (&tile)[kRows][kVectors]) const {
    const auto scale = V::broadcast(factor);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= rows) return;
      typename V::Scalar* line = to + (row + r) * step + first * V::kWidth;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const auto before = add ? V::load(line + v * V::kWidth) : V::zero();
        V::store(line + v * V::kWidth, V::fmadd(tile[r][v], scale, before));
      }
    }
  }
};

// Copies the queries and output gradients of the block that starts there, repeating the
// last up to a whole tile, and finds delta = dO . O (`out` has room for a row) and the
// shift that the forward pass left in logsumexp.
template <class V, class T>
void gather_block(const BackwardTask<T>& task, int64_t first, int64_t columns,
                  typename V::Scalar* query, typename V::Scalar* grad_out,
                  typename V::Scalar* out, typename V::Scalar* shifts,
                  typename V::Scalar* deltas) {
  using Scalar = typename V::Scalar;
  const int64_t head_dim = task.head_dim;
  const int64_t count = std::min(kQueryBlock, task.num_queries - first);
  const int64_t rows = round_up(count, V::kTileRows);
  const int32_t* tokens = task.tokens + first;
  for (const auto& next : {task.query, task.grad_out, task.out}) {
    prefetch_rows(next, task.tokens, first + kQueryBlock, task.num_queries, head_dim);
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int32_t token = tokens[std::min(i, count - 1)];  // repeat the last
    copy_row<V>(task.query[token], query + i * columns, head_dim, columns);
    copy_row<V>(task.grad_out[token], grad_out + i * columns, head_dim, columns);
    copy_row<V>(task.out[token], out, head_dim, columns);
    auto products = V::zero();
    for (int64_t d = 0; d < columns; d += V::kWidth) {
      products =
          V::fmadd(V::load(grad_out + i * columns + d), V::load(out + d), products);
    }
    deltas[i] = V::sum(products);
    shifts[i] = task.logsumexp[token] * static_cast<Scalar>(kLog2E);
  }
}

template <class V, class T>
void attend_group_backward(const BackwardTask<T>& task, Scratch& scratch) {
  using Scalar = typename V::Scalar;
  using Multiply = Singles<V>;
  using Layout = SinglesLayout<V, T>;
  const int64_t num_keys = task.num_keys, head_dim = task.head_dim;
  const int64_t keys = round_up(num_keys, V::kWidth);  // a row of scores
  const int64_t columns = round_up(head_dim, V::kWidth);
  const int64_t grad_step = padded_head_dim(head_dim);
  const int64_t gathered = std::max<int64_t>(kQueryBlock, V::kWidth);

  scratch.start(sizeof(Scalar) *
                (columns * keys * 3 + 2 * gathered * columns +
                 2 * (kQueryBlock * keys + V::kTileRows) + kQueryBlock * (columns + 2)));
  Scalar* key_t = scratch.take<Scalar>(columns * keys);         // (D, K)
  Scalar* value_t = scratch.take<Scalar>(columns * keys);       // (D, K)
  Scalar* key = scratch.take<Scalar>(keys * columns);           // (K, D)
  Scalar* query = scratch.take<Scalar>(gathered * columns);     // (queries, D)
  Scalar* grad_out = scratch.take<Scalar>(gathered * columns);  // (queries, D)
  // The last tile of keys may read past the end of a row of these two.
  Scalar* probability = scratch.take<Scalar>(kQueryBlock * keys + V::kTileRows);
  Scalar* grad_score = scratch.take<Scalar>(kQueryBlock * keys + V::kTileRows);
  Scalar* grad_query = scratch.take<Scalar>(kQueryBlock * columns);
  Scalar* shifts = scratch.take<Scalar>(kQueryBlock);
  Scalar* deltas = scratch.take<Scalar>(kQueryBlock);

  pack_transposed<V, Layout>(task.key, task.index, num_keys, head_dim, columns, key_t,
                             keys, key, true);
  pack_transposed<V, Layout>(task.value, task.index, num_keys, head_dim, columns, value_t,
                             keys, query);

  const auto scale = static_cast<Scalar>(task.scale);
  const auto factor = static_cast<Scalar>(task.scale * kLog2E);
  const int64_t key_rows = round_up(num_keys, V::kTileRows);
  const int64_t vectors = columns / V::kWidth;
  for (int64_t first = 0; first < task.num_queries; first += kQueryBlock) {
    const int64_t count = std::min(kQueryBlock, task.num_queries - first);
    const int64_t rows = round_up(count, V::kTileRows);
    const int32_t* tokens = task.tokens + first;
    gather_block<V>(task, first, columns, query, grad_out, grad_query, shifts, deltas);
    const Left<Scalar> queries{query, columns, 1}, grad_outs{grad_out, columns, 1};
    product<V, Multiply>(queries, Right<Scalar>{key_t, keys}, rows, head_dim,
                         keys / V::kWidth,
                         Exponentials<V, Scalar, Shift::kOfExponent>{
                             num_keys, probability, keys, factor, shifts, nullptr});
    product<V, Multiply>(grad_outs, Right<Scalar>{value_t, keys}, rows, head_dim,
                         keys / V::kWidth,
                         ScoreGradients<V>{probability, deltas, grad_score, keys});

    product<V, Multiply>(Left<Scalar>{grad_score, keys, 1}, Right<Scalar>{key, columns},
                         rows, num_keys, vectors, StoreTile<V>{grad_query, columns});
    product<V, Multiply>(
        Left<Scalar>{grad_score, 1, keys}, Right<Scalar>{query, columns}, key_rows, count,
        vectors, AddTile<V>{task.grad_key, grad_step, num_keys, scale, first > 0});
    product<V, Multiply>(
        Left<Scalar>{probability, 1, keys}, Right<Scalar>{grad_out, columns}, key_rows,
        count, vectors,
        AddTile<V>{task.grad_value, grad_step, num_keys, Scalar(1), first > 0});

    for (int64_t i = 0; i < count; ++i) {
      store_row<V>(grad_query + i * columns, scale, task.grad_query[tokens[i]], head_dim);
    }
  }
}

// Adds gathered rows (count, padded D) to the rows that the index names.
template <class V>
void add_rows(const typename V::Scalar* from, const int32_t* index, int64_t count,
              Rows<typename V::Scalar> to, int64_t head_dim) {
  for (int64_t i = 0; i < count; ++i) {
    typename V::Scalar* row = to[index[i]];
    int64_t d = 0;
    for (; d + V::kWidth <= head_dim; d += V::kWidth) {
      V::store(row + d, V::load(row + d) + V::load(from + d));
    }
    for (; d < head_dim; ++d) row[d] += from[d];
    from += padded_head_dim(head_dim);
  }
}

// Stores accumulated rows (count, D) in the tensor's type.
template <class V, class T>
void store_rows(const typename V::Scalar* from, Rows<T> to, int64_t count,
                int64_t head_dim) {
  for (int64_t i = 0; i < count; ++i) {
    store_row<V>(from + i * head_dim, 1, to[i], head_dim);
  }
}

}  // namespace mmdgt::cpu
