#include "ptx.h"

namespace mmdgt::ptx {
namespace {

// C (16x8) += A (16xK) B (Kx8). A word of an operand holds 32 / bits elements that are
// neighbours in K; the words of lane 4 * r + q are
//   A: rows r and r + 8 at word q of a row, then the same at word q + 4
//   B: column r at words q and q + 4
//   C: columns 2q and 2q + 1 of row r, then of row r + 8
template <int K, typename ToFloat>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
         ToFloat&& to_float) {
  constexpr int kPerWord = K / 8;
  struct Mma {
    float* c;
    const uint32_t *a, *b;
  } own{c, a, b};
  emulation::exchange(~0u, own, [&](const emulation::Lanes<Mma>& all) {
    float A[16][K], B[K][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int r = lane / 4, q = lane % 4;
      for (int i = 0; i < kPerWord; ++i) {
        for (int x = 0; x < 4; ++x) {
          A[r + 8 * (x % 2)][kPerWord * (q + 4 * (x / 2)) + i] =
              to_float(all[lane].a[x], i);
        }
        for (int x = 0; x < 2; ++x) {
          B[kPerWord * (q + 4 * x) + i][r] = to_float(all[lane].b[x], i);
        }
      }
    }
    float C[16][8] = {};
    for (int row = 0; row < 16; ++row) {
      for (int k = 0; k < K; ++k) {
        for (int column = 0; column < 8; ++column) {
          C[row][column] += A[row][k] * B[k][column];
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int x = 0; x < 4; ++x) {
        all[lane].c[x] += C[lane / 4 + 8 * (x / 2)][2 * (lane % 4) + x % 2];
      }
    }
  });
}

}  // namespace

void mma_m16n8k16_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<16>(c, a, b, [](uint32_t word, int i) {
    return __uint_as_float(i == 0 ? word << 16 : word & 0xffff0000u);
  });
}

void mma_m16n8k16_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<16>(c, a, b, [](uint32_t word, int i) {
    return static_cast<float>(
        c10::Half(static_cast<uint16_t>(word >> 16 * i), c10::Half::from_bits()));
  });
}

void mma_m16n8k8_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma<8>(c, a, b, [](uint32_t word, int) { return __uint_as_float(word & 0xffffe000u); });
}

namespace {

struct Position {
  int row, column;
};

// Four 8x8 matrices. A lane gets the two elements position_of(lane / 4, element of its
// pair) of each.
template <typename PositionOf>
uint4 load_four(uint32_t address, PositionOf&& position_of) {
  struct LoadMatrices {
    uint16_t row[8];
    uint32_t words[4];
  } own;
  const uint4 row = load_shared_16_bytes(address);
  std::memcpy(own.row, &row, sizeof(row));
  emulation::exchange(~0u, own, [&](const emulation::Lanes<LoadMatrices>& all) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t word = 0;
        for (int i = 0; i < 2; ++i) {
          const Position at = position_of(lane / 4, 2 * (lane % 4) + i);
          word |= static_cast<uint32_t>(all[8 * matrix + at.row].row[at.column])
                  << 16 * i;
        }
        all[lane].words[matrix] = word;
      }
    }
  });
  return {own.words[0], own.words[1], own.words[2], own.words[3]};
}

}  // namespace

uint4 load_matrices(uint32_t address) {
  return load_four(address, [](int own, int of_pair) { return Position{own, of_pair}; });
}

uint4 load_matrices_transposed(uint32_t address) {
  return load_four(address, [](int own, int of_pair) { return Position{of_pair, own}; });
}

}  // namespace mmdgt::ptx
