// What the steps of packing (razor_pack.cpp, razor_threshold.cpp) share: blocks and tiles of a sample, and the parts
// that threads take.
#pragma once
#include "packed_read.h"
#include "razor_pack.h"

namespace er::ER_ISA {

struct Block {
  int64_t index, begin, rows;
  Block(const PackedLayout& at, int64_t i) : index(i), begin(at.row_begin(i)), rows(at.row_begin(i + 1) - begin) {}
};

// Where the rows of a block begin.
struct RowSteps {
  int64_t at[kBlockRows];
  explicit RowSteps(int64_t stride) {
    for (int64_t i = 0; i < kBlockRows; i++) at[i] = i * stride;
  }
};

// One block and column group of a sample, 16 columns wide: a group at the right edge is a copy padded with zeros.
struct Tile {
  const float* x;
  int64_t stride, rows, cols;
  int64_t ahead = 0;  // floats from here to what is read next, fetched meanwhile
  float mean[kGroupColumns];
  float padded[kBlockRows * kGroupColumns];

  Tile(const Sample& sample, const uint16_t* means, const Block& block, int64_t group) {
    const PackedLayout& at = sample.at;
    const int64_t c = group * kGroupColumns;
    rows = block.rows;
    cols = std::min(kGroupColumns, at.cols - c);
    x = sample.x + block.begin * sample.row + c, stride = sample.row;
    if (cols < kGroupColumns) {
      for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < kGroupColumns; j++) padded[i * kGroupColumns + j] = j < cols ? x[i * stride + j] : 0.f;
      x = padded, stride = kGroupColumns;
    }
    for (int64_t j = 0; j < kGroupColumns; j += kLanes)
      store(mean + j,
            means ? load_bf16(means + block.index * at.cols + c + j, std::max<int64_t>(0, cols - j)) : VecF{});
  }
  float residual(int64_t row, int64_t column) const { return x[row * stride + column] - mean[column]; }

  // word[column] bit `row` = test(magnitudes of the residuals). A vector holds the same row of kLanes columns, so that
  // words grow without any transposition.
  template <class Test>
  void mask(uint64_t* word, Test&& test) const {
    VecF m[kGroupVectors];
    for (int v = 0; v < kGroupVectors; v++) m[v] = load(mean + v * kLanes);
    uint32_t half[2][kGroupColumns];
    for (int h = 0; h < 2; h++) {
      VecI w[kGroupVectors] = {};
      const int64_t end = std::min<int64_t>(rows - h * 32, 32);
      const float* row = x + h * 32 * stride;
      for (int64_t i = 0; i < end; i++, row += stride) {
        const int32_t bit = static_cast<int32_t>(1u << i);
        __builtin_prefetch(row + ahead);
        for (int v = 0; v < kGroupVectors; v++) w[v] |= test(bits(abs(load(row + v * kLanes) - m[v])), v) & bit;
      }
      for (int v = 0; v < kGroupVectors; v++) std::memcpy(half[h] + v * kLanes, &w[v], sizeof(VecI));
    }
    for (int64_t j = 0; j < kGroupColumns; j++) word[j] = half[0][j] | static_cast<uint64_t>(half[1][j]) << 32;
  }

  // Writes the residuals of the set bits in the order (column, row), kAtOnce of a column at a time: most columns have
  // fewer, and a branch on their number is guessed wrong too often. Up to kAtOnce − 1 floats beyond may be written.
  static constexpr int kMostAtOnce = 8;
  template <int kAtOnce>
  void extract(const uint64_t* word, const RowSteps& step, float* out) const {
    const uint64_t last = uint64_t{1} << (rows - 1);  // keeps an empty word inside the block
    int64_t n = 0;
    for (int64_t j = 0; j < cols; j++) {
      const float* column = x + j;
      const float m = mean[j];
      uint64_t w = word[j];
      const int64_t count = __builtin_popcountll(w);
      int64_t i = 0;
      do {
#pragma GCC unroll 8
        for (int at = 0; at < kAtOnce; at++, w &= w - 1)
          out[n + i + at] = column[step.at[__builtin_ctzll(w | last)]] - m;
        i += kAtOnce;
      } while (i < count);
      n += count;
    }
  }
  // The same where all bits are set.
  __attribute__((noinline)) void extract_all(float* out) const {
    for (int v = 0; v < kGroupVectors; v++) {
      const VecF m = load(mean + v * kLanes);
      for (int64_t row = 0; row < rows; row += kLanes) {
        VecF square[kLanes];
        for (int64_t i = 0; i < kLanes; i++)
          square[i] = row + i < rows ? load(x + (row + i) * stride + v * kLanes) - m : VecF{};
        transpose(square);
        for (int64_t j = v * kLanes; j < std::min<int64_t>(cols, (v + 1) * kLanes); j++)
          store_upto(out + j * rows + row, square[j - v * kLanes], rows - row);
      }
    }
  }
};

// A range of a sample's blocks, the share of one thread.
struct Part {
  int64_t begin, end;
  uint32_t* histogram;   // [kBins]
  float* list;           // [list_capacity]: residuals
  int64_t listed;        // beyond the capacity if there were too many
  int64_t above;         // magnitudes over the bracket
  int64_t guess_blocks;  // that the guess looked at: they have their means
  bool all_means;        // all blocks have them
  int64_t looked;        // elements in the guess's histogram
  double over, over2;    // Σ and Σ² over the guess's blocks of the elements that the second look counts
  double energy;         // Σ r² of all residuals (centered)
  double kept_energy;    // Σ q² of what is kept, as it is stored
  int32_t largest;
  bool finite;
};

// Who packs the parts of a sample: the threads of a pool, or the calling one its only part.
struct Packers {
  ThreadPool* pool;
  int n_parts;

  // f(part) for every part.
  template <class F>
  void each(F&& f) const {
    if (!pool) return f(0);
    pool->run([&](int thread) {
      if (thread < n_parts) f(thread);
    });
  }
};

inline int64_t total(VecI v) {
  int64_t sum = 0;
  for (int j = 0; j < kLanes; j++) sum += v[j];
  return sum;
}

// Moves the lanes with set bits to `out` in order and returns their number; nothing beyond them is written.
inline int64_t compress(VecF v, uint32_t keep, float* out) {
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const int n = __builtin_popcount(keep);
  store_partial(out, (VecF)_mm512_maskz_compress_ps(static_cast<__mmask16>(keep), (__m512)v), n);
  return n;
#else
  int64_t n = 0;
  for (; keep; keep &= keep - 1) out[n++] = v[__builtin_ctz(keep)];
  return n;
#endif
}

// Means of columns [c, end) of a block, rows added in order. False if one is not finite.
bool write_means(const Sample& s, const Block& block, int64_t c, int64_t end);

}  // namespace er::ER_ISA
