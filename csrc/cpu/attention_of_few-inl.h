// Softmax attention in a slice of few tokens, all groups in one task (eq. 2), and its
// gradients.
//
// Where K is a large part of L and the groups are small, all scores take less time than
// gathering and transposing the keys of every group. So K^T is packed once; queries,
// ordered by group, pick their group's scores, and the products with probabilities
// take the group's rows of V and K where they lie.
#pragma once

namespace mmdgt::cpu {

// Queries `begin` to `end` of a block are of one group, which selected these keys.
struct Members {
  int64_t begin, end;
  const int32_t* index;  // (K)
};

// Splits a block of queries by group, and returns the number of parts.
MMDGT_INLINE int64_t split_by_group(const Choices& choices, const int32_t* queries,
                                    int64_t count, Members* parts) {
  int64_t number = 0;
  for (int64_t begin = 0, end = 0; begin < count; begin = end) {
    const int32_t group = choices.group[queries[begin]];
    while (end < count && choices.group[queries[end]] == group) ++end;
    parts[number++] = {begin, end, choices.index + group * choices.num_keys};
  }
  return number;
}

// Copies an index, repeating its last number up to whole vectors.
MMDGT_INLINE void pad_index(const int32_t* from, int64_t count, int32_t* to,
                            int64_t padded) {
  std::copy(from, from + count, to);
  std::fill(to + count, to + padded, from[count - 1]);
}

// Picks factor * score (padded K) by an index, and returns the largest.
template <class V>
MMDGT_INLINE typename V::Scalar pick_scores(const typename V::Scalar* scores,
                                            const int32_t* index, int64_t padded,
                                            typename V::Scalar factor,
                                            typename V::Scalar* to) {
  const auto scale = V::broadcast(factor);
  auto best = V::broadcast(-std::numeric_limits<typename V::Scalar>::infinity());
  for (int64_t k = 0; k < padded; k += V::kWidth) {
    const auto exponent = V::gather(scores, index + k) * scale;
    best = V::max(best, exponent);
    V::store(to + k, exponent);
  }
  return V::largest(best);
}

// Replaces exponents by 2^(exponent - shift), and returns their sum.
template <class V>
MMDGT_INLINE typename V::Scalar exponentials(typename V::Scalar* row, int64_t num_keys,
                                             typename V::Scalar shift) {
  auto sum = V::zero();
  for (int64_t k = 0; k < num_keys; k += V::kWidth) {
    const auto power = V::exp2(V::load(row + k) - V::broadcast(shift));
    V::store(row + k, power);
    sum = sum + keep_first<V>(power, num_keys - k);
  }
  return V::sum(sum);
}

template <class V, class Layout, class T>
void attend_few(const ForwardTask<T>& task, Scratch& scratch) {
  using Scalar = typename V::Scalar;
  using Multiply = typename Layout::Multiply;
  constexpr int kNumbers = Multiply::kNumbers;
  const int64_t tokens = task.num_keys, head_dim = task.head_dim;
  const int64_t num_keys = task.choices.num_keys;
  const int64_t scored = round_up(tokens, V::kWidth);    // a row of scores
  const int64_t chosen = round_up(num_keys, V::kWidth);  // a row of probabilities
  const int64_t depth = round_up(head_dim / kNumbers, V::kWidth);
  const int64_t columns = round_up(head_dim, V::kWidth);
  const int64_t gathered = std::max<int64_t>(kQueryBlock, V::kWidth);

  scratch.start(sizeof(Scalar) * (depth * scored + tokens * columns + gathered * depth +
                                  kQueryBlock * (scored + chosen + columns + 2)) +
                sizeof(int32_t) * chosen);
  Scalar* key_t = scratch.take<Scalar>(depth * scored);    // (D, L)
  Scalar* value = scratch.take<Scalar>(tokens * columns);  // (L, D)
  Scalar* query = scratch.take<Scalar>(gathered * depth);  // (queries, D)
  Scalar* score = scratch.take<Scalar>(kQueryBlock * scored);
  Scalar* probability = scratch.take<Scalar>(kQueryBlock * chosen);
  Scalar* out = scratch.take<Scalar>(kQueryBlock * columns);
  Scalar* shifts = scratch.take<Scalar>(kQueryBlock);
  Scalar* sums = scratch.take<Scalar>(kQueryBlock);
  int32_t* index = scratch.take<int32_t>(chosen);

  prefetch_rows(task.query, task.tokens, 0, task.num_queries, head_dim);
  pack_transposed<V, Layout>(task.key, task.index, tokens, head_dim, depth, key_t, scored,
                             query);
  SinglesLayout<V, T>::pack_values(task.value, task.index, tokens, value, head_dim,
                                   columns);
  const auto factor = static_cast<Scalar>(task.scale * kLog2E);
  for (int64_t first = 0; first < task.num_queries; first += kQueryBlock) {
    const int64_t count = std::min(kQueryBlock, task.num_queries - first);
    const int64_t rows = round_up(count, V::kTileRows);
    const int32_t* queries = task.tokens + first;
    prefetch_rows(task.query, task.tokens, first + kQueryBlock, task.num_queries,
                  head_dim);
    for (int64_t i = 0; i < rows; ++i) {
      Layout::pack_row(task.query[queries[std::min(i, count - 1)]], query + i * depth,
                       head_dim, depth);
    }
    product<V, Multiply>(Left<Scalar>{query, depth, 1}, Right<Scalar>{key_t, scored},
                         rows, head_dim / kNumbers, scored / V::kWidth,
                         StoreTile<V>{score, scored});

    // One step after the other for the whole block: what each reads stays in L1.
    Members parts[kQueryBlock];
    const int64_t groups = split_by_group(task.choices, queries, count, parts);
    for (int64_t g = 0; g < groups; ++g) {
      pad_index(parts[g].index, num_keys, index, chosen);
      for (int64_t i = parts[g].begin; i < parts[g].end; ++i) {
        shifts[i] = pick_scores<V>(score + i * scored, index, chosen, factor,
                                   probability + i * chosen);
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      sums[i] = exponentials<V>(probability + i * chosen, num_keys, shifts[i]);
    }
    for (int64_t g = 0; g < groups; ++g) {
      const auto [begin, end, keys] = parts[g];
      unpadded_product<V, Singles<V>>(
          Left<Scalar>{probability + begin * chosen, chosen, 1},
          IndexedRight<Scalar>{value, columns, keys}, end - begin, num_keys,
          columns / V::kWidth, StoreTile<V>{out + begin * columns, columns});
    }
    for (int64_t i = 0; i < count; ++i) {
      store_row<V>(out + i * columns, 1 / sums[i], task.out[queries[i]], head_dim);
      task.logsumexp[queries[i]] =
          static_cast<Scalar>(kLn2) * (shifts[i] + std::log2(sums[i]));
    }
  }
}

// P and dS = P (dP - delta) of one query for its group's keys (K).
template <class V>
MMDGT_INLINE void score_gradients(const typename V::Scalar* scores,
                                  const typename V::Scalar* grad_probability,
                                  const int32_t* index, int64_t num_keys,
                                  typename V::Scalar factor, typename V::Scalar shift,
                                  typename V::Scalar delta,
                                  typename V::Scalar* probability,
                                  typename V::Scalar* grad_score) {
  for (int64_t k = 0; k < num_keys; k += V::kWidth) {
    const auto score = V::gather(scores, index + k);
    const auto p = V::exp2(V::fmadd(score, V::broadcast(factor), V::broadcast(-shift)));
    const auto grad = V::gather(grad_probability, index + k);
    V::store(probability + k, p);
    V::store(grad_score + k, p * (grad - V::broadcast(delta)));
  }
}

// Adds factor * tile to the rows that an index names.
template <class V>
struct AddToRows {
  typename V::Scalar* to;
  int64_t step;
  const int32_t* index;  // (rows)
  int64_t rows;
  typename V::Scalar factor;

  template <int kRows, int kVectors>
  MMDGT_INLINE void operator()(int64_t row, int64_t first,
                               const typename V::Reg (&tile)[kRows][kVectors]) const {
    const auto scale = V::broadcast(factor);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if (row + r >= rows) return;
      typename V::Scalar* line = to + index[row + r] * step + first * V::kWidth;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const auto before = V::load(line + v * V::kWidth);
        V::store(line + v * V::kWidth, V::fmadd(tile[r][v], scale, before));
      }
    }
  }
};

