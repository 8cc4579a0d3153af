// Small matrix products with the result in registers.
#pragma once

namespace mmdgt::cpu {

// How to multiply: one number at a time. Bf16Pairs (kernels_avx512_bf16.cpp) is
// the other way.
template <class V>
struct Singles {
  using Reg = typename V::Reg;
  static constexpr int kNumbers = 1;  // per element of the operands
  static MMDGT_INLINE Reg fmadd(Reg a, Reg b, Reg c) { return V::fmadd(a, b, c); }
};

// The left operand: element (row, depth) is at data[row * row_step + depth *
// depth_step].
template <class Scalar>
struct Left {
  const Scalar* data;
  int64_t row_step, depth_step;
};

// The right operand (depth, vectors * width), rows `step` apart.
template <class Scalar>
struct Right {
  const Scalar* data;
  int64_t step;

  MMDGT_INLINE const Scalar* row(int64_t depth) const { return data + depth * step; }
};

// The same, of the rows that an index names.
template <class Scalar>
struct IndexedRight {
  const Scalar* data;
  int64_t step;
  const int32_t* index;  // (depth)

  MMDGT_INLINE const Scalar* row(int64_t depth) const {
    return data + index[depth] * step;
  }
};

template <class V, class Multiply, int kRows, int kVectors, class RightOperand,
          class Epilogue>
MMDGT_INLINE void product_tile(Left<typename V::Scalar> left, RightOperand right,
                               int64_t row, int64_t depth, int64_t first,
                               const Epilogue& epilogue) {
  using Reg = typename V::Reg;
  Reg tile[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) tile[r][v] = V::zero();
  }
  const typename V::Scalar* a = left.data + row * left.row_step;
  for (int64_t d = 0; d < depth; ++d) {
    const typename V::Scalar* b = right.row(d) + first * V::kWidth;
    Reg columns[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) columns[v] = V::load(b + v * V::kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Reg element = V::broadcast(a[r * left.row_step]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        tile[r][v] = Multiply::fmadd(element, columns[v], tile[r][v]);
      }
    }
    a += left.depth_step;
  }
  epilogue(row, first, tile);
}

// The epilogue by value: the compiler knows that what it stores does not change it.
template <class V, class Multiply, int kRows, int kVectors, class RightOperand,
          class Epilogue>
void product_columns(Left<typename V::Scalar> left, RightOperand right, int64_t row,
                     int64_t end, int64_t depth, int64_t first, Epilogue epilogue) {
  for (; row < end; row += kRows) {
    product_tile<V, Multiply, kRows, kVectors>(left, right, row, depth, first, epilogue);
  }
}

// Rows `row` to `end`, a multiple of kRows.
template <class V, class Multiply, int kRows, class RightOperand, class Epilogue>
void product_rows(Left<typename V::Scalar> left, RightOperand right, int64_t row,
                  int64_t end, int64_t depth, int64_t vectors, const Epilogue& epilogue) {
  // One or two rows need more vectors to hide the latency of their sums.
  constexpr int kMost = kRows > 2 ? V::kTileVectors : 4;
  for (int64_t first = 0; first < vectors; first += kMost) {
    const int64_t now = std::min<int64_t>(kMost, vectors - first);
    if constexpr (kMost >= 4) {
      if (now == 4) {
        product_columns<V, Multiply, kRows, 4>(left, right, row, end, depth, first,
                                               epilogue);
      } else if (now == 3) {
        product_columns<V, Multiply, kRows, 3>(left, right, row, end, depth, first,
                                               epilogue);
      }
    }
    if (now == 2) {
      product_columns<V, Multiply, kRows, 2>(left, right, row, end, depth, first,
                                             epilogue);
    } else if (now == 1) {
      product_columns<V, Multiply, kRows, 1>(left, right, row, end, depth, first,
                                             epilogue);
    }
  }
}

// Computes left (rows, depth) * right (depth, vectors * width) and hands every
// register tile to epilogue(row, first vector, tile). `rows` must be a multiple of
// V::kTileRows: pad the left operand.
template <class V, class Multiply, class RightOperand, class Epilogue>
void product(Left<typename V::Scalar> left, RightOperand right, int64_t rows,
             int64_t depth, int64_t vectors, const Epilogue& epilogue) {
  product_rows<V, Multiply, V::kTileRows>(left, right, 0, rows, depth, vectors, epilogue);
}

