// Rows of D elements: where they lie in device memory, in shared memory, and how
// they become operands of the tensor cores.
#pragma once

#include <ATen/core/Tensor.h>

#include "mma.cuh"

namespace mmdgt::cuda {

// Grids are (blocks of a head, H, B): this is the block's head among all B * H.
__device__ __forceinline__ int64_t own_head() {
  return static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y;
}

// The sizes of a head: L, G, K and D.
struct Sizes {
  int num_tokens, num_groups, num_keys, dim;

  Sizes(int64_t num_tokens, int64_t num_groups, int64_t num_keys, int64_t dim = 0)
      : num_tokens(static_cast<int>(num_tokens)),
        num_groups(static_cast<int>(num_groups)),
        num_keys(static_cast<int>(num_keys)),
        dim(static_cast<int>(dim)) {}
  // tokens (B,H,L,D)
  Sizes(const at::Tensor& tokens, int64_t num_groups, int64_t num_keys)
      : Sizes(tokens.size(2), num_groups, num_keys, tokens.size(3)) {}
};

// A (B,H,L,D) tensor of any strides but the last, which is 1.
template <typename T>
struct Rows {
  T* data;
  int64_t batch_stride, head_stride;
  int token_stride;

  explicit Rows(const at::Tensor& tokens)
      : data(static_cast<T*>(tokens.data_ptr())),
        batch_stride(tokens.stride(0)),
        head_stride(tokens.stride(1)),
        token_stride(static_cast<int>(tokens.stride(2))) {}

  // The same from an image on.
  Rows from_image(int64_t image) const {
    Rows rows = *this;
    rows.data += image * batch_stride;
    return rows;
  }

  __device__ __forceinline__ T* head(int b, int h) const {
    return data + b * batch_stride + h * head_stride;
  }
  // The rows of the block's own head.
  __device__ __forceinline__ T* head() const { return head(blockIdx.z, blockIdx.y); }
  __device__ __forceinline__ T* row(T* head, int token) const {
    return head + static_cast<int64_t>(token) * token_stride;
  }
};

// Kernels move 16 bytes at a time, so rows must start at multiples of that.
// Views of one projection do; whatever does not is copied.
inline at::Tensor aligned_rows(const at::Tensor& tokens) {
  const int64_t step = 16 / tokens.element_size();
  const bool aligned = reinterpret_cast<uintptr_t>(tokens.data_ptr()) % 16 == 0 &&
                       tokens.stride(0) % step == 0 && tokens.stride(1) % step == 0 &&
                       tokens.stride(2) % step == 0 && tokens.stride(2) < 1 << 29;
  return aligned ? tokens : tokens.clone(at::MemoryFormat::Contiguous);
}

// Kernels read two elements of a centroid at a time.
inline at::Tensor aligned_centroids(const at::Tensor& centroids) {
  const bool aligned = reinterpret_cast<uintptr_t>(centroids.data_ptr()) % 8 == 0;
  return aligned ? centroids : centroids.clone();
}

template <typename T>
__device__ __forceinline__ void negate(Pair<T> (&x)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(x[i]);
    x[i] = pack<T>(-pair.x, -pair.y);
  }
}

// A row as operand of products over D. Of every 32 elements a thread holds the
// eight from 8 * (lane % 4) on, as four pairs, so that it loads them at once; the
// k of the products are permuted alike for both operands, which changes nothing.
template <typename T, int D>
struct RowFragment {
  Pair<T> x[D / 32][4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int block = 0; block < D / 32; ++block) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[block][i] = pack<T>(0.f, 0.f);
    }
  }

  // From device memory; elements from `dim` on are zero.
  __device__ __forceinline__ void load(const T* row, int dim) {
    constexpr int kVectors = sizeof(Pair<T>) / 4;
    const int first = 8 * (threadIdx.x % 4);
    clear();
#pragma unroll
    for (int block = 0; block < D / 32; ++block) {
      const int column = 32 * block + first;
      if (column >= dim) continue;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        *(reinterpret_cast<uint4*>(x[block]) + v) =
            __ldg(reinterpret_cast<const uint4*>(row + column) + v);
      }
    }
  }

  __device__ __forceinline__ void negate() {
#pragma unroll
    for (int block = 0; block < D / 32; ++block) mmdgt::cuda::negate<T>(x[block]);
  }

  __device__ __forceinline__ FragmentB<T> operand_b(int step) const {
    return {{x[step / 2][2 * (step % 2)], x[step / 2][2 * (step % 2) + 1]}};
  }
};

