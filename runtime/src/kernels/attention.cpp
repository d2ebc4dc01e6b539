// Scaled dot-product attention, forward and backward, without a matrix of all probabilities: each thread makes those of
// a tile of queries, uses them and forgets them. The backward pass makes them again from Q and K (Dao et al.,
// "FlashAttention", 2022, recompute in the same way), or reads the largest of each query, which the forward pass has
// kept then (attention_rows.h).
//
// Q is [n, t, heads, d], K and V are [n, s, kv_heads, d]; query head h reads K/V head h / (heads / kv_heads). Rows lie
// as a linear layer writes them, so no transposition is needed: a GEMM's leading dimension steps over the other heads.
#include "attention.h"

#include <atomic>

#include "attention_rows.h"
#include "packed_read.h"

namespace er::ER_ISA {
namespace {

// Without row and column of Q, K and V, and of dQ, dK and dV, which may follow.
constexpr uint32_t kForwardInts = kAttentionInts + 1, kBackwardInts = kAttentionInts + 7;

constexpr const char* kNames[] = {"Q", "K", "V", "dQ", "dK", "dV"};

// Layout of the kept probabilities, if any are kept; false if `keep` is no number of keys.
bool rows_of(const Attention& a, int64_t keep, RowsLayout* at) {
  return rows_layout(a.n * a.heads, a.t, a.s, keep, at);
}

void check_rows(CallCheck& check, const Call& call, const Attention& a, uint32_t operand, int64_t keep) {
  RowsLayout at;
  if (keep == 0) return check.require(!call.operands[operand].data, "probabilities are present, but none are kept");
  check.require(byte_size({a.n, a.heads, a.t}) != UINT64_MAX && rows_of(a, keep, &at), "probabilities are too many");
  if (check.ok()) check.present(operand, "probabilities", at.bytes);
}

// attention: Q, K, V, key_mask?, bias?, Y, probabilities?, scratch; ints n, t, s, heads, kv_heads, d, causal,
// bias_heads, stream, keep (of each query's probabilities; 0: none are kept), row and column of Q, K and V; floats
// scale, ratio.
std::string check_attention(const Call& call) {
  CallCheck check(call, 8, ints_with_columns(call, kForwardInts, 3), 2);
  check_attributes(check, call);
  if (!check.ok()) return check.error();
  const Attention a = parse(call);
  const int64_t keep = check.integer(kAttentionInts, "keep", 0, a.s);
  for (uint32_t i = 0; i < 3; i++) check.present(i, kNames[i], check_columns(check, call, a, kForwardInts, i));
  check_masks(check, call, a);
  check.present(5, "Y", query_bytes(a));
  if (check.ok()) check_rows(check, call, a, 6, keep);
  return check.error();
}

// Scratch is asked for before check() has seen the call.
bool sizes_valid(const Call& call, uint32_t ints, uint32_t columns) {
  if (call.n_ints != ints_with_columns(call, ints, columns)) return false;
  for (int i = 0; i < 6; i++)
    if (call.ints[i] < 1 || call.ints[i] > kMaxSize) return false;
  return true;
}

uint64_t scratch_attention(const Call& call, int threads) {
  if (!sizes_valid(call, kForwardInts, 3)) return UINT64_MAX;
  const Attention a = parse_sizes(call);
  return byte_size({threads, kTile + a.d, a.p_row()});
}

bool run_attention(const Call& call) {
  Attention a = parse(call);
  a.key_mask = call.as<const float>(3), a.bias = call.as<const float>(4);
  const DropoutMask mask(*call.context, a.stream, a.ratio);
  const int64_t group = a.heads / a.kv_heads, keep = call.ints[kAttentionInts];
  RowsLayout kept{};
  if (keep) rows_of(a, keep, &kept);
  Columns in[3];
  read_columns(call, kForwardInts, 3, a.q_row(), a.kv_row(), in);
  const float *q = call.as<const float>(0) + in[0].column, *k = call.as<const float>(1) + in[1].column,
              *v = call.as<const float>(2) + in[2].column;
  call.pool->share(a.n * a.heads * a.tiles(), 1, [&](int64_t begin, int64_t stop, int thread) {
    float* p = call.as<float>(7) + thread * (kTile + a.d) * a.p_row();
    ProductColumns keys{};
    int64_t packed = -1;
    for (int64_t unit = begin; unit < stop; unit++) {
      const int64_t sample = unit / (a.heads * a.tiles()), head = unit / a.tiles() % a.heads;
      const int64_t tile = unit % a.tiles(), first = a.tile_begin(tile), rows = a.tile_begin(tile + 1) - first;
      const int64_t end = a.reach(first + rows - 1);
      const int64_t query = sample * a.t + first, column = head / group * a.d, key = sample * a.kv_heads + head / group;
      if (packed != key)
        keys = pack_transposed(k + sample * a.s * in[1].row + column, in[1].row, a.s, a.d, p + kTile * a.p_row());
      packed = key;
      probabilities(a, sample, head, first, rows, end, q + query * in[0].row + head * a.d, in[0].row, keys, p);
      const int64_t row = (sample * a.heads + head) * a.t + first;
      uint64_t* bits = keep ? call.as<uint64_t>(6) + row * kept.words : nullptr;
      uint16_t* values = keep ? reinterpret_cast<uint16_t*>(call.as<uint8_t>(6) + kept.value) + row * keep : nullptr;
      if (keep)
        for (int64_t i = 0; i < rows; i++)
          keep_row(p + i * a.p_row(), end, keep, kept.words, bits + i * kept.words, values + i * keep);
      if (a.ratio > 0) apply_dropout(a, mask, sample, head, first, rows, end, p);
      if (keep && a.ratio > 0)
        for (int64_t i = 0; i < rows; i++)
          mark_dropped(p + i * a.p_row(), kept.words, bits + i * kept.words, values + i * keep);
      product(rows, a.d, end, p, a.p_row(), 1, {v + sample * a.s * in[2].row + column, in[2].row, 0}, false,
              call.as<float>(5) + query * a.q_row() + head * a.d, a.q_row());
    }
  });
  return true;
}

// attention_grad: Q, K, V, key_mask?, bias?, dY, probabilities?, dQ?, dK?, dV?, sums of dQ?, of dK?, of dV?, scratch;
// ints as attention without keep, then the forms of Q, K and V, the values that they keep a sample, keep, and row and
// column of Q, K, V (which only dense ones may have), dQ, dK and dV; floats as attention. Sums over all samples and
// positions lie as one row of the gradient does.
bool kept_layout(const Call& call, const Attention& a, uint32_t operand, PackedLayout* at) {
  const int64_t form = call.ints[kAttentionInts + operand], keep = call.ints[kAttentionInts + 3 + operand];
  return packed_layout(form, a.n, operand ? a.s : a.t, operand ? a.kv_row() : a.q_row(), keep, at);
}

std::string check_attention_grad(const Call& call) {
  CallCheck check(call, 14, ints_with_columns(call, kBackwardInts, 6), 2);
  check_attributes(check, call);
  if (!check.ok()) return check.error();
  const Attention a = parse(call);
  for (uint32_t i = 0; i < 3; i++) {
    PackedLayout at;
    const int64_t form = check.integer(kAttentionInts + i, "form", kDense, kCentered);
    if (check.ok() && (query_bytes(a) == UINT64_MAX || key_bytes(a) == UINT64_MAX || !kept_layout(call, a, i, &at)))
      check.fail(std::string("no kept tensor has the form and number of values of ") + kNames[i]);
    const uint64_t bytes = check_columns(check, call, a, kBackwardInts, i);
    check.require(form == kDense || bytes == (i ? key_bytes(a) : query_bytes(a)), "a packed tensor has no columns");
    if (check.ok()) check.present(i, kNames[i], form == kDense ? bytes : at.bytes);
  }
  const int64_t keep = check.integer(kAttentionInts + 6, "keep", 0, a.s);
  check_masks(check, call, a, keep == 0);  // what is masked was never kept
  check.present(5, "dY", query_bytes(a));
  if (check.ok()) check_rows(check, call, a, 6, keep);
  for (uint32_t i = 3; i < 6; i++) {
    const uint64_t bytes = check_columns(check, call, a, kBackwardInts, i);
    check.optional(i + 4, kNames[i], bytes);
    if (!check.ok() || !call.operands[i + 7].data) continue;
    check.present(i + 4, kNames[i], bytes);
    check.present(i + 7, "sums", bytes / static_cast<uint64_t>(a.n * (i > 3 ? a.s : a.t)));
  }
  return check.error();
}

// Floats of a head's row in a thread's copies. A column group that a head begins inside of is written past the head's
// columns.
int64_t copy_row(const Attention& a) { return a.d % kGroupColumns ? a.d / kGroupColumns * kGroupColumns + 32 : a.d; }

// Floats of a row of kept probabilities: whole vectors.
int64_t kept_row(int64_t keep) { return (keep + kLanes - 1) / kLanes * kLanes; }

// What one thread works in. Recomputing: two tiles of probabilities, Q, K and V of a head, K and V transposed. With
// kept probabilities: Q, K, V, dK and dV of a head, a row of dY and of dQ, and a row's kept probabilities. In both a
// group of packed values.
struct Work {
  float *p, *dp, *kt, *vt, *q, *k, *v, *dk, *dv, *dy, *dq, *row, *group;
  int64_t floats;

