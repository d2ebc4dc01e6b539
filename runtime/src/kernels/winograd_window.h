// The transform of a 4×4 window in Winograd's F(2×2, 3×3), which convolutions and their weight gradients share.
#pragma once
#include "../simd.h"

namespace er::ER_ISA {

// out[p·point_stride + k] = (Bᵀ x B)[p] with Bᵀ = [1 0 −1 0; 0 1 1 0; 0 −1 1 0; 0 1 0 −1] for channels k < n, where
// x[r][c] = rows[r][c][k]. Up to a multiple of kLanes channels are written.
inline void transform_window(const float* const rows[4][4], int64_t n, float* out, int64_t point_stride) {
  auto vector = [&](int64_t k, int64_t left) __attribute__((always_inline)) {
    VecF t[4][4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
      VecF x0 = load_upto(rows[0][c] + k, left), x1 = load_upto(rows[1][c] + k, left);
      VecF x2 = load_upto(rows[2][c] + k, left), x3 = load_upto(rows[3][c] + k, left);
      t[0][c] = x0 - x2;
      t[1][c] = x1 + x2;
      t[2][c] = x2 - x1;
      t[3][c] = x1 - x3;
    }
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      float* to = out + k + 4 * r * point_stride;
      store(to, t[r][0] - t[r][2]);
      store(to + point_stride, t[r][1] + t[r][2]);
      store(to + 2 * point_stride, t[r][2] - t[r][1]);
      store(to + 3 * point_stride, t[r][1] - t[r][3]);
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= n; k += kLanes) vector(k, kLanes);
  if (k < n) vector(k, n - k);
}

}  // namespace er::ER_ISA
