// Max and average pooling on NHWC maps, forward and backward. Backward passes gather: every input position collects
// from the windows that cover it, so threads never write to the same place.
#include <algorithm>
#include <limits>

#include "../kernel.h"
#include "../simd.h"
#include "bytes.h"
#include "call_check.h"

namespace er::ER_ISA {
namespace {

constexpr int64_t kMaxStep = int64_t{1} << 20;  // bound of kernel sizes, strides, pads and dilations

struct PoolShape {
  int64_t n, ih, iw, c, oh, ow, kh, kw, sh, sw, pt, pl;
};

PoolShape pool_shape(const int64_t* i) {
  return {i[0], i[1], i[2], i[3], i[4], i[5], i[6], i[7], i[8], i[9], i[10], i[11]};
}

// The 12 ints of PoolShape.
PoolShape check_shape(CallCheck& check) {
  static const char* const names[] = {"n", "ih", "iw", "c", "oh", "ow", "kh", "kw", "sh", "sw", "pt", "pl"};
  int64_t value[12];
  for (uint32_t i = 0; i < 12; i++) value[i] = check.integer(i, names[i], i < 10 ? 1 : 0, i < 6 ? kMaxDim : kMaxStep);
  return pool_shape(value);
}

uint64_t input_bytes(const PoolShape& s) { return byte_size({s.n, s.ih, s.iw, s.c}); }
uint64_t output_elements(const PoolShape& s) { return byte_size({s.n, s.oh, s.ow, s.c}, 1); }
uint64_t output_bytes(const PoolShape& s) { return byte_size({s.n, s.oh, s.ow, s.c}); }

struct Range {
  int64_t begin, end;
};

// The taps t in [0, taps) with 0 <= start + t·dilation < size.
inline Range inside(int64_t start, int64_t dilation, int64_t taps, int64_t size) {
  const int64_t begin = start >= 0 ? 0 : (-start + dilation - 1) / dilation;
  const int64_t end = start >= size ? 0 : std::min(taps, (size - 1 - start) / dilation + 1);
  return {std::min(begin, end), end};
}

// The windows o in [0, count), which begin at o·stride − pad and are `kernel` long, that cover position i.
inline Range covering(int64_t i, int64_t stride, int64_t pad, int64_t kernel, int64_t count) {
  const int64_t first = i + pad - kernel + 1;
  const int64_t end = std::min(count, (i + pad) / stride + 1);
  return {std::min(first > 0 ? (first + stride - 1) / stride : 0, end), end};
}

// body(row, c0, c1) over all rows and tiles of channels: small maps have too few rows to share.
template <class F>
void parallel_rows(const Call& call, int64_t rows, int64_t channels, int64_t floats_a_channel, F&& body) {
  constexpr int64_t kTile = 256;
  const int64_t tiles = (channels + kTile - 1) / kTile;
  parallel(call, rows * tiles, floats_a_channel * std::min(channels, kTile), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t c0 = unit % tiles * kTile;
      body(unit / tiles, c0, std::min(channels, c0 + kTile));
    }
  });
}

// ---- max_pool: X[n,ih,iw,c] → Y[n,oh,ow,c], index?[n,oh,ow,c]; PoolShape, dh, dw ----
// Taps in the padding do not take part; among equals the first wins; NaN wins over everything. A window that lies in
// the padding altogether gives −infinity.

std::string check_max(const Call& call) {
  CallCheck check(call, 3, 14, 0);
  const PoolShape s = check_shape(check);
  check.integer(12, "dh", 1, kMaxStep);
  check.integer(13, "dw", 1, kMaxStep);
  check.present(0, "X", input_bytes(s));
  check.present(1, "Y", output_bytes(s));
  check.optional(2, "index", output_elements(s));
  if (check.ok() && call.operands[2].data)
    check.require(s.kh * s.kw <= 256, "more than 256 taps do not fit a u8 index");
  return check.error();
}

bool run_max(const Call& call) {
  const PoolShape s = pool_shape(call.ints);
  const int64_t dh = call.ints[12], dw = call.ints[13];
  const float* x = call.as<float>(0);
  float* y = call.as<float>(1);
  uint8_t* index = call.as<uint8_t>(2);
  parallel_rows(call, s.n * s.oh, s.c, s.ow * 4, [&](int64_t row, int64_t c0, int64_t c1) {
    const int64_t top = row % s.oh * s.sh - s.pt;
    const Range down = inside(top, dh, s.kh, s.ih);
    const float* map = x + row / s.oh * s.ih * s.iw * s.c;
    for (int64_t ox = 0; ox < s.ow; ox++) {
      const int64_t left_edge = ox * s.sw - s.pl, at = (row * s.ow + ox) * s.c;
      const Range across = inside(left_edge, dw, s.kw, s.iw);
      for (int64_t c = c0; c < c1; c += kLanes) {
        const int64_t left = c1 - c;
        VecF best = broadcast(-std::numeric_limits<float>::infinity());
        VecI where = broadcast(static_cast<int32_t>(down.begin * s.kw + across.begin));
        for (int64_t ky = down.begin; ky < down.end; ky++)
          for (int64_t kx = across.begin; kx < across.end; kx++) {
            const VecF v = load_upto(map + ((top + ky * dh) * s.iw + left_edge + kx * dw) * s.c + c, left);
            const VecI wins = (v > best) | (v != v);
            best = select(wins, v, best);
            where = wins ? broadcast(static_cast<int32_t>(ky * s.kw + kx)) : where;
          }
        store_upto(y + at + c, best, left);
        if (index) store_bytes(index + at + c, where, left);
      }
    }
  });
  return true;
}