  Work(const Attention& a, int64_t keep, float* base) {
    float* end = base;
    auto take = [&end](int64_t count) {
      float* begin = end;
      end += (count + 15) / 16 * 16;
      return begin;
    };
    const int64_t width = copy_row(a);
    p = take(keep ? 0 : kTile * a.p_row()), dp = take(keep ? 0 : kTile * a.p_row());
    kt = take(keep ? 0 : a.d * a.p_row()), vt = take(keep ? 0 : a.d * a.p_row());
    q = take(a.t * width), k = take(a.s * width), v = take(a.s * width);
    dk = take(keep ? a.s * width : 0), dv = take(keep ? a.s * width : 0);
    dy = take(keep ? width : 0), dq = take(keep ? width : 0), row = take(3 * kept_row(keep));
    group = take(kGroupValues);
    floats = end - base;
  }
};

// Floats of a sample's sums of dQ, dK and dV, one behind the other.
int64_t sums_row(const Attention& a) { return a.q_row() + 2 * a.kv_row(); }
int64_t sums_begin(const Attention& a, int which) { return which ? a.q_row() + (which - 1) * a.kv_row() : 0; }

// out[c] = Σ over rows of x[rows][cols], whose rows lie `row` floats apart: a product with ones, a block at a time so
// that no long sum grows row by row.
__attribute__((noinline)) void sum_rows(const float* x, int64_t row, int64_t rows, int64_t cols, float* out) {
  float ones[kBlockRows];
  std::fill_n(ones, kBlockRows, 1.f);
  for (int64_t i = 0; i < rows; i += kBlockRows)
    product(1, cols, std::min(kBlockRows, rows - i), ones, 0, 1, {x + i * row, row, 0}, i > 0, out, 0);
}

uint64_t scratch_attention_grad(const Call& call, int threads) {
  if (!sizes_valid(call, kBackwardInts, 6)) return UINT64_MAX;
  const Attention a = parse_sizes(call);
  const int64_t keep = call.ints[kAttentionInts + 6];
  constexpr int64_t kLimit = int64_t{1} << 40;  // bytes
  const uint64_t sums = byte_size({a.n, sums_row(a)});
  if (keep < 0 || keep > a.s || sums > kLimit || byte_size({a.t + 4 * a.s + 2, a.d + 32}) > kLimit ||
      byte_size({kTile + a.d, 2 * a.p_row()}) > kLimit)
    return UINT64_MAX;
  return byte_size({threads, Work(a, keep, nullptr).floats}) + sums;
}

// Rows of a head, as float32: where they lie, or unpacked into a copy.
struct HeadRows {
  const float* data;
  int64_t stride;
};

// Copies rows [first, first + rows) and columns [column, column + d) of a sample of form 0 or 1 to out[rows][width],
// zeros behind them; or all its rows of forms 2 and 3. False if the packed tensor is none.
__attribute__((noinline)) bool copy_rows(const KeptReader& in, int64_t sample, int64_t first, int64_t rows,
                                         int64_t column, int64_t d, int64_t width, float* group, float* out) {
  if (!in.at.razor()) {
    for (int64_t i = 0; i < rows; i++, out += width) {
      const int64_t row = sample * in.at.rows + first + i;
      for (int64_t j = 0; j < width; j += kLanes) {
        const int64_t left = std::max<int64_t>(0, d - j), at = column + j;
        store(out + j,
              in.at.form == kBf16 ? load_bf16(in.half_row(row) + at, left) : load_upto(in.dense_row(row) + at, left));
      }
    }
    return true;
  }
  for (int64_t block = 0; block < in.at.blocks; block++)
    for (int64_t begin = column; begin < column + d;) {
      const int64_t end = std::min(column + d, (begin / kGroupColumns + 1) * kGroupColumns);
      float* to = out + in.at.row_begin(block) * width + begin - column;
      if (!in.tile(sample, block, begin, end - begin, to, width, group)) return false;
      begin = end;
    }
  for (int64_t i = 0; i < in.at.rows; i++) std::fill(out + i * width + d, out + (i + 1) * width, 0.f);
  return true;
}

// ds = p · (dp − Σ p·dp) · scale, in dp's place.
__attribute__((noinline)) void score_gradient(const Attention& a, int64_t rows, int64_t end, const float* p,
                                              float* dp) {
  const int64_t padded = whole_vectors(end);
  for (int64_t i = 0; i < rows; i++, p += a.p_row(), dp += a.p_row()) {
    std::fill(dp + end, dp + padded, 0.f);  // as in p
    double products = 0;
    constexpr int64_t kRun = 32 * kLanes;
    for (int64_t first = 0; first < padded; first += kRun) {
      const int64_t last = std::min(padded, first + kRun);
      VecF run{};
      for (int64_t j = first; j < last; j += kLanes) run += load(p + j) * load(dp + j);
      products += sum(run);
    }
    const float delta = static_cast<float>(products);
    for (int64_t j = 0; j < padded; j += kLanes) store(dp + j, load(p + j) * (load(dp + j) - delta) * a.scale);
  }
}

// One K/V head of a sample, of which Q, K and V are read and dQ, dK and dV written by one thread in a fixed order.
struct HeadGradient {
  const Call& call;
  const Attention& a;
  const KeptReader &q, &k, &v;
  const Columns* out;  // of dQ, dK and dV
  Work work;
  int64_t sample, kv_head;

