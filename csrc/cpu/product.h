// Small matrix products with the result in registers. To be included inside a
// target region (target.h).
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
};

template <class V, class Multiply, int kVectors, class Epilogue>
void product_columns(Left<typename V::Scalar> left, Right<typename V::Scalar> right,
                     int64_t rows, int64_t depth, int64_t first,
                     const Epilogue& epilogue) {
  using Reg = typename V::Reg;
  constexpr int kRows = V::kTileRows;
  for (int64_t row = 0; row < rows; row += kRows) {
    Reg tile[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) tile[r][v] = V::zero();
    }
    const typename V::Scalar* a = left.data + row * left.row_step;
    const typename V::Scalar* b = right.data + first * V::kWidth;
    for (int64_t d = 0; d < depth; ++d) {
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
      b += right.step;
    }
    epilogue.template operator()<kVectors>(row, first, tile);
  }
}

// Computes left (rows, depth) * right (depth, vectors * width) and hands every
// register tile to epilogue(row, first vector, tile). `rows` must be a multiple of
// V::kTileRows: pad the left operand.
template <class V, class Multiply, class Epilogue>
void product(Left<typename V::Scalar> left, Right<typename V::Scalar> right, int64_t rows,
             int64_t depth, int64_t vectors, const Epilogue& epilogue) {
  for (int64_t first = 0; first < vectors; first += V::kTileVectors) {
    const int64_t now = std::min<int64_t>(V::kTileVectors, vectors - first);
    if constexpr (V::kTileVectors >= 4) {
      if (now == 4) {
        product_columns<V, Multiply, 4>(left, right, rows, depth, first, epilogue);
      } else if (now == 3) {
        product_columns<V, Multiply, 3>(left, right, rows, depth, first, epilogue);
      }
    }
    if (now == 2) {
      product_columns<V, Multiply, 2>(left, right, rows, depth, first, epilogue);
    } else if (now == 1) {
      product_columns<V, Multiply, 1>(left, right, rows, depth, first, epilogue);
    }
  }
}

// Puts the tiles into a matrix of rows `step` apart.
template <class V>
struct StoreTile {
  typename V::Scalar* to;
  int64_t step;

  template <int kVectors, class Tile>
  MMDGT_INLINE void operator()(int64_t row, int64_t first, const Tile& tile) const {
#pragma GCC unroll 8
    for (int r = 0; r < V::kTileRows; ++r) {
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