template <class V, class T>
void attend_few_backward(const BackwardTask<T>& task, Scratch& scratch) {
  using Scalar = typename V::Scalar;
  using Multiply = Singles<V>;
  using Layout = SinglesLayout<V, T>;
  const int64_t tokens = task.num_keys, head_dim = task.head_dim;
  const int64_t num_keys = task.choices.num_keys;
  const int64_t scored = round_up(tokens, V::kWidth);    // a row of scores
  const int64_t chosen = round_up(num_keys, V::kWidth);  // a row of probabilities
  const int64_t columns = round_up(head_dim, V::kWidth);
  const int64_t grad_step = padded_head_dim(head_dim);
  const int64_t gathered = std::max<int64_t>(kQueryBlock, V::kWidth);

  scratch.start(
      sizeof(Scalar) *
          (3 * columns * scored + 2 * gathered * columns + 2 * kQueryBlock * scored +
           2 * (kQueryBlock * chosen + V::kTileRows) + kQueryBlock * (columns + 2)) +
      sizeof(int32_t) * chosen);
  Scalar* key_t = scratch.take<Scalar>(columns * scored);       // (D, L)
  Scalar* value_t = scratch.take<Scalar>(columns * scored);     // (D, L)
  Scalar* key = scratch.take<Scalar>(scored * columns);         // (L, D)
  Scalar* query = scratch.take<Scalar>(gathered * columns);     // (queries, D)
  Scalar* grad_out = scratch.take<Scalar>(gathered * columns);  // (queries, D)
  Scalar* score = scratch.take<Scalar>(kQueryBlock * scored);
  Scalar* grad_probability = scratch.take<Scalar>(kQueryBlock * scored);
  // The last tile of keys may read past the end of a row of these two.
  Scalar* probability = scratch.take<Scalar>(kQueryBlock * chosen + V::kTileRows);
  Scalar* grad_score = scratch.take<Scalar>(kQueryBlock * chosen + V::kTileRows);
  Scalar* grad_query = scratch.take<Scalar>(kQueryBlock * columns);
  Scalar* shifts = scratch.take<Scalar>(kQueryBlock);
  Scalar* deltas = scratch.take<Scalar>(kQueryBlock);
  int32_t* index = scratch.take<int32_t>(chosen);

  pack_transposed<V, Layout>(task.key, task.index, tokens, head_dim, columns, key_t,
                             scored, key, true);
  pack_transposed<V, Layout>(task.value, task.index, tokens, head_dim, columns, value_t,
                             scored, query);
  std::fill(task.grad_key, task.grad_key + tokens * grad_step, Scalar(0));
  std::fill(task.grad_value, task.grad_value + tokens * grad_step, Scalar(0));

  const auto scale = static_cast<Scalar>(task.scale);
  const auto factor = static_cast<Scalar>(task.scale * kLog2E);
  const int64_t key_rows = round_up(num_keys, V::kTileRows);
  const int64_t vectors = columns / V::kWidth;
  for (int64_t first = 0; first < task.num_queries; first += kQueryBlock) {
    const int64_t count = std::min(kQueryBlock, task.num_queries - first);
    const int64_t rows = round_up(count, V::kTileRows);
    const int32_t* queries = task.tokens + first;
    gather_block<V>(task, first, columns, query, grad_out, grad_query, shifts, deltas);
    product<V, Multiply>(Left<Scalar>{query, columns, 1}, Right<Scalar>{key_t, scored},
                         rows, head_dim, scored / V::kWidth, StoreTile<V>{score, scored});
    product<V, Multiply>(Left<Scalar>{grad_out, columns, 1},
                         Right<Scalar>{value_t, scored}, rows, head_dim,
                         scored / V::kWidth, StoreTile<V>{grad_probability, scored});

    // One step after the other for the whole block: what each reads stays in L1.
    Members parts[kQueryBlock];
    const int64_t groups = split_by_group(task.choices, queries, count, parts);
    for (int64_t g = 0; g < groups; ++g) {
      pad_index(parts[g].index, num_keys, index, chosen);
      for (int64_t i = parts[g].begin; i < parts[g].end; ++i) {
        score_gradients<V>(score + i * scored, grad_probability + i * scored, index,
                           num_keys, factor, shifts[i], deltas[i],
                           probability + i * chosen, grad_score + i * chosen);
      }
    }
    for (int64_t g = 0; g < groups; ++g) {
      const auto [begin, end, keys] = parts[g];
      unpadded_product<V, Multiply>(Left<Scalar>{grad_score + begin * chosen, chosen, 1},
                                    IndexedRight<Scalar>{key, columns, keys}, end - begin,
                                    num_keys, vectors,
                                    StoreTile<V>{grad_query + begin * columns, columns});
    }
    for (int64_t g = 0; g < groups; ++g) {
      const auto [begin, end, keys] = parts[g];
      product<V, Multiply>(Left<Scalar>{grad_score + begin * chosen, 1, chosen},
                           Right<Scalar>{query + begin * columns, columns}, key_rows,
                           end - begin, vectors,
                           AddToRows<V>{task.grad_key, grad_step, keys, num_keys, scale});
    }
    for (int64_t g = 0; g < groups; ++g) {
      const auto [begin, end, keys] = parts[g];
      product<V, Multiply>(
          Left<Scalar>{probability + begin * chosen, 1, chosen},
          Right<Scalar>{grad_out + begin * columns, columns}, key_rows, end - begin,
          vectors, AddToRows<V>{task.grad_value, grad_step, keys, num_keys, Scalar(1)});
    }
    for (int64_t i = 0; i < count; ++i) {
      store_row<V>(grad_query + i * columns, scale, task.grad_query[queries[i]],
                   head_dim);
    }
  }
}

template <class V, class Layout, class T>
void attend(const ForwardTask<T>& task, Scratch& scratch) {
  if (task.choices) {
    attend_few<V, Layout>(task, scratch);
  } else {
    attend_group<V, Layout>(task, scratch);
  }
}

template <class V, class T>
void attend_backward(const BackwardTask<T>& task, Scratch& scratch) {
  if (task.choices) {
    attend_few_backward<V>(task, scratch);
  } else {
    attend_group_backward<V>(task, scratch);
  }
}

}  // namespace mmdgt::cpu
