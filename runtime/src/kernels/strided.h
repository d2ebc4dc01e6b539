// Loops over a tensor with strided operands: dimensions of size 1 drop out and neighbours merge where every operand
// allows it, so that most calls end as one or two dimensions.
#pragma once
#include <cstdint>

#include "edge_razor.h"

namespace er::ER_ISA {

// rank dimensions, outermost first; strides in elements, one set for each of kOperands operands.
template <int kOperands>
struct Strided {
  int rank = 0;
  int64_t dims[ER_MAX_RANK];
  int64_t strides[kOperands][ER_MAX_RANK];

  // Adds an inner dimension, merged into the last one if that is possible.
  void push(int64_t dim, const int64_t (&step)[kOperands]) {
    if (dim == 1) return;
    bool merge = rank > 0;
    for (int k = 0; merge && k < kOperands; k++) merge = strides[k][rank - 1] == step[k] * dim;
    if (merge)
      dims[rank - 1] *= dim;
    else
      dims[rank++] = dim;
    for (int k = 0; k < kOperands; k++) strides[k][rank - 1] = step[k];
  }

  // At least `wanted` dimensions, by adding outer ones of size 1.
  void pad(int wanted) {
    while (rank < wanted) {
      for (int d = rank; d > 0; d--) {
        dims[d] = dims[d - 1];
        for (int k = 0; k < kOperands; k++) strides[k][d] = strides[k][d - 1];
      }
      dims[0] = 1;
      for (int k = 0; k < kOperands; k++) strides[k][0] = 0;
      rank++;
    }
  }

  // Product of the first `count` dimensions.
  int64_t outer(int count) const {
    int64_t n = 1;
    for (int d = 0; d < count; d++) n *= dims[d];
    return n;
  }

  // Offsets of item `index` of the first `count` dimensions.
  void locate(int64_t index, int count, int64_t (&offset)[kOperands]) const {
    for (int k = 0; k < kOperands; k++) offset[k] = 0;
    for (int d = count - 1; d >= 0; d--) {
      const int64_t i = index % dims[d];
      index /= dims[d];
      for (int k = 0; k < kOperands; k++) offset[k] += i * strides[k][d];
    }
  }
};

}  // namespace er::ER_ISA
