// LayerNorm and RMSNorm over the last dimension, forward and backward (Ba, Kiros and Hinton, "Layer Normalization",
// 2016; Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019).
//
// The backward pass needs only the normalized value, in any kept form, and 1/std of each row:
//   dX = rstd · (g − mean(g) − xhat · mean(g · xhat)) with g = gamma · dY; RMSNorm has no mean(g).
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

// layer_norm_grad: xhat (form), dY, rstd, gamma?, dX?, dgamma?, dbeta?, scratch; ints form, samples, rows, cols, keep,
// rms.
bool grad_layout(const Call& call, PackedLayout* at) {
  const int64_t* i = call.ints;
  return call.n_ints == 6 && packed_layout(i[0], i[1], i[2], i[3], i[4], at);
}

int64_t padded(int64_t cols) { return (cols + kGroupColumns - 1) / kGroupColumns * kGroupColumns; }

// Blocks are cut into a fixed number of chunks, each with its own sums, so that the result does not depend on the
// number of threads.
int64_t chunk_count(const PackedLayout& at) { return std::min<int64_t>(at.samples * at.blocks, 32); }

// Floats that one thread works in: a block of xhat, and the values of a column group.
int64_t thread_floats(const PackedLayout& at) { return kBlockRows * padded(at.cols) + (kGroupValues + 15) / 16 * 16; }

std::string check_layer_norm_grad(const Call& call) {
  CallCheck check(call, 8, 6, 0);
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
  return check.error();
}

uint64_t scratch_layer_norm_grad(const Call& call, int threads) {
  PackedLayout at;
  if (!grad_layout(call, &at) || at.cols > kMaxDim) return UINT64_MAX;
  const uint64_t own = byte_size({threads, thread_floats(at)}), sums = byte_size({chunk_count(at), 2, padded(at.cols)});
  return own == UINT64_MAX || sums == UINT64_MAX ? UINT64_MAX : own + sums;
}

struct NormGradient {
  const Call& call;
  const KeptReader& xhat;
  bool rms;

  // Rows [0, rows) of a block: the gradient, and the block's share of dgamma and dbeta in sums[2][padded(cols)].
  void block(int64_t first_row, int64_t rows, const float* tile, float* sums) const {
    const int64_t cols = xhat.at.cols, width = padded(cols);
    const float *dy = call.as<const float>(1) + first_row * cols, *gamma = call.as<const float>(3);
    float* dx = call.as<float>(4);
    for (int64_t c = 0; c < cols; c += kLanes) {
      const int64_t left = cols - c;
      VecF products{}, plain{};
      for (int64_t i = 0; i < rows; i++) {
        const VecF d = load_upto(dy + i * cols + c, left);
        products += d * load(tile + i * width + c);
        plain += d;
      }
      store(sums + c, load(sums + c) + products);
      store(sums + width + c, load(sums + width + c) + plain);
    }
    if (!dx) return;
    dx += first_row * cols;
    for (int64_t i = 0; i < rows; i++, dy += cols, dx += cols, tile += width) {
      auto scaled = [&](int64_t c, int64_t left) {
        const VecF d = load_upto(dy + c, left);
        return gamma ? d * load_upto(gamma + c, left) : d;
      };
      const double n = static_cast<double>(cols);
      const float mean = rms ? 0.f : static_cast<float>(sum_row(cols, scaled) / n);
      const float dot = static_cast<float>(
          sum_row(cols, [&](int64_t c, int64_t left) { return scaled(c, left) * existing(load(tile + c), left); }) / n);
      const float rstd = call.as<const float>(2)[first_row + i];
      for (int64_t c = 0; c < cols; c += kLanes) {
        const int64_t left = cols - c;
        store_upto(dx + c, (scaled(c, left) - mean - load(tile + c) * dot) * rstd, left);
      }
    }
  }
};

bool run_layer_norm_grad(const Call& call) {
  PackedLayout at;
  grad_layout(call, &at);
  const KeptReader xhat(at, call.operands[0].data);
  const NormGradient gradient{call, xhat, call.ints[5] == 1};
  const int64_t width = padded(at.cols), chunks = chunk_count(at), blocks = at.samples * at.blocks;
  float* scratch = call.as<float>(7);
  float* sums = scratch + call.pool->threads() * thread_floats(at);
  std::atomic<bool> valid{true};
  call.pool->share(chunks, 1, [&](int64_t begin, int64_t end, int thread) {
    float* tile = scratch + thread * thread_floats(at);
    float* values = tile + kBlockRows * width;
    for (int64_t chunk = begin; chunk < end; chunk++) {
      float* own = sums + chunk * 2 * width;
      std::fill_n(own, 2 * width, 0.f);
      for (int64_t unit = blocks * chunk / chunks; unit < blocks * (chunk + 1) / chunks; unit++) {
        const int64_t sample = unit / at.blocks, block = unit % at.blocks, row = at.row_begin(block);
        for (int64_t c = 0; c < at.cols; c += kGroupColumns)
          if (!xhat.tile(sample, block, c, std::min(kGroupColumns, at.cols - c), tile + c, width, values))
            return valid.store(false, std::memory_order_relaxed);
        gradient.block(sample * at.rows + row, at.row_begin(block + 1) - row, tile, own);
      }
    }
  });
  if (!valid) return false;
  for (int which = 0; which < 2; which++) {
    float* out = call.as<float>(5 + which);
    for (int64_t c = 0; out && c < at.cols; c += kLanes) {
      VecF total{};
      for (int64_t chunk = 0; chunk < chunks; chunk++) total += load(sums + (2 * chunk + which) * width + c);
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