// max_pool_grad: dY[n,oh,ow,c], index[n,oh,ow,c] → dX[n,ih,iw,c]. An index that names no tap of its window adds to
// nothing.
std::string check_max_grad(const Call& call) {
  CallCheck check(call, 3, 14, 0);
  const PoolShape s = check_shape(check);
  check.integer(12, "dh", 1, kMaxStep);
  check.integer(13, "dw", 1, kMaxStep);
  check.present(0, "dY", output_bytes(s));
  check.present(1, "index", output_elements(s));
  check.present(2, "dX", input_bytes(s));
  if (check.ok()) check.require(s.kh * s.kw <= 256, "more than 256 taps do not fit a u8 index");
  return check.error();
}

bool run_max_grad(const Call& call) {
  const PoolShape s = pool_shape(call.ints);
  const int64_t dh = call.ints[12], dw = call.ints[13];
  const float* dy = call.as<float>(0);
  const uint8_t* index = call.as<uint8_t>(1);
  float* dx = call.as<float>(2);
  parallel_rows(call, s.n * s.ih, s.c, s.iw * 4, [&](int64_t row, int64_t c0, int64_t c1) {
    const int64_t n = row / s.ih, iy = row % s.ih;
    // The lines of windows that cover this line, and their first taps there.
    int64_t line[256];
    int32_t first_tap[256];
    int lines = 0;
    for (int64_t ky = 0; ky < s.kh; ky++) {
      const int64_t down = iy + s.pt - ky * dh, oy = down / s.sh;
      if (down < 0 || down % s.sh != 0 || oy >= s.oh) continue;
      line[lines] = (n * s.oh + oy) * s.ow;
      first_tap[lines++] = static_cast<int32_t>(ky * s.kw);
    }
    int64_t quotient = s.pl / s.sw, remainder = s.pl % s.sw;  // of ix + pl, without a division for each position
    const int64_t step_quotient = dw / s.sw, step_remainder = dw % s.sw;
    for (int64_t ix = 0; ix < s.iw; ix++) {
      float* out = dx + (row * s.iw + ix) * s.c;
      // The windows that cover this position, and as which of their taps they see it.
      int64_t window[256];
      int32_t tap[256];
      int windows = 0;
      int64_t q = 0, r = 0;  // of kx·dw
      for (int64_t kx = 0; kx < s.kw; kx++) {
        const int64_t ox = quotient - q;
        if (r == remainder && ox >= 0 && ox < s.ow)
          for (int i = 0; i < lines; i++) {
            window[windows] = (line[i] + ox) * s.c;
            tap[windows++] = first_tap[i] + static_cast<int32_t>(kx);
          }
        q += step_quotient, r += step_remainder;
        if (r >= s.sw) r -= s.sw, q++;
      }
      if (++remainder == s.sw) remainder = 0, quotient++;
      for (int64_t c = c0; c < c1; c += kLanes) {
        const int64_t left = c1 - c;
        VecF total{};
        for (int w = 0; w < windows; w++) {
          const VecI here = load_bytes(index + window[w] + c, left) == tap[w];
          total += (VecF)(here & (VecI)load_upto(dy + window[w] + c, left));
        }
        store_upto(out + c, total, left);
      }
    }
  });
  return true;
}

// ---- average_pool: X[n,ih,iw,c] → Y[n,oh,ow,c]; PoolShape, pb, pr, include_pad ----
// A mean is over the positions of the window that lie in the map or, with include_pad, in the padded map: what ceil
// mode lets hang out beyond the padding is never counted.

std::string check_average(const Call& call) {
  CallCheck check(call, 2, 15, 0);
  const PoolShape s = check_shape(check);
  check.integer(12, "pb", 0, kMaxStep);
  check.integer(13, "pr", 0, kMaxStep);
  check.integer(14, "include_pad", 0, 1);
  check.present(0, "X", input_bytes(s));
  check.present(1, "Y", output_bytes(s));
  return check.error();
}