// One tile of kRows rows or fewer.
template <class V, class Multiply, int kRows, class RightOperand, class Epilogue>
void product_of_few(Left<typename V::Scalar> left, RightOperand right, int64_t row,
                    int64_t end, int64_t depth, int64_t vectors,
                    const Epilogue& epilogue) {
  if constexpr (kRows > 1) {
    if (end - row < kRows) {
      product_of_few<V, Multiply, kRows - 1>(left, right, row, end, depth, vectors,
                                             epilogue);
      return;
    }
  }
  product_rows<V, Multiply, kRows>(left, right, row, end, depth, vectors, epilogue);
}

// The same for a few rows of any number, in tiles of even heights.
template <class V, class Multiply, class RightOperand, class Epilogue>
void unpadded_product(Left<typename V::Scalar> left, RightOperand right, int64_t rows,
                      int64_t depth, int64_t vectors, const Epilogue& epilogue) {
  const int64_t tiles = (rows + V::kTileRows - 1) / V::kTileRows;
  for (int64_t i = 0; i < tiles; ++i) {
    product_of_few<V, Multiply, V::kTileRows>(
        left, right, rows * i / tiles, rows * (i + 1) / tiles, depth, vectors, epilogue);
  }
}

// Puts the tiles into a matrix of rows `step` apart.
template <class V>
struct StoreTile {
  typename V::Scalar* to;
  int64_t step;

  template <int kRows, int kVectors>
  MMDGT_INLINE void operator()(int64_t row, int64_t first,
                               const typename V::Reg (&tile)[kRows][kVectors]) const {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      typename V::Scalar* line = to + (row + r) * step + first * V::kWidth;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) V::store(line + v * V::kWidth, tile[r][v]);
    }
  }
};

// Asks for a row that will be read soon.
template <class T>
MMDGT_INLINE void prefetch(const T* row, int64_t length) {
  const char* bytes = reinterpret_cast<const char*>(row);
  for (size_t i = 0; i < length * sizeof(T); i += 64) __builtin_prefetch(bytes + i);
}

// Copies a row of stored numbers into the working type, zeros up to `padded`.
template <class V, class T>
MMDGT_INLINE void copy_row(const T* from, typename V::Scalar* to, int64_t length,
                           int64_t padded) {
  int64_t i = 0;
  for (; i + V::kWidth <= length; i += V::kWidth) {
    V::store(to + i, V::load(from + i));
  }
  for (; i < length; ++i) to[i] = static_cast<typename V::Scalar>(from[i]);
  for (; i < padded; ++i) to[i] = 0;
}

// Stores factor * row in the tensor's type.
template <class V, class T>
MMDGT_INLINE void store_row(const typename V::Scalar* row, typename V::Scalar factor,
                            T* to, int64_t length) {
  int64_t i = 0;
  for (; i + V::kWidth <= length; i += V::kWidth) {
    V::store(to + i, V::load(row + i) * V::broadcast(factor));
  }
  for (; i < length; ++i) to[i] = static_cast<T>(row[i] * factor);
}

// Transposes (rows, columns), both multiples of the width.
template <class V>
void transpose(const typename V::Scalar* from, int64_t from_step, typename V::Scalar* to,
               int64_t to_step, int64_t rows, int64_t columns) {
  typename V::Reg tile[V::kWidth];
  for (int64_t row = 0; row < rows; row += V::kWidth) {
    for (int64_t column = 0; column < columns; column += V::kWidth) {
#pragma GCC unroll 16
      for (int i = 0; i < V::kWidth; ++i) {
        tile[i] = V::load(from + (row + i) * from_step + column);
      }
      V::transpose(tile);
#pragma GCC unroll 16
      for (int i = 0; i < V::kWidth; ++i) {
        V::store(to + (column + i) * to_step + row, tile[i]);
      }
    }
  }
}

}  // namespace mmdgt::cpu
