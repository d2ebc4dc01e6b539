// Scaled dot-product attention, forward and backward, without a matrix of all probabilities: each thread makes those of
// a tile of queries, uses them and forgets them. The backward pass makes them again from Q and K (Dao et al.,
// "FlashAttention", 2022, recompute in the same way); nothing but Q, K and V is kept.
//
// Q is [n, t, heads, d], K and V are [n, s, kv_heads, d]; query head h reads K/V head h / (heads / kv_heads). Rows lie
// as a linear layer writes them, so no transposition is needed: a GEMM's leading dimension steps over the other heads.
#include <algorithm>
#include <cmath>
#include <limits>

#include "../blas.h"
#include "../packed.h"
#include "../simd.h"
#include "call_check.h"
#include "philox.h"

namespace er::ER_ISA {
namespace {

constexpr int64_t kTile = 64;                   // queries at once
constexpr int64_t kMaxSize = int64_t{1} << 30;  // BLAS takes ints
constexpr uint32_t kForwardInts = 9;

struct Attention {
  int64_t n, t, s, heads, kv_heads, d;
  bool causal;
  int64_t bias_heads;  // 0: no bias, 1: [t, s] for all heads, else `heads`
  int64_t stream;
  float scale = 0, ratio = 0;
  const float *key_mask = nullptr, *bias = nullptr;

