// Weight gradient of 3×3 convolutions of stride 1 from float32, by Winograd's F(2×2, 3×3) turned round. The convolution
// is Y = Aᵀ [(G w Gᵀ) ⊙ (Bᵀ x B)] A for a window x and four results (conv_winograd.cpp; Lavin and Gray 2016), so that
//   dw = Gᵀ [Σ over windows of (A dY Aᵀ) ⊙ (Bᵀ x B)] G:
// 16 products a window and pair of channels instead of 36, as 16 matrix products over the windows.
#include "conv_paths.h"
#include "conv_weight.h"
#include "product.h"
#include "winograd_window.h"

namespace er::ER_ISA {
namespace {

constexpr int kPoints = 16;
constexpr int64_t kBlockChannels = 128;       // of each side at a time
constexpr int64_t kWindowChannels = 8 << 10;  // windows at a time, times channels
constexpr int64_t kLine = 16;  // floats between arrays that would lie a power of two apart and share sets of the cache

// Block `index` of `n` channels, multiples of kLanes (but for the last).
struct Channels {
  int64_t begin, count;
};

struct Side {
  int64_t n, blocks, most;  // channels, blocks, channels of the largest, rounded up to kLanes
  explicit Side(int64_t channels) : n(channels), blocks((n + kBlockChannels - 1) / kBlockChannels) {
    most = ((n + blocks - 1) / blocks + kLanes - 1) / kLanes * kLanes;
  }
  Channels block(int64_t index) const { return {index * most, std::min(most, n - index * most)}; }
};

// How the work is cut; the same for scratch and run. A unit is a block of input channels by one of output channels. If
// there are fewer units than threads, the threads share the windows of each, and add up their sums in their order.
struct Layout {
  Side in, out;
  int64_t tiles_y, tiles_x, tiles, block;  // block: windows at a time
  bool by_tiles;