// Rows r and r + 8 of a 16 row operand.
template <typename T, int D>
__device__ __forceinline__ FragmentA<T> operand_a(const RowFragment<T, D>& low,
                                                  const RowFragment<T, D>& high,
                                                  int step) {
  const int block = step / 2, i = 2 * (step % 2);
  return {{low.x[block][i], high.x[block][i], low.x[block][i + 1], high.x[block][i + 1]}};
}

// An operand of rows of D that is in registers while products go on. The two tf32 of
// every element, kept as well, would not fit.
template <int D, typename T>
__device__ __forceinline__ FragmentA<T> kept_operand(FragmentA<T> a) {
  if constexpr (sizeof(T) == 4 && D > 32) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      a.x[i].x = ptx::opaque(a.x[i].x);
      a.x[i].y = ptx::opaque(a.x[i].y);
    }
  }
  return a;
}

// Rows in shared memory, their 16 byte chunks permuted such that neither reading
// rows nor reading columns meets bank conflicts (D = 16 and 32).
template <typename T, int D>
struct SharedRows {
  static constexpr int kRowBytes = D * sizeof(T);
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kChunkElements = 16 / sizeof(T);

  uint32_t base;  // address within shared memory

  __device__ __forceinline__ explicit SharedRows(const void* memory)
      : base(ptx::shared_address(memory)) {}
  __device__ __forceinline__ explicit SharedRows(uint32_t base) : base(base) {}

  __device__ __forceinline__ uint32_t address(int row, int chunk) const {
    const int twist = kChunks == 2 ? row >> 2 & 1 : kChunks == 4 ? row >> 1 & 3 : row & 7;
    return base + row * kRowBytes + ((chunk ^ twist) << 4);
  }
  // The same of row `first` + `row`, `first` a multiple of 8: such rows share their
  // permutation, so a loop over them has little to compute.
  __device__ __forceinline__ uint32_t address(int row, int chunk, int first) const {
    return address(row, chunk) + first * kRowBytes;
  }

  // Starts to copy 16 bytes of a row of device memory, or zeros.
  __device__ __forceinline__ void copy_async(int row, int chunk, const T* source,
                                             bool valid) const {
    ptx::copy_16_bytes_async(address(row, chunk),
                             source + (valid ? chunk * kChunkElements : 0), valid);
  }

  // Negates 16 bytes of a row.
  __device__ __forceinline__ void negate_chunk(int row, int chunk) const {
    const uint32_t own = address(row, chunk);
    uint4 words = ptx::load_shared_16_bytes(own);
    negate<T>(reinterpret_cast<Pair<T>(&)[4]>(words));
    ptx::store_shared(own, words);
  }

  // In what follows `row` is a multiple of 8.

