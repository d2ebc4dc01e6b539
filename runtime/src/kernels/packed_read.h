// Reading of kept tensors, tile by tile, for the kernels that compute on them.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../columns.h"
#include "../packed.h"
#include "../simd.h"
#include "bytes.h"

namespace er::ER_ISA {

constexpr int kGroupVectors = kGroupColumns / kLanes;
static_assert(kGroupColumns % kLanes == 0, "a vector crosses no column group");

// Reads the kept tensor, or the samples of it, that `layout` describes. Mask words and offsets are tensor contents, so
// nothing says that they are those of a packed tensor: what they point to is checked.
class KeptReader {
 public:
  KeptReader(const PackedLayout& layout, const void* kept) : KeptReader(layout, kept, {layout.cols, 0}) {}
  // A tensor in form 0 may be columns of wider rows.
  KeptReader(const PackedLayout& layout, const void* kept, Columns columns)
      : at(layout),
        row(columns.row),
        in_(layout, const_cast<void*>(kept)),
        dense_(reinterpret_cast<const float*>(in_.value) + columns.column),
        half_(reinterpret_cast<const uint16_t*>(in_.value)) {}

  const PackedLayout at;
  const int64_t row;  // floats between two rows in form 0

  // First mask word and mean of a block; add the column.
  const uint64_t* mask(int64_t sample, int64_t block) const {
    return in_.mask + (sample * at.blocks + block) * at.cols;
  }
  const uint16_t* mean(int64_t sample, int64_t block) const {
    return in_.mean + (sample * at.blocks + block) * at.cols;
  }
  // First element of a row of a tensor in form 0 or 1, rows counted over all samples.
  const float* dense_row(int64_t index) const { return dense_ + index * row; }
  const uint16_t* half_row(int64_t index) const { return half_ + index * at.cols; }

  // Forms 2 and 3: the values of a block and column group as floats, in packed order (column, row), at most 1024;
  // centered: the residuals. Writes up to kLanes − 1 floats more. False if the group's mask and offset point outside
  // the sample's values.
  bool values(int64_t sample, int64_t block, int64_t group, float* out) const {
    int64_t n;
    const int64_t index = group_values(sample, block, group, &n);
    if (index < 0) return false;
    if (at.form == kCentered)
      to_floats(reinterpret_cast<const int8_t*>(in_.value) + index, n, in_.scale[sample], out);
    else
      to_floats(reinterpret_cast<const uint16_t*>(in_.value) + index, n, out);
    return true;
  }

  // Writes a block's columns [begin, begin + count), all inside one column group, as [rows of the block][kGroupColumns]
  // with row stride `stride`; columns up to the next multiple of kLanes may be written too. `values` is working space
  // of kGroupValues floats, which may all be read. False as above.
  bool tile(int64_t sample, int64_t block, int64_t begin, int64_t count, float* out, int64_t stride,
            float* scratch) const {
    const int64_t first = at.row_begin(block), rows = at.row_begin(block + 1) - first;
    if (at.form == kDense || at.form == kBf16) {
      for (int64_t i = 0; i < rows; i++) {
        const int64_t index = sample * at.rows + first + i;
        float* to = out + i * stride;
        if (at.form == kBf16)
          to_floats(half_row(index) + begin, count, to);
        else
          for (int64_t c = 0; c < count; c += kLanes) store(to + c, load_upto(dense_row(index) + begin + c, count - c));
      }
      return true;
    }
#ifdef ER_BYTE_MASKS
    if (at.form == kCentered && begin % kGroupColumns == 0 && byte_masks) {
      int64_t n;
      const int64_t index = group_values(sample, block, begin / kGroupColumns, &n);
      if (index >= 0)
        expand_bytes(mask(sample, block) + begin, mean(sample, block) + begin, count, rows,
                     reinterpret_cast<const int8_t*>(in_.value) + index, in_.scale[sample], out, stride);
      return index >= 0;
    }
#endif
    if (!values(sample, block, begin / kGroupColumns, scratch)) return false;
    const uint64_t* words = mask(sample, block);
    const uint64_t inside = rows == kBlockRows ? ~uint64_t{0} : (uint64_t{1} << rows) - 1;
    float means[kGroupColumns] = {};
    if (at.form == kCentered)
      for (int64_t j = 0; j < count; j++) means[j] = from_bf16(mean(sample, block)[begin + j]);
    if (begin % kGroupColumns == 0 &&
        std::all_of(words + begin, words + begin + count, [=](uint64_t word) { return word == inside; })) {
      whole_tile(rows, count, means, scratch, out, stride);
      return true;
    }
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < count; j += kLanes) store(out + i * stride + j, load(means + j));
    const float* value = scratch;
    for (int64_t c = begin / kGroupColumns * kGroupColumns; c < begin + count; c++) {
      if (c >= begin) add_values(words[c] & inside, rows, value, out + c - begin, stride);
      value += __builtin_popcountll(words[c]);
    }
    return true;
  }