  Layout(const ConvShape& s, int threads)
      : in(s.ic),
        out(s.oc),
        tiles_y((s.oh + 1) / 2),
        tiles_x((s.ow + 1) / 2),
        tiles(s.n * tiles_y * tiles_x),
        block(std::max<int64_t>(16, kWindowChannels / std::max(in.most, out.most))),
        by_tiles(units() < threads) {}
  int64_t units() const { return in.blocks * out.blocks; }
  int64_t sum_stride() const { return in.most * out.most + kLine; }
  int64_t in_stride() const { return block * in.most + kLine; }
  int64_t out_stride() const { return block * out.most + kLine; }
  int64_t zeros() const { return std::max(in.most, out.most); }
  int64_t floats() const { return zeros() + kPoints * (sum_stride() + in_stride() + out_stride()); }  // of one thread
};

struct Parts {
  float *zeros, *sums, *in, *out;
  Parts(const Layout& l, void* scratch, int thread) {
    zeros = static_cast<float*>(scratch) + thread * l.floats();
    sums = zeros + l.zeros(), in = sums + kPoints * l.sum_stride(), out = in + kPoints * l.in_stride();
  }
};

// out[p·stride + k] = (A d Aᵀ)[p] with A = [1 0; 1 1; 1 −1; 0 −1] for channels k < n.
void transform_results(const float* const rows[2][2], int64_t n, float* out, int64_t stride) {
  for (int64_t k = 0; k < n; k += kLanes) {
    VecF t[4][2];
    for (int c = 0; c < 2; c++) {
      const VecF d0 = load_upto(rows[0][c] + k, n - k), d1 = load_upto(rows[1][c] + k, n - k);
      t[0][c] = d0, t[1][c] = d0 + d1, t[2][c] = d0 - d1, t[3][c] = -d1;
    }
    for (int r = 0; r < 4; r++) {
      float* to = out + k + 4 * r * stride;
      store(to, t[r][0]);
      store(to + stride, t[r][0] + t[r][1]);
      store(to + 2 * stride, t[r][0] - t[r][1]);
      store(to + 3 * stride, -t[r][1]);
    }
  }
}

// Sums over the windows [begin, end), [16][input channels][output channels].
void sum_windows(const WeightGradient& call, const Layout& l, Channels in, Channels out, int64_t begin, int64_t end,
                 const Parts& parts) {
  const ConvShape& s = call.shape;
  const float* x = static_cast<const float*>(call.x) + in.begin;
  const float* dy = call.dy + out.begin;
  std::fill_n(parts.zeros, l.zeros(), 0.f);
  if (begin == end) std::fill_n(parts.sums, kPoints * l.sum_stride(), 0.f);
  for (int64_t first = begin; first < end; first += l.block) {
    const int64_t n = std::min(l.block, end - first);
    for (int64_t i = 0; i < n; i++) {
      const int64_t tile = first + i, sample = tile / l.tiles_x / l.tiles_y;
      const int64_t oy = tile / l.tiles_x % l.tiles_y * 2, ox = tile % l.tiles_x * 2;
      const float* window[4][4];
      for (int64_t r = 0; r < 4; r++)
        for (int64_t c = 0; c < 4; c++) {
          const int64_t iy = oy - s.pt + r, ix = ox - s.pl + c;
          const bool inside = iy >= 0 && iy < s.ih && ix >= 0 && ix < s.iw;
          window[r][c] = inside ? x + ((sample * s.ih + iy) * s.iw + ix) * s.ic : parts.zeros;
        }
      transform_window(window, in.count, parts.in + i * l.in.most, l.in_stride());
      const float* results[2][2];
      for (int64_t r = 0; r < 2; r++)
        for (int64_t c = 0; c < 2; c++)
          results[r][c] =
              oy + r < s.oh && ox + c < s.ow ? dy + ((sample * s.oh + oy + r) * s.ow + ox + c) * s.oc : parts.zeros;
      transform_results(results, out.count, parts.out + i * l.out.most, l.out_stride());
    }
    for (int64_t p = 0; p < kPoints; p++)
      product(in.count, out.count, n, parts.in + p * l.in_stride(), 1, l.in.most,
              {parts.out + p * l.out_stride(), l.out.most, 0}, first > begin, parts.sums + p * l.sum_stride(),
              l.out.most);
  }
}

// G of input channels [c, c_end) of a unit: Gᵀ m G with Gᵀ = [1 ½ ½ 0; 0 ½ −½ 0; 0 ½ ½ 1], where m is the sum of what
// `n` threads summed, the first to `sums`.
void transform_sums(const WeightGradient& call, const Layout& l, Channels in, Channels out, int64_t c, int64_t c_end,
                    const float* sums, int n) {
  const ConvShape& s = call.shape;
  for (; c < c_end; c++)
    for (int64_t k = 0; k < out.count; k += kLanes) {
      VecF t[3][4];
      for (int x = 0; x < 4; x++) {
        VecF m[4];
        for (int y = 0; y < 4; y++) {
          const int64_t at = (4 * y + x) * l.sum_stride() + c * l.out.most + k;
          m[y] = load(sums + at);
          for (int i = 1; i < n; i++) m[y] += load(sums + i * l.floats() + at);
        }
        const VecF even = 0.5f * (m[1] + m[2]);
        t[0][x] = m[0] + even, t[1][x] = 0.5f * (m[1] - m[2]), t[2][x] = even + m[3];
      }
      float* g = call.g + (in.begin + c) * s.oc + out.begin + k;
      const int64_t tap = s.ic * s.oc, left = out.count - k;
      for (int y = 0; y < 3; y++) {
        const VecF even = 0.5f * (t[y][1] + t[y][2]);
        store_upto(g + 3 * y * tap, t[y][0] + even, left);
        store_upto(g + (3 * y + 1) * tap, 0.5f * (t[y][1] - t[y][2]), left);
        store_upto(g + (3 * y + 2) * tap, even + t[y][3], left);
      }
    }
}

}  // namespace

bool winograd_weight_wins(const ConvShape& s, const PackedLayout& x, int threads) {
  return x.form == kDense && winograd_wins(s, false, threads);
}

uint64_t winograd_weight_scratch(const ConvShape& s, int threads) {
  return static_cast<uint64_t>(threads) * Layout(s, threads).floats() * sizeof(float);
}

void winograd_weight_run(const WeightGradient& call) {
  const int threads = call.pool->threads();
  const Layout l(call.shape, threads);
  auto unit = [&](int64_t u, Channels* in, Channels* out) {
    *in = l.in.block(u / l.out.blocks), *out = l.out.block(u % l.out.blocks);
  };
  if (!l.by_tiles) {
    call.pool->share(l.units(), 1, [&](int64_t begin, int64_t end, int thread) {
      const Parts parts(l, call.scratch, thread);
      for (int64_t u = begin; u < end; u++) {
        Channels in, out;
        unit(u, &in, &out);
        sum_windows(call, l, in, out, 0, l.tiles, parts);
        transform_sums(call, l, in, out, 0, in.count, parts.sums, 1);
      }
    });
    return;
  }
  for (int64_t u = 0; u < l.units(); u++) {
    Channels in, out;
    unit(u, &in, &out);
    call.pool->run([&](int thread) {
      sum_windows(call, l, in, out, l.tiles * thread / threads, l.tiles * (thread + 1) / threads,
                  Parts(l, call.scratch, thread));
    });
    call.pool->share(in.count, 1, [&](int64_t begin, int64_t end, int) {
      transform_sums(call, l, in, out, begin, end, Parts(l, call.scratch, 0).sums, threads);
    });
  }
}

}  // namespace er::ER_ISA