  int64_t q_row() const { return heads * d; }
  int64_t kv_row() const { return kv_heads * d; }
  int64_t p_row() const { return (s + 15) / 16 * 16; }  // floats between two rows of a tile of probabilities
  int64_t reach(int64_t query) const { return causal ? std::min(s, query + 1) : s; }
  int64_t tiles() const { return (t + kTile - 1) / kTile; }
};

Attention parse_sizes(const Call& call) {
  const int64_t* i = call.ints;
  return {i[0], i[1], i[2], i[3], i[4], i[5], i[6] == 1, i[7], i[8]};
}

Attention parse(const Call& call) {
  Attention a = parse_sizes(call);
  a.scale = call.floats[0], a.ratio = call.floats[1];
  return a;
}

// The attributes that both kernels share; sizes are bounded so that no product of a row and a size overflows.
void check_attributes(CallCheck& check, const Call& call) {
  static const char* const names[] = {"n", "t", "s", "heads", "kv_heads", "d"};
  for (uint32_t i = 0; i < 6; i++) check.integer(i, names[i], 1, kMaxSize);
  check.integer(6, "causal", 0, 1);
  check.integer(7, "bias_heads", 0, kMaxSize);
  check.integer(8, "stream", 0, UINT32_MAX);
  if (!check.ok()) return;
  const Attention a = parse(call);
  check.require(a.heads % a.kv_heads == 0, "heads must be a multiple of kv_heads");
  check.require(a.heads * a.d <= kMaxSize, "heads times d is too large");
  check.require(a.bias_heads <= 1 || a.bias_heads == a.heads, "bias_heads must be 0, 1 or heads");
  check.require(std::isfinite(a.scale), "scale must be finite");
  check.require(a.ratio >= 0 && a.ratio <= 1, "ratio must be 0 to 1");
  const uint64_t mask = byte_size({a.heads, a.t, a.s}, 1);
  check.require(a.ratio == 0 || mask <= static_cast<uint64_t>(kMaxMask), "the mask of dropout is too large");
}

uint64_t query_bytes(const Attention& a, uint64_t each = 4) { return byte_size({a.n, a.t, a.heads, a.d}, each); }
uint64_t key_bytes(const Attention& a, uint64_t each = 4) { return byte_size({a.n, a.s, a.kv_heads, a.d}, each); }

void check_masks(CallCheck& check, const Call& call, const Attention& a) {
  check.optional(3, "key_mask", byte_size({a.n, a.s}));
  if (a.bias_heads)
    check.present(4, "bias", byte_size({a.bias_heads, a.t, a.s}));
  else if (check.ok())
    check.require(!call.operands[4].data, "bias is present, but bias_heads is 0");
}

inline VecF exp_or_zero(VecF x) { return (VecF)(~(VecI)(x < -87.0f) & (VecI)exp(x)); }

// Turns a row of scores into probabilities: those of `count` keys, of which key_mask (or null) tells who may be looked
// at. Without any, all are 0.
void softmax_row(float* x, int64_t count, const float* bias, const float* key_mask) {
  const VecF lowest = broadcast(-std::numeric_limits<float>::infinity());
  VecF best = lowest;
  for (int64_t j = 0; j < count; j += kLanes) {
    const int64_t left = count - j;
    VecF v = load_upto(x + j, left);
    if (bias) v += load_upto(bias + j, left);
    if (key_mask) v = select(load_upto(key_mask + j, left) > 0.5f, v, lowest);
    if (left < kLanes) v = select(lane_index() < static_cast<int32_t>(left), v, lowest);
    store_upto(x + j, v, left);
    best = max(best, v);
  }
  float top = best[0];
  for (int lane = 1; lane < kLanes; lane++) top = std::max(top, best[lane]);
  if (top == lowest[0]) {
    std::fill_n(x, count, 0.f);
    return;
  }
  double total = 0;
  constexpr int64_t kRun = 32 * kLanes;
  for (int64_t first = 0; first < count; first += kRun) {
    const int64_t last = std::min(count, first + kRun);
    VecF run{};
    for (int64_t j = first; j < last; j += kLanes) {
      const int64_t left = count - j;
      VecF e = exp_or_zero(load_upto(x + j, left) - top);
      store_upto(x + j, e, left);
      if (left < kLanes) e = (VecF)((lane_index() < static_cast<int32_t>(left)) & (VecI)e);
      run += e;
    }
    total += sum(run);
  }
  const float factor = static_cast<float>(1.0 / total);
  for (int64_t j = 0; j < count; j += kLanes) store_upto(x + j, load_upto(x + j, count - j) * factor, count - j);
}

// p[rows][p_row()] = probabilities of queries [first, first + rows) of a head for keys [0, end); what a causal mask
// hides is 0.
void probabilities(const Attention& a, int64_t sample, int64_t head, int64_t first, int64_t rows, int64_t end,
                   const float* q, int64_t q_row, const float* k, int64_t k_row, float* p) {
  sgemm(Trans::no, Trans::yes, rows, end, a.d, a.scale, q, q_row, k, k_row, 0.f, p, a.p_row());
  const float* mask = a.key_mask ? a.key_mask + sample * a.s : nullptr;
  for (int64_t i = 0; i < rows; i++) {
    const int64_t count = std::min(end, a.reach(first + i));
    const float* bias = a.bias ? a.bias + ((a.bias_heads > 1 ? head : 0) * a.t + first + i) * a.s : nullptr;
    softmax_row(p + i * a.p_row(), count, bias, mask);
    std::fill_n(p + i * a.p_row() + count, end - count, 0.f);
  }
}

// Multiplies rows of keys [0, end) by the mask of dropout: element (head·t + query)·s + key of the sample.
void apply_dropout(const Attention& a, const DropoutMask& mask, int64_t sample, int64_t head, int64_t first,
                   int64_t rows, int64_t end, float* p) {
  for (int64_t i = 0; i < rows; i++) {
    const int64_t begin = (head * a.t + first + i) * a.s;
    float* row = p + i * a.p_row();
    for (int64_t at = begin / 4 * 4; at < begin + end; at += kWords) {
      float factor[kWords];
      mask.factors(sample, at, kWords, factor);
      for (int64_t e = std::max(at, begin); e < std::min(at + kWords, begin + end); e++)
        row[e - begin] *= factor[e - at];
    }
  }
}

// attention: Q, K, V, key_mask?, bias?, Y, scratch; ints n, t, s, heads, kv_heads, d, causal, bias_heads, stream;
// floats scale, ratio.
std::string check_attention(const Call& call) {
  CallCheck check(call, 7, kForwardInts, 2);
  check_attributes(check, call);
  if (!check.ok()) return check.error();
  const Attention a = parse(call);
  check.present(0, "Q", query_bytes(a));
  check.present(1, "K", key_bytes(a));
  check.present(2, "V", key_bytes(a));
  check_masks(check, call, a);
  check.present(5, "Y", query_bytes(a));
  return check.error();
}

// Scratch is asked for before check() has seen the call.
bool sizes_valid(const Call& call, uint32_t ints) {
  if (call.n_ints != ints) return false;
  for (int i = 0; i < 6; i++)
    if (call.ints[i] < 1 || call.ints[i] > kMaxSize) return false;
  return true;
}

uint64_t scratch_attention(const Call& call, int threads) {
  if (!sizes_valid(call, kForwardInts)) return UINT64_MAX;
  return byte_size({threads, kTile, parse_sizes(call).p_row()});
}

bool run_attention(const Call& call) {
  Attention a = parse(call);
  a.key_mask = call.as<const float>(3), a.bias = call.as<const float>(4);
  const DropoutMask mask(*call.context, a.stream, a.ratio);
  const int64_t group = a.heads / a.kv_heads;
  call.pool->split(a.n * a.heads * a.tiles(), 1, [&](int64_t begin, int64_t stop, int thread) {
    float* p = call.as<float>(6) + thread * kTile * a.p_row();
    for (int64_t unit = begin; unit < stop; unit++) {
      const int64_t sample = unit / (a.heads * a.tiles()), head = unit / a.tiles() % a.heads;
      const int64_t first = unit % a.tiles() * kTile, rows = std::min(kTile, a.t - first);
      const int64_t end = a.reach(first + rows - 1);
      const int64_t query = (sample * a.t + first) * a.q_row() + head * a.d;
      const int64_t key = sample * a.s * a.kv_row() + head / group * a.d;
      probabilities(a, sample, head, first, rows, end, call.as<const float>(0) + query, a.q_row(),
                    call.as<const float>(1) + key, a.kv_row(), p);
      if (a.ratio > 0) apply_dropout(a, mask, sample, head, first, rows, end, p);
      sgemm(Trans::no, Trans::no, rows, a.d, end, 1.f, p, a.p_row(), call.as<const float>(2) + key, a.kv_row(), 0.f,
            call.as<float>(5) + query, a.q_row());
    }
  });
  return true;
}

// attention_grad: Q, K, V, key_mask?, bias?, dY, dQ?, dK?, dV?, scratch; ints as attention, then the forms of Q, K and
// V (0 float32, 1 bf16); floats as attention.
std::string check_attention_grad(const Call& call) {
  CallCheck check(call, 10, kForwardInts + 3, 2);
  check_attributes(check, call);
  static const char* const forms[] = {"form of Q", "form of K", "form of V"};
  for (uint32_t i = 0; i < 3; i++) check.integer(kForwardInts + i, forms[i], kDense, kBf16);
  if (!check.ok()) return check.error();
  const Attention a = parse(call);
  auto each = [&](uint32_t i) -> uint64_t { return call.ints[kForwardInts + i] == kBf16 ? 2 : 4; };
  check.present(0, "Q", query_bytes(a, each(0)));
  check.present(1, "K", key_bytes(a, each(1)));
  check.present(2, "V", key_bytes(a, each(2)));
  check_masks(check, call, a);
  check.present(5, "dY", query_bytes(a));
  check.optional(6, "dQ", query_bytes(a));
  check.optional(7, "dK", key_bytes(a));
  check.optional(8, "dV", key_bytes(a));
  return check.error();
}

// What one thread works in: two tiles of probabilities, and float32 copies of a head's Q tile, K and V.
int64_t grad_floats(const Attention& a) { return 2 * kTile * a.p_row() + kTile * a.d + 2 * a.s * a.d; }

uint64_t scratch_attention_grad(const Call& call, int threads) {
  if (!sizes_valid(call, kForwardInts + 3)) return UINT64_MAX;
  const Attention a = parse_sizes(call);
  const uint64_t copies = byte_size({a.s, a.d, 2}), tiles = byte_size({kTile, a.d + 2 * a.p_row()});
  uint64_t total;
  if (copies == UINT64_MAX || tiles == UINT64_MAX || __builtin_add_overflow(copies, tiles, &total)) return UINT64_MAX;
  return byte_size({threads}, total);
}

// Rows of a head, as float32: where they lie, or widened into `copy` [rows][d].
struct HeadRows {
  const float* data;
  int64_t stride;
};

HeadRows head_rows(const er_operand& operand, int64_t form, int64_t row, int64_t row_floats, int64_t column,
                   int64_t rows, int64_t d, float* copy) {
  const int64_t at = row * row_floats + column;
  if (form == kDense) return {static_cast<const float*>(operand.data) + at, row_floats};
  const uint16_t* half = static_cast<const uint16_t*>(operand.data) + at;
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = 0; j < d; j++) copy[i * d + j] = from_bf16(half[i * row_floats + j]);
  return {copy, d};
}

// ds = p · (dp − Σ p·dp) · scale, in dp's place.
void score_gradient(const Attention& a, int64_t rows, int64_t end, const float* p, float* dp) {
  for (int64_t i = 0; i < rows; i++, p += a.p_row(), dp += a.p_row()) {
    double products = 0;
    constexpr int64_t kRun = 32 * kLanes;
    for (int64_t first = 0; first < end; first += kRun) {
      const int64_t last = std::min(end, first + kRun);
      VecF run{};
      for (int64_t j = first; j < last; j += kLanes) run += load_upto(p + j, end - j) * load_upto(dp + j, end - j);
      products += sum(run);
    }
    const float delta = static_cast<float>(products);
    for (int64_t j = 0; j < end; j += kLanes)
      store_upto(dp + j, load_upto(p + j, end - j) * (load_upto(dp + j, end - j) - delta) * a.scale, end - j);
  }
}

// One K/V head of a sample: its query heads, tile by tile. dK and dV are added up by one thread in a fixed order.
void head_gradient(const Call& call, const Attention& a, const DropoutMask& mask, int64_t sample, int64_t kv_head,
                   float* scratch) {
  const int64_t group = a.heads / a.kv_heads, *form = call.ints + kForwardInts;
  float *p = scratch, *dp = p + kTile * a.p_row(), *q_copy = dp + kTile * a.p_row(), *k_copy = q_copy + kTile * a.d,
        *v_copy = k_copy + a.s * a.d;
  const HeadRows k = head_rows(call.operands[1], form[1], sample * a.s, a.kv_row(), kv_head * a.d, a.s, a.d, k_copy);
  const HeadRows v = head_rows(call.operands[2], form[2], sample * a.s, a.kv_row(), kv_head * a.d, a.s, a.d, v_copy);
  const int64_t key = sample * a.s * a.kv_row() + kv_head * a.d;
  float *dk = call.as<float>(7), *dv = call.as<float>(8);
  for (float* out : {dk, dv})
    if (out)
      for (int64_t j = 0; j < a.s; j++) std::fill_n(out + key + j * a.kv_row(), a.d, 0.f);
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
    for (int64_t first = 0; first < a.t; first += kTile) {
      const int64_t rows = std::min(kTile, a.t - first), end = a.reach(first + rows - 1);
      const HeadRows q =
          head_rows(call.operands[0], form[0], sample * a.t + first, a.q_row(), head * a.d, rows, a.d, q_copy);
      const int64_t query = (sample * a.t + first) * a.q_row() + head * a.d;
      const float* dy = call.as<const float>(5) + query;
      probabilities(a, sample, head, first, rows, end, q.data, q.stride, k.data, k.stride, p);
      sgemm(Trans::no, Trans::yes, rows, end, a.d, 1.f, dy, a.q_row(), v.data, v.stride, 0.f, dp, a.p_row());
      if (a.ratio > 0) apply_dropout(a, mask, sample, head, first, rows, end, dp);
      score_gradient(a, rows, end, p, dp);
      if (float* dq = call.as<float>(6))
        sgemm(Trans::no, Trans::no, rows, a.d, end, 1.f, dp, a.p_row(), k.data, k.stride, 0.f, dq + query, a.q_row());
      if (dk)
        sgemm(Trans::yes, Trans::no, end, a.d, rows, 1.f, dp, a.p_row(), q.data, q.stride, 1.f, dk + key, a.kv_row());
      if (dv) {
        if (a.ratio > 0) apply_dropout(a, mask, sample, head, first, rows, end, p);
        sgemm(Trans::yes, Trans::no, end, a.d, rows, 1.f, p, a.p_row(), dy, a.q_row(), 1.f, dv + key, a.kv_row());
      }
    }
}

bool run_attention_grad(const Call& call) {
  Attention a = parse(call);
  a.key_mask = call.as<const float>(3), a.bias = call.as<const float>(4);
  const DropoutMask mask(*call.context, a.stream, a.ratio);
  call.pool->split(a.n * a.kv_heads, 1, [&](int64_t begin, int64_t end, int thread) {
    float* scratch = call.as<float>(9) + thread * grad_floats(a);
    for (int64_t unit = begin; unit < end; unit++)
      head_gradient(call, a, mask, unit / a.kv_heads, unit % a.kv_heads, scratch);
  });
  return true;
}

}  // namespace

extern const Kernel attention_kernels[];
const Kernel attention_kernels[] = {
    {"attention", check_attention, scratch_attention, run_attention},
    {"attention_grad", check_attention_grad, scratch_attention_grad, run_attention_grad},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
