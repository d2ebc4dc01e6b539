// Products of matrices as they lie in memory: of attention, whose operands lie in steps of whole heads and have a few
// dozen rows, and of weight gradients, whose sums are long.
#pragma once
#include <algorithm>

#include "gemm_tile.h"

namespace er::ER_ISA {

constexpr int64_t kPanelColumns = kTileVectors * kLanes;

constexpr int64_t whole_vectors(int64_t cols) { return (cols + kLanes - 1) / kLanes * kLanes; }

// B of a product, [depth][cols]: rows `stride` apart, or packed by pack_transposed().
struct ProductColumns {
  const float* data;
  int64_t stride, packed;  // columns that were packed, if any; the stride is 0 then
};

// The columns of B are the rows of x[cols][depth], `stride` apart. Panels of kPanelColumns columns, the last with fewer
// vectors, each [depth][columns], zeros behind the last column.
__attribute__((noinline)) inline ProductColumns pack_transposed(const float* x, int64_t stride, int64_t cols,
                                                                int64_t depth, float* out) {
  const ProductColumns packed{out, 0, cols};
  for (int64_t panel = 0; panel < cols; panel += kPanelColumns) {
    const int64_t width = std::min(kPanelColumns, whole_vectors(cols - panel));
    for (int64_t v = 0; v < width; v += kLanes)
      for (int64_t k = 0; k < depth; k += kLanes) {
        VecF square[kLanes];
        for (int64_t i = 0; i < kLanes; i++) {
          const int64_t column = panel + v + i;
          square[i] = column < cols ? load_upto(x + column * stride + k, depth - k) : VecF{};
        }
        transpose(square);
        for (int64_t i = 0; i < kLanes && k + i < depth; i++) store(out + (k + i) * width + v, square[i]);
      }
    out += depth * width;
  }
  return packed;
}

// C[rows][cols], rows c_row apart, = A · B [+ C]; the element of A at (row, k) is a[row·a_row + k·a_step].
__attribute__((noinline)) inline void product(int64_t rows, int64_t cols, int64_t depth, const float* a, int64_t a_row,
                                              int64_t a_step, ProductColumns b, bool add, float* c, int64_t c_row) {
  const float* sources[kTileRowsNarrow];
  float* outputs[kTileRowsNarrow];
  GemmTile t{};
  t.a = sources, t.a_step = a_step, t.taps = 1, t.k = depth;
  t.c = outputs, t.adds = add;
  for (int64_t column = 0; column < cols; column += kPanelColumns) {
    const int64_t left = std::min(kPanelColumns, cols - column), vectors = whole_vectors(left) / kLanes;
    t.b = b.data + (b.stride ? column : column * depth);
    t.ldb = b.stride ? b.stride : std::min(kPanelColumns, whole_vectors(b.packed - column));
    t.last = static_cast<int>(left - (vectors - 1) * kLanes);
    t.partial_b = b.stride && t.last < kLanes;
    t.c_offset = column;
    const int64_t most = gemm_tile_rows(static_cast<int>(vectors)), pieces = (rows + most - 1) / most;
    for (int64_t i = 0; i < pieces; i++) {
      const int64_t begin = rows * i / pieces, count = rows * (i + 1) / pieces - begin;
      for (int64_t r = 0; r < count; r++) {
        sources[r] = a + (begin + r) * a_row;
        outputs[r] = c + (begin + r) * c_row;
      }
      gemm_tile(t, static_cast<int>(count), static_cast<int>(vectors));
    }
  }
}

// out[rows][out_row] = `cols` columns of x, whose rows are x_row apart, zeros behind them up to a whole vector.
inline void pack_rows(const float* x, int64_t x_row, int64_t rows, int64_t cols, float* out, int64_t out_row) {
  for (int64_t k = 0; k < rows; k++, x += x_row, out += out_row)
    for (int64_t c = 0; c < cols; c += kLanes) store(out + c, load_upto(x + c, cols - c));
}

// C[m][n] = Aᵀ · B [+ C] for A[k][m] and B[k][n], rows of A, B and C a_row, b_row and c_row apart: a weight gradient,
// of long sums. Columns of A and B are packed a block at a time, unless their rows are so near one another that they
// share pages and spread over the cache's sets.
class TransposedProduct {
 public:
  TransposedProduct(int64_t m, int64_t n, int64_t k, int64_t a_row, int64_t b_row, int64_t c_row)
      : m_(m), n_(n), k_(k), a_row_(a_row), b_row_(b_row), c_row_(c_row) {
    vectors_ = whole_vectors(n) / kLanes;
    panels_ = (vectors_ + kTileVectors - 1) / kTileVectors;
    depths_ = (k + kDepth - 1) / kDepth;
    const bool shallow = k <= kShallow;
    pieces_ = shallow ? (m + kShallow - 1) / kShallow : (m + kRows - 1) / kRows;
    pack_a_ = !shallow && a_row > kNear && panels_ > 1;
    pack_b_ = !shallow && b_row > kNear;
  }
  // Enough for a smaller product, too.
  int64_t scratch_floats() const {
    const int64_t depth = std::min(k_, kDepth);
    return depth * ((pack_a_ ? packed_row(std::min(m_, kRows)) : 0) +
                    (pack_b_ ? std::min(vectors_ * kLanes, kPanelColumns) : 0));
  }
  void run(const float* a, const float* b, bool add, float* c, float* scratch) const {
    if (k_ == 0 && !add)
      for (int64_t r = 0; r < m_; r++) std::fill_n(c + r * c_row_, n_, 0.f);
    if (m_ <= kSmall / n_) {  // C stays in the cache; A and B are read once
      for (int64_t d = 0; d < depths_; d++)
        for (int64_t i = 0; i < pieces_; i++) block(a, b, add, c, scratch, i, d);
      return;
    }
    for (int64_t i = 0; i < pieces_; i++)
      for (int64_t d = 0; d < depths_; d++) block(a, b, add, c, scratch, i, d);
  }