  int64_t width() const { return copy_row(a); }
  int64_t group() const { return a.heads / a.kv_heads; }
  // dQ (0), dK or dV of a sample's row in a head; null if it is not wanted.
  float* gradient(int which, int64_t row, int64_t head) const {
    float* data = call.as<float>(7 + which);
    if (!data) return nullptr;
    return data + (sample * (which ? a.s : a.t) + row) * out[which].row + out[which].column + head * a.d;
  }

  // This head's part of its sample's sums.
  __attribute__((noinline)) void column_sums(float* sums) const {
#pragma GCC unroll 1
    for (int which = 0; which < 3; which++) {
      if (!call.operands[10 + which].data) continue;
      const int64_t heads = which ? 1 : group(), first = kv_head * heads;
      sum_rows(gradient(which, 0, first), out[which].row, which ? a.s : a.t, heads * a.d,
               sums + sums_begin(a, which) + first * a.d);
    }
  }

  bool head(const KeptReader& in, float* copy, HeadRows* rows) const {
    const int64_t column = kv_head * a.d;
    *rows = {copy, width()};
    if (in.at.form != kDense) return copy_rows(in, sample, 0, a.s, column, a.d, width(), work.group, copy);
    *rows = {in.dense_row(sample * a.s) + column, in.row};
    return true;
  }

