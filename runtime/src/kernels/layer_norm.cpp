// LayerNorm and RMSNorm over the last dimension, forward and backward (Ba, Kiros and Hinton, "Layer Normalization",
// 2016; Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019).
//
// The backward pass needs only the normalized value, in any kept form, and 1/std of each row:
//   dX = rstd · (g − mean(g) − xhat · mean(g · xhat)) with g = gamma · dY; RMSNorm has no mean(g).
// While dX is at hand, the gradient of a residual is added to it and its columns are summed (the bias of the layer
// below).
#include <algorithm>
#include <atomic>
#include <cmath>

#include "../kernel.h"
#include "call_check.h"
#include "column_sum.h"
#include "packed_read.h"

namespace er::ER_ISA {
namespace {

// Σ f(c, left) over [0, cols), in float32 runs that are added up in double.
template <class F>
double sum_row(int64_t cols, F&& f) {
  constexpr int64_t kRun = 32 * kLanes;
  double total = 0;
  for (int64_t first = 0; first < cols; first += kRun) {
    const int64_t last = std::min(cols, first + kRun);
    VecF run{};
    for (int64_t c = first; c < last; c += kLanes) run += f(c, cols - c);
    total += sum(run);
  }
  return total;
}

// The lanes that exist; the others are 0 whatever they hold.
inline VecF existing(VecF v, int64_t left) {
  return left >= kLanes ? v : (VecF)((lane_index() < static_cast<int32_t>(left)) & (VecI)v);
}

// layer_norm: X, gamma?, beta?, Y, xhat?, rstd?; ints rows, cols, rms; float epsilon.
std::string check_layer_norm(const Call& call) {
  CallCheck check(call, 6, 3, 1);
  const int64_t rows = check.size(0, "rows"), cols = check.size(1, "cols");
  check.integer(2, "rms", 0, 1);
  if (check.ok())
    check.require(call.floats[0] >= 0 && std::isfinite(call.floats[0]), "epsilon must be 0 or more and finite");
  const uint64_t all = byte_size({rows, cols});
  check.present(0, "X", all);
  check.optional(1, "gamma", byte_size({cols}));
  check.optional(2, "beta", byte_size({cols}));
  check.present(3, "Y", all);
  check.optional(4, "xhat", all);
  check.optional(5, "rstd", byte_size({rows}));
  return check.error();
}

bool run_layer_norm(const Call& call) {
  const int64_t rows = call.ints[0], cols = call.ints[1];
  const bool rms = call.ints[2] == 1;
  const float *gamma = call.as<const float>(1), *beta = call.as<const float>(2);
  float *xhat = call.as<float>(4), *rstds = call.as<float>(5);
  const double epsilon = call.floats[0];
  parallel(call, rows, 4 * cols, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const float* x = call.as<const float>(0) + r * cols;
      float* y = call.as<float>(3) + r * cols;
      const double n = static_cast<double>(cols);
      const float mean = rms ? 0.f : static_cast<float>(sum_contiguous(x, cols) / n);
      auto deviation = [&](int64_t c, int64_t left) { return existing(load_upto(x + c, left) - mean, left); };
      // The mean is rounded: the deviations' own mean, which is tiny, comes off them and off the variance.
      const double rest = rms ? 0 : sum_row(cols, deviation) / n;
      const double squares = sum_row(cols, [&](int64_t c, int64_t left) {
        const VecF d = deviation(c, left);
        return d * d;
      });
      const float shift = static_cast<float>(rest);
      const double variance = std::max(0.0, squares / n - rest * rest);
      const float rstd = static_cast<float>(1.0 / std::sqrt(variance + epsilon));
      if (rstds) rstds[r] = rstd;
      for (int64_t c = 0; c < cols; c += kLanes) {
        const int64_t left = cols - c;
        VecF v = ((load_upto(x + c, left) - mean) - shift) * rstd;
        if (xhat) store_upto(xhat + r * cols + c, v, left);
        if (gamma) v *= load_upto(gamma + c, left);
        if (beta) v += load_upto(beta + c, left);
        store_upto(y + c, v, left);
      }
    }
  });
  return true;
}

// layer_norm_grad: xhat (form), dY, rstd, gamma?, dX?, dgamma?, dbeta?, addend?, sums?, scratch; ints form, samples,
// rows, cols, keep, rms.
bool grad_layout(const Call& call, PackedLayout* at) {
  const int64_t* i = call.ints;
  return call.n_ints == 6 && packed_layout(i[0], i[1], i[2], i[3], i[4], at);
}

int64_t padded(int64_t cols) { return (cols + kGroupColumns - 1) / kGroupColumns * kGroupColumns; }

// Blocks are cut into a fixed number of chunks, each with its own sums, so that the result does not depend on the
// number of threads.
int64_t chunk_count(const PackedLayout& at) { return std::min<int64_t>(at.samples * at.blocks, 32); }

// Floats that one thread works in: a block of xhat, its three sums, and the values of a column group.
int64_t thread_floats(const PackedLayout& at) {
  return (kBlockRows + 3) * padded(at.cols) + (kGroupValues + 15) / 16 * 16;
}

std::string check_layer_norm_grad(const Call& call) {
  CallCheck check(call, 10, 6, 0);
  PackedLayout at{};
  check.require(check.ok() && grad_layout(call, &at),
                "no kept tensor has this form, these sizes and this many values a sample");
  check.integer(5, "rms", 0, 1);
  const uint64_t all = byte_size({at.samples, at.rows, at.cols});
  check.present(0, "xhat", at.bytes);
  check.present(1, "dY", all);
  check.present(2, "rstd", byte_size({at.samples, at.rows}));
  check.optional(3, "gamma", byte_size({at.cols}));
  check.optional(4, "dX", all);
  check.optional(5, "dgamma", byte_size({at.cols}));
  check.optional(6, "dbeta", byte_size({at.cols}));
  check.optional(7, "addend", all);
  check.optional(8, "sums", byte_size({at.cols}));
  if (check.ok() && call.operands[8].data) check.present(4, "dX", all);
  return check.error();
}

