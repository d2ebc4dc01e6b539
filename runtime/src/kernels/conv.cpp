// conv: Y = act(scale · conv(X, W) + shift (+ addend)) with the kept form of the activation, and conv_grad_input: dX =
// f' · ((dX +) convᵀ(scale · dY, W)) with f' as the activation that made X kept it, and the sums of dX's columns. X is
// [n,ih,iw,ic], W [kh,kw,ic/group,oc], Y, addend and dY [n,oh,ow,oc], scale and shift [oc], float32
// (docs/plan-format.md).
#include "conv_paths.h"

namespace er::ER_ISA {
namespace {

bool is_depthwise(const ConvShape& s) { return s.group > 1 && s.group == s.ic && s.group == s.oc; }

WeightView weight_view(const ConvShape& s, int64_t form, const void* data) {
  return {form, s.taps(), s.ic / s.group, s.oc, data};
}

uint64_t weight_bytes(const ConvShape& s, int64_t form) {
  return weight_rows_bytes(form, s.oc, s.taps() * (s.ic / s.group));
}

// The form of the weight is the last integer of either kernel, which may be left out.
int64_t weight_form(const Call& call, uint32_t at) { return call.n_ints > at ? call.ints[at] : kHwio; }

std::string weight_form_error(const ConvShape& s, int64_t form) {
  if (form < kHwio || form > kRowsInt8) return "the form of W must be 0 to 3, not " + std::to_string(form);
  return form != kHwio && is_depthwise(s) ? "a depthwise convolution takes W as HWIO" : "";
}

GatherGemm forward_gemm(const ConvShape& s, int64_t form, const void* weight) {
  GatherGemm g{};
  g.rows_axis = forward_axis(s.ih, s.oh, s.kh, s.sh, s.pt, s.dh);
  g.cols_axis = forward_axis(s.iw, s.ow, s.kw, s.sw, s.pl, s.dw);
  g.samples = s.n;
  g.out_h = s.oh;
  g.out_w = s.ow;
  if (s.pointwise()) {  // one long row of pixels
    g.samples = g.out_h = 1;
    g.out_w = s.n * s.oh * s.ow;
    g.rows_axis = forward_axis(1, 1, 1, 1, 0, 1);
    g.cols_axis = forward_axis(g.out_w, g.out_w, 1, 1, 0, 1);
  }
  g.source_cols = s.ic;
  g.out_cols = s.oc;
  g.group = s.group;
  g.k_tap = s.ic / s.group;
  g.n = s.oc / s.group;
  g.kernel_w = s.kw;
  g.weight = weight_view(s, form, weight);
  if (s.joins_taps()) {
    g.joined = s.kw;
    g.cols_axis.taps = g.kernel_w = 1;
    g.k_tap = s.kw * s.ic;
    g.weight = {form, s.kh, g.k_tap, s.oc, weight};
  }
  return g;
}

// The input positions (phase_y, phase_x), (phase_y, phase_x + sw), …
GatherGemm gradient_gemm(const ConvShape& s, int64_t form, int64_t phase_y, int64_t phase_x) {
  GatherGemm g{};
  g.rows_axis = gradient_axis(s.ih, s.oh, s.kh, s.sh, s.pt, s.dh, phase_y);
  g.cols_axis = gradient_axis(s.iw, s.ow, s.kw, s.sw, s.pl, s.dw, phase_x);
  g.samples = s.n;
  g.out_h = s.ih;
  g.out_w = s.iw;
  if (s.pointwise()) {
    g.samples = g.out_h = 1;
    g.out_w = s.n * s.ih * s.iw;
    g.rows_axis = gradient_axis(1, 1, 1, 1, 0, 1, 0);
    g.cols_axis = gradient_axis(g.out_w, g.out_w, 1, 1, 0, 1, 0);
  }
  g.source_cols = s.oc;
  g.out_cols = s.ic;
  g.group = s.group;
  g.k_tap = s.oc / s.group;
  g.n = s.ic / s.group;
  g.kernel_w = s.kw;
  g.weight = weight_view(s, form, nullptr);
  g.gradient = true;
  return g;
}

Winograd winograd_of(const ConvShape& s, bool gradient) {
  Winograd w{};
  w.samples = s.n;
  w.source_h = gradient ? s.oh : s.ih;
  w.source_w = gradient ? s.ow : s.iw;
  w.k = gradient ? s.oc : s.ic;
  w.out_h = gradient ? s.ih : s.oh;
  w.out_w = gradient ? s.iw : s.ow;
  w.n = gradient ? s.ic : s.oc;
  w.pad_y = gradient ? 2 - s.pt : s.pt;
  w.pad_x = gradient ? 2 - s.pl : s.pl;
  w.gradient = gradient;
  return w;
}

template <class F>
void each_phase(const ConvShape& s, F&& body) {
  for (int64_t y = 0; y < std::min(s.sh, s.ih); y++)
    for (int64_t x = 0; x < std::min(s.sw, s.iw); x++) body(y, x);
}

// One phase for each pair of positions and taps that occurs along an axis (at most six), so that sizing scratch never
// walks all pairs of phases.
template <class MakeAxis>
int distinct_phases(int64_t phases, MakeAxis&& make_axis, int64_t found[6]) {
  int count = 0;
  for (int64_t phase = 0; phase < phases; phase++) {
    Axis axis = make_axis(phase);
    bool known = false;
    for (int i = 0; i < count && !known; i++) {
      Axis other = make_axis(found[i]);
      known = other.count == axis.count && other.taps == axis.taps;
    }
    if (!known && count < 6) found[count++] = phase;
  }
  return count;
}

uint64_t aligned(uint64_t bytes) { return (bytes + 63) / 64 * 64; }

// One row of zeros for padding, then each thread's part.
uint64_t scratch_bytes(const ConvShape& s, int64_t form, bool gradient, int threads, uint64_t* part) {
  *part = 0;
  if (is_depthwise(s)) return 0;
  if (gradient) {
    int64_t ys[6], xs[6];
    auto y_axis = [&](int64_t y) { return gradient_axis(s.ih, s.oh, s.kh, s.sh, s.pt, s.dh, y); };
    auto x_axis = [&](int64_t x) { return gradient_axis(s.iw, s.ow, s.kw, s.sw, s.pl, s.dw, x); };
    const int ny = distinct_phases(std::min(s.sh, s.ih), y_axis, ys);
    const int nx = distinct_phases(std::min(s.sw, s.iw), x_axis, xs);
    for (int y = 0; y < ny; y++)
      for (int x = 0; x < nx; x++)
        *part = std::max(*part, aligned(gather_gemm_scratch(gradient_gemm(s, form, ys[y], xs[x]))));
  } else {
    *part = aligned(gather_gemm_scratch(forward_gemm(s, form, nullptr)));
  }
  const int64_t zeros = gradient ? s.oc : zero_floats(forward_gemm(s, form, nullptr));
  return aligned(static_cast<uint64_t>(zeros) * 4) + *part * static_cast<uint64_t>(threads);
}

// Attributes behind the shape.
enum ForwardInt : uint32_t { kForwardAct = kConvInts, kForwardKeep, kForwardForm };
enum GradInputInt : uint32_t { kGradKeep = kConvInts + 1, kGradSum, kGradAccumulate, kGradForm };

// Floats between the two running sums of a part, so that threads share no line of cache.
int64_t sums_stride(const ConvShape& s) { return (s.ic + 15) / 16 * 16; }

bool one_phase(const ConvShape& s) { return std::min(s.sh, s.ih) == 1 && std::min(s.sw, s.iw) == 1; }

// Parts of the rows of dX that have running sums of their own.
int64_t sum_parts(const ConvShape& s, int64_t form, int threads) {
  if (is_depthwise(s)) return depthwise_parts(s, threads);
  if (winograd_wins(s, true, threads)) return winograd_parts(winograd_of(s, true), threads);
  return one_phase(s) ? gather_gemm_parts(gradient_gemm(s, form, 0, 0), threads) : threads;
}

// The running sums of all parts, if any, come first.
uint64_t sums_bytes(const Call& call, const ConvShape& s, int64_t form, int threads) {
  return call.ints[kGradSum] ? static_cast<uint64_t>(sums_stride(s) * 2 * sum_parts(s, form, threads)) * sizeof(float)
                             : 0;
}

uint64_t engine_scratch(const ConvShape& s, int64_t form, bool gradient, int threads) {
  if (winograd_wins(s, gradient, threads)) return winograd_scratch(winograd_of(s, gradient), threads);
  uint64_t part;
  return scratch_bytes(s, form, gradient, threads, &part);
}

uint64_t conv_scratch(const Call& call, int threads) {
  if (!conv_shape_error(call).empty() || threads < 1) return UINT64_MAX;
  const ConvShape s = conv_shape(call.ints);
  const int64_t form = weight_form(call, kForwardForm);
  return weight_form_error(s, form).empty() ? engine_scratch(s, form, false, threads) : UINT64_MAX;
}

uint64_t grad_input_scratch(const Call& call, int threads) {
  if (!conv_shape_error(call).empty() || call.n_ints < kGradForm || threads < 1) return UINT64_MAX;
  const ConvShape s = conv_shape(call.ints);
  const int64_t form = weight_form(call, kGradForm);
  if (!weight_form_error(s, form).empty()) return UINT64_MAX;
  return sums_bytes(call, s, form, threads) + engine_scratch(s, form, true, threads);
}

// "" if operand `index` has `bytes` bytes, or is absent and may be.
std::string operand_error(const Call& call, uint32_t index, const char* name, uint64_t bytes, bool optional = false) {
  const er_operand& o = call.operands[index];
  if (!o.data) return optional ? "" : std::string(name) + " is missing";
  if (o.bytes == bytes) return "";
  return std::string(name) + " has " + std::to_string(o.bytes) + " bytes, needs " + std::to_string(bytes);
}

std::string first_error(std::initializer_list<std::string> errors) {
  for (const std::string& e : errors)
    if (!e.empty()) return e;
  return "";
}

// Both kernels have it right behind the shape.
Activation activation_of(const Call& call) { return {call.ints[kConvInts], call.floats[0], call.floats[1]}; }

std::string conv_check(const Call& call) {
  std::string error = conv_shape_error(call);
  if (!error.empty()) return error;
  if (call.n_ints != kForwardForm && call.n_ints != kForwardForm + 1)
    return "needs 18 or 19 integers, got " + std::to_string(call.n_ints);
  if (call.n_floats != 2) return "needs 2 floats, got " + std::to_string(call.n_floats);
  if (call.n_operands != 7 && call.n_operands != 8)
    return "needs 7 or 8 operands, got " + std::to_string(call.n_operands);
  const ConvShape s = conv_shape(call.ints);
  const int64_t keep = call.ints[kForwardKeep], form = weight_form(call, kForwardForm);
  error = first_error({activation_error(activation_of(call), keep), weight_form_error(s, form)});
  if (!error.empty()) return error;
  const int64_t kept = s.n * s.oh * s.ow * kept_row_bytes(keep, s.oc);
  if (!keep && call.operands[5].data) return "kept is present, but nothing is kept";
  return first_error(
      {operand_error(call, 0, "X", s.x_elements() * 4), operand_error(call, 1, "W", weight_bytes(s, form)),
       operand_error(call, 2, "scale", s.oc * 4, true), operand_error(call, 3, "shift", s.oc * 4, true),
       operand_error(call, 4, "Y", s.y_elements() * 4), operand_error(call, 5, "kept", kept, keep == kKeepNothing),
       call.n_operands == 8 ? operand_error(call, 6, "the addend", s.y_elements() * 4, true) : ""});
}

// Floats from one tensor to another.
int64_t distance(const float* from, const float* to) {
  return (reinterpret_cast<intptr_t>(to) - reinterpret_cast<intptr_t>(from)) / int64_t{sizeof(float)};
}

bool conv_run(const Call& call) {
  const ConvShape s = conv_shape(call.ints);
  const int64_t keep = call.ints[kForwardKeep];
  const WeightView weight = weight_view(s, weight_form(call, kForwardForm), call.operands[1].data);
  const float* addend = call.n_operands == 8 ? call.as<const float>(6) : nullptr;
  const int scratch = static_cast<int>(call.n_operands) - 1;
  const Finish finish{call.as<const float>(2), call.as<const float>(3),
                      addend != nullptr,       addend ? distance(call.as<const float>(4), addend) : 0,
                      activation_of(call),     keep,
                      call.as<uint8_t>(5),     kept_row_bytes(keep, s.oc)};
  const int threads = call.pool->threads();
  if (is_depthwise(s)) {
    const Depthwise d{s, false, call.as<const float>(0), call.as<const float>(1), call.as<float>(4), finish};
    depthwise(d, call.pool);
    return true;
  }
  if (winograd_wins(s, false, threads)) {
    Winograd w = winograd_of(s, false);
    w.source = call.as<const float>(0);
    w.weight = weight;
    w.out = call.as<float>(4);
    w.finish = finish;
    winograd(w, call.pool, call.as<char>(scratch));
    return true;
  }
  GatherGemm g = forward_gemm(s, weight.form, weight.data);
  g.source = call.as<const float>(0);
  g.out = call.as<float>(4);
  g.finish = finish;
  uint64_t part;
  scratch_bytes(s, weight.form, false, threads, &part);
  float* zeros = call.as<float>(scratch);
  std::fill_n(zeros, zero_floats(g), 0.0f);
  char* parts = call.as<char>(scratch) + aligned(static_cast<uint64_t>(zero_floats(g)) * 4);
  call.pool->cut(gather_gemm_units(g, threads));
  call.pool->run([&](int thread) {
    gather_gemm(g, call.pool, thread, true, parts + part * static_cast<uint64_t>(thread), zeros);
  });
  return true;
}

std::string conv_grad_input_check(const Call& call) {
  std::string error = conv_shape_error(call);
  if (!error.empty()) return error;
  if (call.n_ints != kGradForm && call.n_ints != kGradForm + 1)
    return "needs 20 or 21 integers, got " + std::to_string(call.n_ints);
  if (call.n_floats != 2) return "needs 2 floats, got " + std::to_string(call.n_floats);
  if (call.n_operands != 7) return "needs 7 operands, got " + std::to_string(call.n_operands);
  const int64_t keep = call.ints[kGradKeep], sum = call.ints[kGradSum], accumulate = call.ints[kGradAccumulate];
  const Activation act = activation_of(call);
  error = activation_error(act, keep);
  if (!error.empty()) return error;
  if ((act.code == kActNone) != (keep == kKeepNothing)) return "an activation needs what it kept";
  if (keep == kKeepDense) return "keep must be nothing, bits or q4";
  if (sum < 0 || sum > 2) return "sum must be 0, 1 or 2";
  if (accumulate != 0 && accumulate != 1) return "accumulate must be 0 or 1";
  if (!keep && call.operands[4].data) return "kept is present, but nothing is kept";
  if (!sum && call.operands[5].data) return "sums is present, but sum is 0";
  const ConvShape s = conv_shape(call.ints);
  const int64_t form = weight_form(call, kGradForm);
  error = weight_form_error(s, form);
  if (!error.empty()) return error;
  return first_error({operand_error(call, 0, "dY", s.y_elements() * 4),
                      operand_error(call, 1, "W", weight_bytes(s, form)),
                      operand_error(call, 2, "scale", s.oc * 4, true), operand_error(call, 3, "dX", s.x_elements() * 4),
                      operand_error(call, 4, "kept", s.n * s.ih * s.iw * kept_row_bytes(keep, s.ic), !keep),
                      operand_error(call, 5, "sums", s.ic * 4, !sum)});
}

// sums[c] = [sums[c] +] Σ over the parts.
void add_up(const Finish& finish, int64_t parts, int64_t cols, bool add, float* sums) {
  for (int64_t c = 0; c < cols; c++) {
    double total = add ? static_cast<double>(sums[c]) : 0;
    for (int64_t i = 0; i < parts; i++) {
      const RunningSums part = finish.running_sums(i);
      total += static_cast<double>(part.sum[c]) - part.lost[c];
    }
    sums[c] = static_cast<float>(total);
  }
}

bool conv_grad_input_run(const Call& call) {
  const ConvShape s = conv_shape(call.ints);
  const float* scale = call.as<const float>(2);
  const WeightView weight = weight_view(s, weight_form(call, kGradForm), call.operands[1].data);
  const int threads = call.pool->threads();
  const uint64_t sums = sums_bytes(call, s, weight.form, threads);
  Finish finish{};
  finish.adds = call.ints[kGradAccumulate] == 1;
  finish.slope = Slope::of(activation_of(call), call.ints[kGradKeep], call.as<const uint8_t>(4), s.ic);
  finish.sums = sums ? call.as<float>(6) : nullptr;
  finish.sums_stride = sums_stride(s);
  std::fill_n(call.as<char>(6), sums, '\0');
  if (is_depthwise(s)) {
    finish.scale = scale;  // its channel is the input's channel
    const Depthwise d{s, true, call.as<const float>(0), call.as<const float>(1), call.as<float>(3), finish};
    depthwise(d, call.pool);
  } else if (winograd_wins(s, true, threads)) {
    Winograd w = winograd_of(s, true);
    w.source = call.as<const float>(0);
    w.weight = weight;
    w.weight_scale = scale;
    w.out = call.as<float>(3);
    w.finish = finish;
    winograd(w, call.pool, call.as<char>(6) + sums);
  } else {
    uint64_t part;
    scratch_bytes(s, weight.form, true, threads, &part);
    char* scratch = call.as<char>(6) + sums;
    float* zeros = reinterpret_cast<float*>(scratch);
    std::fill_n(zeros, s.oc, 0.0f);
    char* parts = scratch + aligned(static_cast<uint64_t>(s.oc) * 4);
    const bool shared = one_phase(s);  // phases follow one another without a barrier
    if (shared) call.pool->cut(gather_gemm_units(gradient_gemm(s, weight.form, 0, 0), threads));
    call.pool->run([&](int thread) {
      each_phase(s, [&](int64_t y, int64_t x) {
        GatherGemm g = gradient_gemm(s, weight.form, y, x);
        g.source = call.as<const float>(0);
        g.weight = weight;
        g.weight_scale = scale;
        g.out = call.as<float>(3);
        g.finish = finish;
        gather_gemm(g, call.pool, thread, shared, parts + part * static_cast<uint64_t>(thread), zeros);
      });
    });
  }
  if (finish.sums)
    add_up(finish, sum_parts(s, weight.form, threads), s.ic, call.ints[kGradSum] == 2, call.as<float>(5));
  return true;
}

}  // namespace

extern const Kernel conv_kernels[];
const Kernel conv_kernels[] = {
    {"conv", ER_CHECK(conv_check), conv_scratch, conv_run},
    {"conv_grad_input", ER_CHECK(conv_grad_input_check), grad_input_scratch, conv_grad_input_run},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