  // Tile by tile, from probabilities that are made again.
  bool recompute(const DropoutMask& mask) const {
    HeadRows keys, values;
    if (!head(k, work.k, &keys) || !head(v, work.v, &values)) return false;
    const ProductColumns packed_keys = pack_transposed(keys.data, keys.stride, a.s, a.d, work.kt);
    const ProductColumns packed_values = pack_transposed(values.data, values.stride, a.s, a.d, work.vt);
    float *dk = gradient(1, 0, kv_head), *dv = gradient(2, 0, kv_head), *p = work.p, *dp = work.dp;
    for (int64_t j = 0; j < a.s; j++) {
      if (dk) std::fill_n(dk + j * out[1].row, a.d, 0.f);
      if (dv) std::fill_n(dv + j * out[2].row, a.d, 0.f);
    }
    for (int64_t head = kv_head * group(); head < (kv_head + 1) * group(); head++) {
      if (q.at.razor() && !copy_rows(q, sample, 0, a.t, head * a.d, a.d, width(), work.group, work.q)) return false;
      for (int64_t tile = 0; tile < a.tiles(); tile++) {
        const int64_t first = a.tile_begin(tile), rows = a.tile_begin(tile + 1) - first,
                      end = a.reach(first + rows - 1);
        HeadRows queries{work.q + (q.at.razor() ? first * width() : 0), width()};
        if (q.at.form == kDense)
          queries = {q.dense_row(sample * a.t + first) + head * a.d, q.row};
        else if (q.at.form == kBf16)
          copy_rows(q, sample, first, rows, head * a.d, a.d, width(), work.group, work.q);
        const int64_t query = (sample * a.t + first) * a.q_row() + head * a.d;
        const float* dy = call.as<const float>(5) + query;
        probabilities(a, sample, head, first, rows, end, queries.data, queries.stride, packed_keys, p);
        product(rows, end, a.d, dy, a.q_row(), 1, packed_values, false, dp, a.p_row());
        if (a.ratio > 0) apply_dropout(a, mask, sample, head, first, rows, end, dp);
        score_gradient(a, rows, end, p, dp);
        if (float* dq = gradient(0, first, head))
          product(rows, a.d, end, dp, a.p_row(), 1, {keys.data, keys.stride, 0}, false, dq, out[0].row);
        if (dk) product(end, a.d, rows, dp, 1, a.p_row(), {queries.data, queries.stride, 0}, true, dk, out[1].row);
        if (dv) {
          if (a.ratio > 0) apply_dropout(a, mask, sample, head, first, rows, end, p);
          product(end, a.d, rows, p, 1, a.p_row(), {dy, a.q_row(), 0}, true, dv, out[2].row);
        }
      }
    }
    return true;
  }