uint64_t scratch_layer_norm_grad(const Call& call, int threads) {
  PackedLayout at;
  if (!grad_layout(call, &at) || at.cols > kMaxDim) return UINT64_MAX;
  const uint64_t own = byte_size({threads, thread_floats(at)}), sums = byte_size({chunk_count(at), 3, padded(at.cols)});
  return own == UINT64_MAX || sums == UINT64_MAX ? UINT64_MAX : own + sums;
}

struct NormGradient {
  const Call& call;
  const KeptReader& xhat;
  bool rms;

  // Rows [0, rows) of a block: the gradient, and in sums[3][padded(cols)] the block's share of dgamma, dbeta and the
  // sums of dX.
  void block(int64_t first_row, int64_t rows, const float* tile, float* sums) const {
    const int64_t cols = xhat.at.cols, width = padded(cols);
    const float *dy = call.as<const float>(1) + first_row * cols, *gamma = call.as<const float>(3);
    std::fill_n(sums, 3 * width, 0.f);
    for (int64_t i = 0; i < rows; i++, dy += cols, tile += width) {
      auto scaled = [&](int64_t c, int64_t left) {
        const VecF d = load_upto(dy + c, left);
        return gamma ? d * load_upto(gamma + c, left) : d;
      };
      double total = 0, product = 0;
      constexpr int64_t kRun = 32 * kLanes;
      for (int64_t first = 0; first < cols; first += kRun) {
        VecF terms{}, products{};
        for (int64_t c = first; c < std::min(cols, first + kRun); c += kLanes) {
          const int64_t left = cols - c;
          const VecF d = load_upto(dy + c, left), x = existing(load(tile + c), left), g = scaled(c, left);
          store(sums + c, load(sums + c) + d * x);
          store(sums + width + c, load(sums + width + c) + d);
          terms += g;
          products += g * x;
        }
        total += sum(terms);
        product += sum(products);
      }
      if (!call.operands[4].data) continue;
      const double n = static_cast<double>(cols);
      row(first_row + i, tile, rms ? 0.f : static_cast<float>(total / n), static_cast<float>(product / n), scaled,
          sums + 2 * width);
    }
  }

  // A row of dX, and its share of the sums.
  template <class F>
  void row(int64_t index, const float* x, float mean, float dot, F&& scaled, float* sums) const {
    const int64_t cols = xhat.at.cols;
    const float rstd = call.as<const float>(2)[index], *addend = call.as<const float>(7);
    float* dx = call.as<float>(4) + index * cols;
    for (int64_t c = 0; c < cols; c += kLanes) {
      const int64_t left = cols - c;
      VecF d = (scaled(c, left) - mean - load(x + c) * dot) * rstd;
      if (addend) d += load_upto(addend + index * cols + c, left);
      store_upto(dx + c, d, left);
      store(sums + c, load(sums + c) + d);
    }
  }
};

bool run_layer_norm_grad(const Call& call) {
  PackedLayout at;
  grad_layout(call, &at);
  const KeptReader xhat(at, call.operands[0].data);
  const NormGradient gradient{call, xhat, call.ints[5] == 1};
  const int64_t width = padded(at.cols), chunks = chunk_count(at), blocks = at.samples * at.blocks;
  float* scratch = call.as<float>(9);
  float* sums = scratch + call.pool->threads() * thread_floats(at);
  std::atomic<bool> valid{true};
  call.pool->share(chunks, 1, [&](int64_t begin, int64_t end, int thread) {
    float* tile = scratch + thread * thread_floats(at);
    float *block_sums = tile + kBlockRows * width, *values = block_sums + 3 * width;
    for (int64_t chunk = begin; chunk < end; chunk++) {
      float* own = sums + chunk * 3 * width;
      std::fill_n(own, 3 * width, 0.f);
      for (int64_t unit = blocks * chunk / chunks; unit < blocks * (chunk + 1) / chunks; unit++) {
        const int64_t sample = unit / at.blocks, block = unit % at.blocks, row = at.row_begin(block);
        for (int64_t c = 0; c < at.cols; c += kGroupColumns)
          if (!xhat.tile(sample, block, c, std::min(kGroupColumns, at.cols - c), tile + c, width, values))
            return valid.store(false, std::memory_order_relaxed);
        gradient.block(sample * at.rows + row, at.row_begin(block + 1) - row, tile, block_sums);
        for (int64_t c = 0; c < 3 * width; c += kLanes) store(own + c, load(own + c) + load(block_sums + c));
      }
    }
  });
  if (!valid) return false;
  for (int which = 0; which < 3; which++) {
    float* out = call.as<float>(which < 2 ? 5 + which : 8);
    for (int64_t c = 0; out && c < at.cols; c += kLanes) {
      VecF total{};
      for (int64_t chunk = 0; chunk < chunks; chunk++) total += load(sums + (3 * chunk + which) * width + c);
      store_upto(out + c, total, at.cols - c);
    }
  }
  return true;
}

}  // namespace

extern const Kernel layer_norm_kernels[];
const Kernel layer_norm_kernels[] = {
    {"layer_norm", ER_CHECK(check_layer_norm), nullptr, run_layer_norm},
    {"layer_norm_grad", ER_CHECK(check_layer_norm_grad), scratch_layer_norm_grad, run_layer_norm_grad},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
