// A tensor in two layouts: the user's (torch's: OIHW, NCHW) and the runtime's (HWIO, NHWC). Copies go run by run in the
// user's order, from any element to any other, so that files and micro-batches stream through small buffers.
#pragma once
#include <algorithm>
#include <cstdint>

#include "edge_razor.h"

namespace er {

struct Layout {
  int rank = 0;  // of the dimensions below, at least 1: neighbours that are contiguous in both layouts are one
  uint64_t dims[ER_MAX_RANK];      // the user's order
  uint64_t strides[ER_MAX_RANK];   // elements of the runtime's layout
  uint64_t channels[ER_MAX_RANK];  // steps of the channel (last runtime dimension) along each dimension: 0 or 1
  uint64_t elements = 1;
};

// `shape` in the user's layout; runtime dimension d is the user's perm[d] (a permutation of 0 … rank − 1). With
// `keep_channels` the channel dimension stays apart, so that Layout::channels is exact.
inline Layout make_layout(int rank, const uint64_t* shape, const uint8_t* perm, bool keep_channels) {
  uint64_t runtime_strides[ER_MAX_RANK];
  uint64_t stride = 1;
  for (int d = rank - 1; d >= 0; d--) {
    runtime_strides[perm[d]] = stride;
    stride *= shape[perm[d]];
  }
  Layout out;
  out.elements = stride;
  bool apart = true;  // whether the previous dimension must not be joined
  for (int d = 0; d < rank; d++) {
    const bool channel = keep_channels && perm[rank - 1] == d;
    if (shape[d] == 1 && !channel) continue;
    const bool joins = out.rank > 0 && !apart && !channel && out.strides[out.rank - 1] == runtime_strides[d] * shape[d];
    if (joins) {
      out.dims[out.rank - 1] *= shape[d];
      out.strides[out.rank - 1] = runtime_strides[d];
    } else {
      out.dims[out.rank] = shape[d];
      out.strides[out.rank] = runtime_strides[d];
      out.channels[out.rank++] = channel;
    }
    apart = channel;
  }
  if (out.rank == 0) {
    out.dims[0] = 1;
    out.strides[0] = 1;
    out.channels[0] = 0;
    out.rank = 1;
  }
  return out;
}

// Calls run(user, runtime, stride, length, channel, channel_step) for every run of elements [begin, begin + count):
// element i of it is user + i in the user's order, runtime + i·stride in the runtime's, and belongs to channel +
// i·channel_step.
template <class F>
void for_each_run(const Layout& layout, uint64_t begin, uint64_t count, F&& run) {
  const int last = layout.rank - 1;
  uint64_t index[ER_MAX_RANK];
  uint64_t rest = begin;
  for (int d = last; d >= 0; d--) {
    index[d] = rest % layout.dims[d];
    rest /= layout.dims[d];
  }
  for (uint64_t user = begin, end = begin + count; user < end;) {
    uint64_t runtime = 0, channel = 0;
    for (int d = 0; d <= last; d++) {
      runtime += index[d] * layout.strides[d];
      channel += index[d] * layout.channels[d];
    }
    const uint64_t length = std::min(layout.dims[last] - index[last], end - user);
    run(user, runtime, layout.strides[last], length, channel, layout.channels[last]);
    user += length;
    index[last] = 0;
    for (int d = last - 1; d >= 0; d--) {
      if (++index[d] < layout.dims[d]) break;
      index[d] = 0;
    }
  }
}

// Copies `count` elements in the user's order, from element `begin`, into or out of a tensor in the runtime's layout.
inline void copy_in(const Layout& layout, uint64_t begin, uint64_t count, const float* user, float* runtime) {
  for_each_run(layout, begin, count, [&](uint64_t at, uint64_t to, uint64_t stride, uint64_t n, uint64_t, uint64_t) {
    for (uint64_t i = 0; i < n; i++) runtime[to + i * stride] = user[at - begin + i];
  });
}
inline void copy_out(const Layout& layout, uint64_t begin, uint64_t count, const float* runtime, float* user) {
  for_each_run(layout, begin, count, [&](uint64_t at, uint64_t from, uint64_t stride, uint64_t n, uint64_t, uint64_t) {
    for (uint64_t i = 0; i < n; i++) user[at - begin + i] = runtime[from + i * stride];
  });
}

}  // namespace er