// The operands are dY, dX.
std::string check_average_grad(const Call& call) {
  CallCheck check(call, 2, 15, 0);
  const PoolShape s = check_shape(check);
  check.integer(12, "pb", 0, kMaxStep);
  check.integer(13, "pr", 0, kMaxStep);
  check.integer(14, "include_pad", 0, 1);
  check.present(0, "dY", output_bytes(s));
  check.present(1, "dX", input_bytes(s));
  return check.error();
}

// How many positions of a window that begins at `start` count, in one direction.
inline int64_t counted(int64_t start, int64_t kernel, int64_t size, int64_t pad_after, bool include_pad) {
  if (include_pad) return std::min(start + kernel, size + pad_after) - start;
  return std::min(start + kernel, size) - std::max<int64_t>(start, 0);
}

inline float inverse(int64_t count) { return count > 0 ? 1.0f / static_cast<float>(count) : 0.0f; }

bool run_average(const Call& call) {
  const PoolShape s = pool_shape(call.ints);
  const int64_t pb = call.ints[12], pr = call.ints[13];
  const bool include_pad = call.ints[14] != 0;
  const float* x = call.as<float>(0);
  float* y = call.as<float>(1);
  parallel_rows(call, s.n * s.oh, s.c, s.ow * std::min<int64_t>(s.kh * s.kw, s.ih * s.iw),
                [&](int64_t row, int64_t c0, int64_t c1) {
                  const int64_t top = row % s.oh * s.sh - s.pt;
                  const Range down = inside(top, 1, s.kh, s.ih);
                  const int64_t height = counted(top, s.kh, s.ih, pb, include_pad);
                  const float* map = x + row / s.oh * s.ih * s.iw * s.c;
                  for (int64_t ox = 0; ox < s.ow; ox++) {
                    const int64_t left_edge = ox * s.sw - s.pl;
                    const Range across = inside(left_edge, 1, s.kw, s.iw);
                    const int64_t width = counted(left_edge, s.kw, s.iw, pr, include_pad);
                    const float factor = height > 0 && width > 0 ? inverse(height * width) : 0.0f;
                    float* out = y + (row * s.ow + ox) * s.c;
                    for (int64_t c = c0; c < c1; c += kLanes) {
                      const int64_t left = c1 - c;
                      VecF total{};
                      for (int64_t ky = down.begin; ky < down.end; ky++) {
                        VecF line{};
                        for (int64_t kx = across.begin; kx < across.end; kx++)
                          line += load_upto(map + ((top + ky) * s.iw + left_edge + kx) * s.c + c, left);
                        total += line;
                      }
                      store_upto(out + c, total * factor, left);
                    }
                  }
                });
  return true;
}

bool run_average_grad(const Call& call) {
  const PoolShape s = pool_shape(call.ints);
  const int64_t pb = call.ints[12], pr = call.ints[13];
  const bool include_pad = call.ints[14] != 0;
  const float* dy = call.as<float>(0);
  float* dx = call.as<float>(1);
  parallel_rows(call, s.n * s.ih, s.c, s.iw * 3, [&](int64_t row, int64_t c0, int64_t c1) {
    const int64_t n = row / s.ih;
    const Range down = covering(row % s.ih, s.sh, s.pt, s.kh, s.oh);
    for (int64_t ix = 0; ix < s.iw; ix++) {
      const Range across = covering(ix, s.sw, s.pl, s.kw, s.ow);
      float* out = dx + (row * s.iw + ix) * s.c;
      if (down.begin >= down.end || across.begin >= across.end) {
        std::fill(out + c0, out + c1, 0.0f);
        continue;
      }
      bool first = true;
      for (int64_t oy = down.begin; oy < down.end; oy++) {
        const int64_t height = counted(oy * s.sh - s.pt, s.kh, s.ih, pb, include_pad);
        for (int64_t ox = across.begin; ox < across.end; ox++, first = false) {
          const float factor = inverse(height * counted(ox * s.sw - s.pl, s.kw, s.iw, pr, include_pad));
          const float* g = dy + ((n * s.oh + oy) * s.ow + ox) * s.c;
          for (int64_t c = c0; c < c1; c += kLanes) {
            const int64_t left = c1 - c;
            const VecF v = load_upto(g + c, left) * factor;
            store_upto(out + c, first ? v : load_upto(out + c, left) + v, left);
          }
        }
      }
    }
  });
  return true;
}

}  // namespace

extern const Kernel pool_kernels[];
const Kernel pool_kernels[] = {
    {"max_pool", ER_CHECK(check_max), nullptr, run_max},
    {"max_pool_grad", ER_CHECK(check_max_grad), nullptr, run_max_grad},
    {"average_pool", ER_CHECK(check_average), nullptr, run_average},
    {"average_pool_grad", ER_CHECK(check_average_grad), nullptr, run_average_grad},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