 private:
  // The index, counted over all samples, of the first of a group's `n` values; −1 if they are not inside the sample's.
  int64_t group_values(int64_t sample, int64_t block, int64_t group, int64_t* n) const {
    const uint64_t* words = mask(sample, block);
    *n = 0;
    for (int64_t c = group * kGroupColumns; c < std::min(at.cols, (group + 1) * kGroupColumns); c++)
      *n += __builtin_popcountll(words[c]);
    const int64_t first = in_.offset[(sample * at.blocks + block) * at.groups + group];
    return first + *n > at.keep ? -1 : sample * at.keep + first;
  }
#ifdef ER_BYTE_MASKS
  // tile() of a whole group from its int8 values: one instruction moves those of a column to their rows, then 16
  // columns of 64 bytes are turned into rows of 16.
  ER_BYTE_MASKS static void expand_bytes(const uint64_t* words, const uint16_t* means, int64_t cols, int64_t rows,
                                         const int8_t* values, float scale, float* out, int64_t stride) {
    __m512i column[kGroupColumns];
#pragma GCC unroll 16
    for (int64_t j = 0; j < kGroupColumns; j++) {
      const uint64_t word = j < cols ? words[j] : 0;
      column[j] = _mm512_maskz_expandloadu_epi8(word, values);
      values += __builtin_popcountll(word);
    }
#pragma GCC unroll 4
    for (int stage = 0; stage < 4; stage++) {  // a perfect shuffle, four times
      __m512i next[kGroupColumns];
#pragma GCC unroll 8
      for (int j = 0; j < 8; j++) {
        next[2 * j] = _mm512_unpacklo_epi8(column[j], column[j + 8]);
        next[2 * j + 1] = _mm512_unpackhi_epi8(column[j], column[j + 8]);
      }
      std::memcpy(column, next, sizeof column);
    }
    alignas(64) int8_t bytes[16][4][16];  // of row 16·k + i at [i][k]
    std::memcpy(bytes, column, sizeof bytes);
    const VecF mean = load_bf16(means, cols), unit = broadcast(scale);
    for (int64_t part = 0; part * 16 < rows; part++)
      for (int64_t i = 0; i < std::min<int64_t>(16, rows - part * 16); i++, out += stride) {
        VecB b;
        std::memcpy(&b, bytes[i][part], sizeof b);
        store(out, mean + to_float(widen(b)) * unit);
      }
  }
#endif
  // Adds values to those of a column's `rows` rows whose bits are set. Four at a time, even if fewer are left: most
  // words have few bits, and a branch on their number is guessed wrong too often. What is behind them adds 0 to the
  // last row.
  static void add_values(uint64_t word, int64_t rows, const float* value, float* column, int64_t stride) {
    typedef int32_t Four __attribute__((vector_size(16)));
    typedef float Values __attribute__((vector_size(16)));
    const uint64_t last = uint64_t{1} << (rows - 1);
    int left = __builtin_popcountll(word);
    do {
      Four residuals;
      std::memcpy(&residuals, value, sizeof residuals);
      const Values four = (Values)(residuals & (Four{0, 1, 2, 3} < left));
      for (int i = 0; i < 4; i++, word &= word - 1) column[__builtin_ctzll(word | last) * stride] += four[i];
      value += 4, left -= 4;
    } while (left > 0);
  }
  // tile() where nothing was dropped: the values are the transposed tile. They may be read to the end of scratch.
  __attribute__((noinline)) static void whole_tile(int64_t rows, int64_t cols, const float* means, const float* values,
                                                   float* out, int64_t stride) {
    for (int64_t c = 0; c < cols; c += kLanes)
      for (int64_t row = 0; row < rows; row += kLanes) {
        VecF square[kLanes];
        for (int64_t i = 0; i < kLanes; i++) square[i] = c + i < cols ? load(values + (c + i) * rows + row) : VecF{};
        transpose(square);
        const VecF mean = load(means + c);
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, rows - row); i++)
          store(out + (row + i) * stride + c, mean + square[i]);
      }
  }
  static void to_floats(const int8_t* in, int64_t n, float scale, float* out) {
    for (int64_t i = 0; i < n; i += kLanes) {
      VecB b{};
      copy_in(&b, in + i, n - i);
      store(out + i, to_float(widen(b)) * broadcast(scale));
    }
  }
  static void to_floats(const uint16_t* in, int64_t n, float* out) {
    for (int64_t i = 0; i < n; i += kLanes) {
      VecH h{};
      copy_in(&h, in + i, n - i);
      store(out + i, (VecF)(widen(h) << 16));
    }
  }
  template <class V, class T>
  static void copy_in(V* v, const T* in, int64_t left) {
    if (left >= kLanes)
      std::memcpy(v, in, sizeof *v);
    else
      std::memcpy(v, in, left * sizeof(T));
  }

  PackedSections in_;
  const float* dense_;
  const uint16_t* half_;
};

// Floats that KeptReader::values may write.
constexpr int64_t kGroupValues = kBlockRows * kGroupColumns + kLanes;

}  // namespace er::ER_ISA