  // Row lane / 4 of the eight from `row` on.
  __device__ __forceinline__ RowFragment<T, D> load_rows(int row) const {
    RowFragment<T, D> fragment;
#pragma unroll
    for (int block = 0; block < D / 32; ++block)
      load_block(row, block, fragment.x[block]);
    return fragment;
  }
  // B operands of products over 16 rows from `row` on: columns 16 * pair and
  // 16 * pair + 8.
  __device__ __forceinline__ void load_columns(int row, int pair,
                                               FragmentB<T> (&b)[2]) const {
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(T) == 2) {
      const uint4 words =
          ptx::load_matrices_transposed(address(lane % 16, 2 * pair + lane / 16, row));
      b[0] = {{words.x, words.y}};
      b[1] = {{words.z, words.w}};
    } else {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int column = 16 * pair + 8 * i + lane / 4;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int first = 8 * half + 2 * (lane % 4);
          b[i].x[half] =
              make_float2(element(row, first, column), element(row, first + 1, column));
        }
      }
    }
  }

  // A operands of the 16 rows, and B operands of the 8 rows, from `row` on, of 32
  // elements. They fit each other, not RowFragment: k is in another order. As ldmatrix
  // leaves an A operand it stays in registers; words of two vectors would have to be
  // brought together for every product.
  __device__ __forceinline__ void load_operands(int row, int block,
                                                FragmentA<T> (&a)[2]) const {
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const uint4 words =
            ptx::load_matrices(address(lane % 16, 4 * block + 2 * step + lane / 16, row));
        a[step] = {{words.x, words.y, words.z, words.w}};
      }
    } else {
      RowFragment<T, 32> low, high;
      load_block(row, block, low.x[0]);
      load_block(row + 8, block, high.x[0]);
      a[0] = operand_a(low, high, 0);
      a[1] = operand_a(low, high, 1);
    }
  }
  __device__ __forceinline__ void load_operands(int row, int block,
                                                FragmentB<T> (&b)[2]) const {
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(T) == 2) {
      const uint4 words =
          ptx::load_matrices(address(lane % 8, 4 * block + lane / 8, row));
      b[0] = {{words.x, words.y}};
      b[1] = {{words.z, words.w}};
    } else {
      RowFragment<T, 32> own;
      load_block(row, block, own.x[0]);
      b[0] = own.operand_b(0);
      b[1] = own.operand_b(1);
    }
  }

  // For rows of 16: the A operand that the 16 rows from `row` on are columns of.
  __device__ __forceinline__ FragmentA<T> load_transposed(int row) const {
    const int lane = threadIdx.x % 32;
    if constexpr (sizeof(T) == 2) {
      const uint4 words = ptx::load_matrices_transposed(
          address(lane % 8 + 8 * (lane / 16), lane / 8 % 2, row));
      return {{words.x, words.y, words.z, words.w}};
    } else {
      FragmentB<T> b[2];
      load_columns(row, 0, b);
      return {{b[0].x[0], b[1].x[0], b[0].x[1], b[1].x[1]}};
    }
  }

  // Elements `column`, which is even, and column + 1 of row `row` + `own`.
  __device__ __forceinline__ void store_pair(int row, int own, int column,
                                             Pair<T> pair) const {
    ptx::store_shared(address(own, column / kChunkElements, row) +
                          column % kChunkElements * static_cast<int>(sizeof(T)),
                      pair);
  }

  // For rows of 16: writes the first `rows` rows of an A operand from `row` on.
  __device__ __forceinline__ void store_operand(int row, const FragmentA<T>& a,
                                                int rows = 16) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int own = 8 * (i % 2) + lane / 4;
      if (own < rows) store_pair(row, own, 8 * (i / 2) + 2 * (lane % 4), a.x[i]);
    }
  }

 private:
  __device__ __forceinline__ void load_block(int row, int block, Pair<T> (&x)[4]) const {
    constexpr int kVectors = sizeof(Pair<T>) / 4;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      *(reinterpret_cast<uint4*>(x) + v) = ptx::load_shared_16_bytes(address(
          threadIdx.x % 32 / 4, (4 * block + threadIdx.x % 4) * kVectors + v, row));
    }
  }
  __device__ __forceinline__ float element(int row, int own, int column) const {
    return ptx::load_shared(address(own, column / 4, row) + column % 4 * 4);
  }
};

// Copies kRows rows, named by a list of tokens, to shared memory. Looking up the
// tokens is a step of its own, so that it can run ahead of the copies.
template <typename T, int D, int kThreads, int kRows>
struct RowGather {
  using Shared = SharedRows<T, D>;
  static constexpr int kChunks = Shared::kChunks;
  static constexpr int kStep = kThreads / kChunks;  // rows at a time
  static constexpr int kCopies = (kRows + kStep - 1) / kStep;