 private:
  // Products a sum at once: a wide panel of B stays in the second-level cache, a narrow one in the first.
  static constexpr int64_t kDepth = kLargeCache ? 512 : 256;
  static constexpr int64_t kRows = kLargeCache ? 384 : 258;  // of C at once: A's columns stay there
  static constexpr int64_t kSmall = 64 << 10;                // elements of C
  static constexpr int64_t kNear = 256;
  // Sums of so few products take less time than writing C, which is written a few rows at a time then.
  static constexpr int64_t kShallow = 16;

  // Floats between two packed rows of A: an odd number of lines, so that a column spreads over the cache's sets.
  static int64_t packed_row(int64_t rows) { return (rows + 15) / 32 * 32 + 16; }

  __attribute__((noinline)) void block(const float* a, const float* b, bool add, float* c, float* scratch, int64_t i,
                                       int64_t d) const {
    const int64_t row = m_ * i / pieces_, rows = m_ * (i + 1) / pieces_ - row;
    const int64_t first = k_ * d / depths_, depth = k_ * (d + 1) / depths_ - first;
    const float* from_a = a + first * a_row_ + row;
    int64_t a_row = a_row_;
    if (pack_a_) {
      pack_rows(from_a, a_row_, depth, rows, scratch, a_row = packed_row(rows));
      from_a = scratch;
      scratch += depth * a_row;
    }
    for (int64_t p = 0; p < panels_; p++) {
      const int64_t column = vectors_ * p / panels_ * kLanes,
                    cols = std::min(n_, vectors_ * (p + 1) / panels_ * kLanes) - column;
      ProductColumns columns{b + first * b_row_ + column, b_row_, 0};
      if (pack_b_) {
        pack_rows(columns.data, b_row_, depth, cols, scratch, whole_vectors(cols));
        columns = {scratch, whole_vectors(cols), 0};
      }
      product(rows, cols, depth, from_a, 1, a_row, columns, add || d > 0, c + row * c_row_ + column, c_row_);
    }
  }

  int64_t m_, n_, k_, a_row_, b_row_, c_row_;
  int64_t vectors_, panels_, depths_, pieces_;
  bool pack_a_, pack_b_;
};

}  // namespace er::ER_ISA
