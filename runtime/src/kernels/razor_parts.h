// What the steps of packing (razor_pack.cpp, razor_threshold.cpp) share: blocks and tiles of a sample, and the parts
// that threads take.
#pragma once
#include <array>

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

// Fetches rows of a matrix into the cache, in their order, a line at each call: for what is read next.
struct Fetch {
  const float* at;
  int64_t skip;             // floats from the end of a row to the next one
  int64_t line = 0, lines;  // of a row
  void operator()() {
    __builtin_prefetch(at, 0, 2);
    at += kLineFloats;
    if (++line == lines) line = 0, at += skip;
  }
  static constexpr int64_t kLineFloats = 16;
};

// One block and column group of a sample, 16 columns wide: a group at the right edge is a copy padded with zeros.
struct Tile {
  const float* x;
  int64_t stride, rows, cols;
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
        for (int64_t j = 0; j < kGroupColumns; j += kLanes)
          store(padded + i * kGroupColumns + j, load_upto(x + i * stride + j, std::max<int64_t>(0, cols - j)));
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
        for (int v = 0; v < kGroupVectors; v++) w[v] |= test(bits(abs(load(row + v * kLanes) - m[v])), v) & bit;
      }
      for (int v = 0; v < kGroupVectors; v++) std::memcpy(half[h] + v * kLanes, &w[v], sizeof(VecI));
    }
    for (int64_t j = 0; j < kGroupColumns; j++) word[j] = half[0][j] | static_cast<uint64_t>(half[1][j]) << 32;
  }

#if ER_VECTOR_BYTES == 64 && defined(__AVX512BW__)
  static constexpr auto kRowBit = [] {
    std::array<int32_t, 32> bit{};
    for (size_t i = 0; i < bit.size(); i++) bit[i] = static_cast<int32_t>(1u << i);
    return bit;
  }();
#endif

  // word[column] bit `row` = whether the residual's magnitude is `least` or more. Adds all squares to squares[].
  void mask_from(int32_t least, uint64_t* word, VecF* squares, Fetch& fetch) const {
#if ER_VECTOR_BYTES == 64 && defined(__AVX512BW__)
    // The comparison's bits choose the columns whose word gets the row's bit: no vector of comparisons is made.
    const __m512i bound = _mm512_set1_epi32(least);
    const VecF m = load(mean);
    VecF square[2] = {};  // two sums hide the latency of the addition
    __m512i half[2];      // of the rows
    const float* row = x;
    for (int h = 0; h < 2; h++) {
      const int64_t end = std::min<int64_t>(rows - h * 32, 32);
      __m512i w = _mm512_setzero_si512();
      auto test = [&](const float* row, int64_t i, VecF* to) {
        const VecF r = abs(load(row) - m);
        *to += r * r;
        w = _mm512_mask_or_epi32(w, _mm512_cmpge_epi32_mask((__m512i)r, bound), w, _mm512_set1_epi32(kRowBit[i]));
      };
      int64_t i = 0;
      for (; i + 2 <= end; i += 2, row += 2 * stride) {
        fetch(), fetch();
        test(row, i, square);
        test(row + stride, i + 1, square + 1);
      }
      if (i < end) test(row, i, square), row += stride;
      half[h] = w;
    }
    squares[0] += square[0] + square[1];
    // Whole vectors: what reads a word next need not wait until it is in the cache.
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i eight = _mm512_set1_epi32(8);
    _mm512_storeu_si512(word, _mm512_permutex2var_epi32(half[0], low, half[1]));
    _mm512_storeu_si512(word + 8, _mm512_permutex2var_epi32(half[0], _mm512_add_epi32(low, eight), half[1]));
#else
    const VecI bound = broadcast(least);
    mask(word, [&](VecI m, int v) {
      if (v == 0) fetch();
      squares[v] += (VecF)m * (VecF)m;
      return m >= bound;
    });
#endif
  }

  // Writes the residuals of the `n` set bits in the order (column, row), and up to kBeyond floats beyond.
  static constexpr int kBeyond = 16;
  void extract(const uint64_t* word, int64_t n, const RowSteps& step, float* out) const {
    if (n == rows * cols) return extract_all(out);
#ifdef ER_BYTE_MASKS
    if (byte_masks && stride <= kWidestGather) return extract_bytes(word, out);
#endif
    // At so many of a column at once most columns are done: a branch on their number is guessed wrong too often.
    if (n <= kGroupColumns * 5 / 2) return extract_some<4>(word, step, out);
    extract_some<8>(word, step, out);
  }
  template <int kAtOnce>
  void extract_some(const uint64_t* word, const RowSteps& step, float* out) const {
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
#ifdef ER_BYTE_MASKS
  // Without a branch on any column: the rows of a column's bits are one instruction, 16 residuals another.
  static constexpr int64_t kWidestGather = INT32_MAX / kBlockRows - 1;  // its indices have 32 bits
  static constexpr auto kRows = [] {
    std::array<uint8_t, kBlockRows> rows{};
    for (size_t i = 0; i < rows.size(); i++) rows[i] = static_cast<uint8_t>(i);
    return rows;
  }();
  ER_BYTE_MASKS void extract_bytes(const uint64_t* word, float* out) const {
    // Aligned, so that their first bytes, as a rule all that are used, cross no page: a store that does takes long.
    alignas(256) uint8_t row[kBlockRows * kGroupColumns + 64];
    alignas(256) uint8_t column[kBlockRows * kGroupColumns + 64];
    const __m512i rows_of = _mm512_loadu_si512(kRows.data());
    int64_t n = 0;
    for (int64_t j = 0; j < kGroupColumns; j++) {
      _mm512_storeu_si512(row + n, _mm512_maskz_compress_epi8(word[j], rows_of));
      _mm512_storeu_si512(column + n, _mm512_set1_epi8(static_cast<int8_t>(j)));
      n += __builtin_popcountll(word[j]);
    }
    const __m512i step = _mm512_set1_epi32(static_cast<int32_t>(stride));
    for (int64_t i = 0; i < n; i += kLanes) {
      const auto inside = static_cast<__mmask16>(n - i < kLanes ? (1u << (n - i)) - 1 : 0xffff);
      const __m512i r = _mm512_maskz_cvtepu8_epi32(inside, _mm_load_si128(reinterpret_cast<const __m128i*>(row + i)));
      const __m512i c =
          _mm512_maskz_cvtepu8_epi32(inside, _mm_load_si128(reinterpret_cast<const __m128i*>(column + i)));
      const __m512i at = _mm512_add_epi32(_mm512_mullo_epi32(r, step), c);
      const __m512 value = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside, at, x, sizeof(float));
      store(out + i, (VecF)value - (VecF)_mm512_maskz_permutexvar_ps(0xffff, c, (__m512)load(mean)));
    }
  }
#endif
  // Where all bits are set.
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

// Those of a list whose magnitudes lie in [low, top], none at first, and the number of those above.
struct Among {
  int32_t low = INT_MAX, top = 0;
  const float* list = nullptr;
  int64_t listed = 0, above = 0;
};

// A range of a sample's blocks, the share of one thread.
struct Part {
  int64_t begin, end;
  uint32_t* histogram;  // [kBins]
  float* list;          // [list_capacity]: residuals
  int64_t listed;       // beyond the capacity if there were too many
  int64_t above;        // magnitudes over the bracket
  Among among;
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

// Means of columns [c, end) of a block, rows added in order. False if one is not finite.
bool write_means(const Sample& s, const Block& block, int64_t c, int64_t end) noexcept;

}  // namespace er::ER_ISA
