// The products of attention: of a few dozen rows, with operands that lie in steps of whole heads or in scratch, so
// small that a BLAS call would spend a good part of its time in copies.
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
inline ProductColumns pack_transposed(const float* x, int64_t stride, int64_t cols, int64_t depth, float* out) {
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
inline void product(int64_t rows, int64_t cols, int64_t depth, const float* a, int64_t a_row, int64_t a_step,
                    ProductColumns b, bool add, float* c, int64_t c_row) {
  const float* sources[kTileRowsNarrow];
  float* outputs[kTileRowsNarrow];
  GemmTile t{};
  t.a = sources, t.a_step = a_step, t.taps = 1, t.k = depth;
  t.c = outputs, t.load_c = add;
  for (int64_t column = 0; column < cols; column += kPanelColumns) {
    const int64_t left = std::min(kPanelColumns, cols - column), vectors = whole_vectors(left) / kLanes;
    t.b = b.data + (b.stride ? column : column * depth);
    t.ldb = b.stride ? b.stride : std::min(kPanelColumns, whole_vectors(b.packed - column));
    t.last = static_cast<int>(left - (vectors - 1) * kLanes);
    t.c_offset = column;
    const int64_t most = gemm_tile_rows(static_cast<int>(vectors)), pieces = (rows + most - 1) / most;
    for (int64_t i = 0; i < pieces; i++) {
      const int64_t begin = rows * i / pieces, count = rows * (i + 1) / pieces - begin;
      for (int64_t r = 0; r < count; r++) {
        sources[r] = a + (begin + r) * a_row;
        outputs[r] = c + (begin + r) * c_row;
      }
      gemm_tile(t, static_cast<int>(count), static_cast<int>(vectors), b.stride && t.last < kLanes);
    }
  }
}

}  // namespace er::ER_ISA