  // Query by query, from the probabilities that were kept.
  bool kept(const RowsLayout& at, float kept_scale) const {
    const int64_t column = kv_head * a.d, w = width();
    if (!copy_rows(k, sample, 0, a.s, column, a.d, w, work.group, work.k)) return false;
    if (!copy_rows(v, sample, 0, a.s, column, a.d, w, work.group, work.v)) return false;
    float *dk = gradient(1, 0, kv_head), *dv = gradient(2, 0, kv_head);
    std::fill_n(work.dk, a.s * w, 0.f);
    std::fill_n(work.dv, a.s * w, 0.f);
    std::fill_n(work.dy, w, 0.f);
    KeptRow row{reinterpret_cast<int32_t*>(work.row), work.row + kept_row(at.keep), work.row + 2 * kept_row(at.keep),
                0};
    for (int64_t head = kv_head * group(); head < (kv_head + 1) * group(); head++) {
      if (!copy_rows(q, sample, 0, a.t, head * a.d, a.d, w, work.group, work.q)) return false;
      for (int64_t i = 0; i < a.t; i++) {
        float* dq = gradient(0, i, head);
        const int64_t index = (sample * a.heads + head) * a.t + i;
        const int64_t query = (sample * a.t + i) * a.q_row() + head * a.d;
        const auto* data = call.as<const uint8_t>(6);
        if (!row.read(at, reinterpret_cast<const uint64_t*>(data) + index * at.words,
                      reinterpret_cast<const uint16_t*>(data + at.value) + index * at.keep))
          return false;
        std::copy_n(call.as<const float>(5) + query, a.d, work.dy);
        row_gradient(row, a.scale, kept_scale, w, work.q + i * w, work.k, work.v, work.dy, dq ? work.dq : nullptr,
                     dk ? work.dk : nullptr, dv ? work.dv : nullptr);
        if (dq) std::copy_n(work.dq, a.d, dq);
      }
    }
    for (int64_t j = 0; j < a.s; j++) {
      if (dk) std::copy_n(work.dk + j * w, a.d, dk + j * out[1].row);
      if (dv) std::copy_n(work.dv + j * w, a.d, dv + j * out[2].row);
    }
    return true;
  }
};

// The samples' sums of dQ, dK and dV, added up in order.
void add_samples(const Call& call, const Attention& a, const Columns* out, const float* sums) {
#pragma GCC unroll 1
  for (int which = 0; which < 3; which++) {
    float* to = call.as<float>(10 + which);
    if (!to) continue;
    sum_rows(sums + sums_begin(a, which), sums_row(a), a.n, which ? a.kv_row() : a.q_row(), to + out[which].column);
  }
}

bool run_attention_grad(const Call& call) {
  Attention a = parse(call);
  a.key_mask = call.as<const float>(3), a.bias = call.as<const float>(4);
  const DropoutMask mask(*call.context, a.stream, a.ratio);
  const int64_t keep = call.ints[kAttentionInts + 6];
  PackedLayout layouts[3];
  for (uint32_t i = 0; i < 3; i++) kept_layout(call, a, i, &layouts[i]);
  Columns places[6];
  read_columns(call, kBackwardInts, 6, a.q_row(), a.kv_row(), places);
  const KeptReader q(layouts[0], call.operands[0].data, places[0]), k(layouts[1], call.operands[1].data, places[1]),
      v(layouts[2], call.operands[2].data, places[2]);
  RowsLayout at{};
  if (keep) rows_of(a, keep, &at);
  const float kept_scale = a.ratio < 1 ? static_cast<float>(1.0 / (1.0 - double{a.ratio})) : 0.f;
  const int64_t floats = Work(a, keep, nullptr).floats;
  float* sums = call.as<float>(13) + call.pool->threads() * floats;
  std::atomic<bool> good{true};
  call.pool->share(a.n * a.kv_heads, 1, [&](int64_t begin, int64_t end, int thread) {
    const Work work(a, keep, call.as<float>(13) + thread * floats);
    for (int64_t unit = begin; unit < end; unit++) {
      const HeadGradient gradient{call, a, q, k, v, places + 3, work, unit / a.kv_heads, unit % a.kv_heads};
      if (!(keep ? gradient.kept(at, kept_scale) : gradient.recompute(mask))) good = false;
      gradient.column_sums(sums + gradient.sample * sums_row(a));
    }
  });
  add_samples(call, a, places + 3, sums);
  return good;
}

}  // namespace

extern const Kernel attention_kernels[];
const Kernel attention_kernels[] = {
    {"attention", ER_CHECK(check_attention), scratch_attention, run_attention},
    {"attention_grad", ER_CHECK(check_attention_grad), scratch_attention_grad, run_attention_grad},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