  int token[kCopies];  // -1 for none
  int last;            // no token may exceed it, lest it do harm

  // tokens[0..count). Nothing is done with them yet, so that nothing waits for them.
  __device__ __forceinline__ void look_up(const int* tokens, int count, int last) {
    this->last = last;
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int row = threadIdx.x / kChunks + i * kStep;
      token[i] = row < min(count, kRows) ? tokens[row] : -1;
    }
  }

  // Calls visit(row, token) for the rows of which this thread copies a chunk.
  template <typename Visit>
  __device__ __forceinline__ void each_row(Visit&& visit) const {
    static_assert(kRows % kStep == 0, "not all threads would visit as many rows");
#pragma unroll
    for (int i = 0; i < kCopies; ++i) visit(threadIdx.x / kChunks + i * kStep, token[i]);
  }

  // Rows without a token become zero.
  __device__ __forceinline__ void copy(const Shared& shared, const T* head,
                                       int token_stride, int dim) const {
    const int chunk = threadIdx.x % kChunks;
    const int first = threadIdx.x / kChunks;
    const bool inside = chunk * Shared::kChunkElements < dim;
    const char* source = reinterpret_cast<const char*>(head) + (inside ? chunk * 16 : 0);
    const uint32_t stride = token_stride * sizeof(T);
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      if ((i + 1) * kStep > kRows && first + i * kStep >= kRows) break;
      const uint32_t at = min(max(token[i], 0), last);
      // Rows a multiple of 8 apart share their permutation.
      const uint32_t target =
          kStep % 8 == 0 ? shared.address(first, chunk) + i * kStep * Shared::kRowBytes
                         : shared.address(first + i * kStep, chunk);
      ptx::copy_16_bytes_async(target, source + static_cast<uint64_t>(at) * stride,
                               inside && token[i] >= 0);
    }
  }
};

// Transposes 4x4 words among the four lanes of a quad: word j of lane q becomes
// word q of lane j.
__device__ __forceinline__ void transpose_quad(uint32_t (&x)[4]) {
  const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(~0u, odd ? x[i] : x[i + 1], 1);
    if (odd)
      x[i] = other;
    else
      x[i + 1] = other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(~0u, upper ? x[i] : x[i + 2], 2);
    if (upper)
      x[i] = other;
    else
      x[i + 2] = other;
  }
}

// Writes row r (half = 0) or r + 8 (half = 1) of a 16xD result, times `factor`.
// The quad that holds the row exchanges its parts to write 16 bytes at a time.
// Called by whole warps; rows that do not exist have no destination.
template <typename T, int D>
__device__ __forceinline__ void store_row(const float (&c)[D / 8][4], int half,
                                          float factor, T* row, int dim) {
  constexpr int kWords = sizeof(Pair<T>) / 4;
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int block = 0; block < D / 32; ++block) {
    uint32_t word[kWords][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Pair<T> pair = pack<T>(c[4 * block + i][2 * half] * factor,
                                   c[4 * block + i][2 * half + 1] * factor);
      const auto* words = reinterpret_cast<const uint32_t*>(&pair);
#pragma unroll
      for (int w = 0; w < kWords; ++w) word[w][i] = words[w];
    }
#pragma unroll
    for (int w = 0; w < kWords; ++w) transpose_quad(word[w]);
    const int column = 32 * block + 8 * q;
    if (row == nullptr || column >= dim) continue;
    auto* target = reinterpret_cast<uint4*>(row + column);
    if constexpr (kWords == 1) {
      target[0] = make_uint4(word[0][0], word[0][1], word[0][2], word[0][3]);
    } else {
      target[0] = make_uint4(word[0][0], word[1][0], word[0][1], word[1][1]);
      target[1] = make_uint4(word[0][2], word[1][2], word[0][3], word[1][3]);
    }
  }
}

}  // namespace mmdgt::cuda
