// The ways to a convolution's weight gradient G[kh,kw,ic/g,oc] = Σ over positions of X·dY. Each has the bytes of
// scratch that it needs (for valid shapes) and a run that returns false if X's mask words point outside its values.
#pragma once
#include <algorithm>
#include <cstdint>

#include "conv_shape.h"
#include "packed_read.h"

namespace er::ER_ISA {

struct WeightGradient {
  ConvShape shape;
  PackedLayout x_layout;  // [n, ih·iw, ic], or these samples of more
  const void* x;
  const float* dy;  // [n, oh, ow, oc]
  float* g;
  void* scratch;
  ThreadPool* pool;
};

// G += partials[count][G's elements], in their order.
void add_partials(const WeightGradient& call, float* g, const float* partials, int count);

// X in form 0 or 1, by GEMM.
uint64_t dense_weight_scratch(const ConvShape& shape, const PackedLayout& x, int threads);
bool dense_weight_run(const WeightGradient& call);
// X in form 0, by Winograd's tiles, where that saves time.
bool winograd_weight_wins(const ConvShape& shape, const PackedLayout& x, int threads);
uint64_t winograd_weight_scratch(const ConvShape& shape, int threads);
void winograd_weight_run(const WeightGradient& call);
// X in form 2 or 3, from bitmask, values and means.
uint64_t razor_weight_scratch(const ConvShape& shape, int threads);
bool razor_weight_run(const WeightGradient& call);
// The part of G that one thread computes of that: input channels [c0, c1), c0 a multiple of kGroupColumns in its group,
// and output channels [k0, k1) of one convolution group.
struct WeightRange {
  int64_t group, c0, c1, k0, k1;
};
// The way of convolutions with several taps.
uint64_t razor_taps_scratch(const ConvShape& shape, int threads);
bool razor_taps_range(const WeightGradient& call, const KeptReader& x, const WeightRange& range, int thread);
// One input and one output channel a group, X in any form.
uint64_t depthwise_weight_scratch(const ConvShape& shape, int threads);
bool depthwise_weight_run(const WeightGradient& call);

}  // namespace er::ER_ISA
