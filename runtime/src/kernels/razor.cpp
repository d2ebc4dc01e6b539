// Packing of kept tensors, and the gradient of a broadcast factor (docs/plan-format.md, `pack` and `mul_grad`).
//
// `pack` finds the k-th largest magnitude of a sample exactly, without sorting: a histogram of every eighth row
// brackets it, a pass over the sample counts what lies above the bracket and takes a finer histogram of the few per
// cent inside, which it also lists, and the last bits are settled on the list. Magnitudes are compared as the bits of
// the float without its sign. A sample is packed by one thread, or, if there are fewer samples than threads, by all
// threads, each with a range of blocks; the result is the same.
#include <algorithm>
#include <atomic>
#include <climits>

#include "../packed.h"
#include "../simd.h"
#include "call_check.h"
#include "packed_read.h"

namespace er::ER_ISA {
namespace {

constexpr int kBins = 4096;
constexpr int kGuessShift = 19;            // bins of the first histogram: 8 bits of exponent, 4 of mantissa
constexpr int64_t kListed = 32 << 10;      // magnitudes that a part remembers
constexpr int kGuessStep = 8;              // it sees every eighth row
constexpr int64_t kGuessAllBelow = 16384;  // … of samples with more elements than this
constexpr int32_t kBf16Overflow =
    0x7f7f8000;  // the smallest magnitude that rounds to an infinite bf16; NaN and infinity lie above it
constexpr int32_t kInfinity = 0x7f800000;

typedef uint32_t VecU __attribute__((vector_size(ER_VECTOR_BYTES)));
typedef uint16_t VecH __attribute__((vector_size(ER_VECTOR_BYTES / 2)));
typedef int8_t VecB __attribute__((vector_size(ER_VECTOR_BYTES / 4)));

inline int32_t magnitude(float x) {
  int32_t b;
  std::memcpy(&b, &x, sizeof b);
  return b & INT_MAX;
}

// One block and column group of a sample, 16 columns wide: a group at the right edge is a copy padded with zeros.
struct Tile {
  const float* x;
  int64_t stride, rows, cols;
  float mean[kGroupColumns];
  float padded[kBlockRows * kGroupColumns];

  Tile(const PackedLayout& at, const float* sample, const uint16_t* means, int64_t block, int64_t group) {
    const int64_t begin = at.row_begin(block), c = group * kGroupColumns;
    rows = at.row_begin(block + 1) - begin;
    cols = std::min(kGroupColumns, at.cols - c);
    x = sample + begin * at.cols + c, stride = at.cols;
    if (cols < kGroupColumns) {
      for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < kGroupColumns; j++) padded[i * kGroupColumns + j] = j < cols ? x[i * stride + j] : 0.f;
      x = padded, stride = kGroupColumns;
    }
    for (int64_t j = 0; j < kGroupColumns; j++)
      mean[j] = means && j < cols ? from_bf16(means[block * at.cols + c + j]) : 0.f;
  }
  float residual(int64_t row, int64_t column) const { return x[row * stride + column] - mean[column]; }

  // word[column] bit `row` = test(magnitudes of the residuals). A vector holds the same row of kLanes columns, so that
  // words grow without any transposition.
  template <class Test>
  void mask(uint64_t* word, Test&& test) const {
    VecF m[kGroupVectors];
    for (int v = 0; v < kGroupVectors; v++) m[v] = load(mean + v * kLanes);
    uint32_t half[2][kGroupColumns];
    for (int h = 0; h < 2; h++) {
      VecI w[kGroupVectors] = {};
      const int64_t end = std::min<int64_t>(rows - h * 32, 32);
      const float* row = x + h * 32 * stride;
      for (int64_t i = 0; i < end; i++, row += stride) {
        const int32_t bit = static_cast<int32_t>(1u << i);
        for (int v = 0; v < kGroupVectors; v++) w[v] |= test(bits(abs(load(row + v * kLanes) - m[v])), v) & bit;
      }
      for (int v = 0; v < kGroupVectors; v++) std::memcpy(half[h] + v * kLanes, &w[v], sizeof(VecI));
    }
    for (int64_t j = 0; j < kGroupColumns; j++) word[j] = half[0][j] | static_cast<uint64_t>(half[1][j]) << 32;
  }
};

// The bracket [low, top] in which the k-th largest magnitude is sought, in bins of 2^shift.
struct Bracket {
  int32_t low = 1, top = INT_MAX;
  int shift() const {
    int s = 0;
    while ((top - low) >> s >= kBins) s++;
    return s;
  }
};

// A range of a sample's blocks, the share of one thread.
struct Part {
  int64_t begin, end;
  uint32_t* histogram;  // [kBins]
  int32_t* list;        // [kListed]: the magnitudes inside the bracket of the last pass over the data
  int64_t listed;       // how many there were, also beyond kListed
  int64_t list_above;   // how many lay above it
  Bracket list_bracket;
  int64_t above;  // magnitudes over the bracket
  int32_t largest;
  bool finite;
};

// Which magnitudes are kept: those ≥ `least`, and the first `ties` of those that equal least − 1. `bin` and `tie_bin`
// say the same in bins of the last histogram, so that each part knows how many it keeps.
struct Threshold {
  int32_t least = INT_MAX;
  int64_t ties = 0;
  int bin = kBins;
};

struct Sample {
  const PackedLayout& at;
  const float* x;    // [rows][cols]
  uint16_t* mean;    // [blocks][cols] or null
  uint64_t* mask;    // [blocks][cols]
  uint32_t* offset;  // [blocks][groups]
  uint8_t* value;    // [keep]
  float* scale;      // one, or null
};

// Block means, rows added in order. Sets part.finite.
void write_means(const Sample& s, Part& part) {
  constexpr int kWide = 4;  // independent sums hide the latency of the addition
  const int64_t cols = s.at.cols;
  for (int64_t b = part.begin; b < part.end; b++) {
    const int64_t begin = s.at.row_begin(b), rows = s.at.row_begin(b + 1) - begin;
    const float* x = s.x + begin * cols;
    uint16_t* out = s.mean + b * cols;
    const float length = static_cast<float>(rows);
    auto put = [&](int64_t c, float total) {
      const float mean = total / length;
      part.finite &= magnitude(mean) < kBf16Overflow;
      out[c] = to_bf16(mean);
    };
    int64_t c = 0;
    for (; c + kWide * kLanes <= cols; c += kWide * kLanes) {
      VecF total[kWide] = {};
      for (int64_t i = 0; i < rows; i++)
        for (int v = 0; v < kWide; v++) total[v] += load(x + i * cols + c + v * kLanes);
      float totals[kWide * kLanes];
      for (int v = 0; v < kWide; v++) store(totals + v * kLanes, total[v]);
      for (int j = 0; j < kWide * kLanes; j++) put(c + j, totals[j]);
    }
    for (; c + kLanes <= cols; c += kLanes) {
      VecF total = {};
      for (int64_t i = 0; i < rows; i++) total += load(x + i * cols + c);
      for (int j = 0; j < kLanes; j++) put(c + j, total[j]);
    }
    for (; c < cols; c++) {
      float total = 0;
      for (int64_t i = 0; i < rows; i++) total += x[i * cols + c];
      put(c, total);
    }
  }
}

// Histogram of the magnitudes of every `step`-th row. The first row varies, so that it is not always the same column of
// an image.
// Adds the magnitudes of every `step`-th row to the histogram. The first row varies, so that it is not always the same
// column of an image.
void guess_histogram(const Sample& s, int step, Part& part) {
  for (int64_t b = part.begin; b < part.end; b++)
    for (int64_t g = 0; g < s.at.groups; g++) {
      const Tile tile(s.at, s.x, s.mean, b, g);
      for (int64_t i = (3 * b + 5 * g) % step; i < tile.rows; i += step)
        for (int64_t j = 0; j < tile.cols; j++) part.histogram[magnitude(tile.residual(i, j)) >> kGuessShift]++;
    }
}

// Histogram of the magnitudes inside the bracket, their number above it, and the largest of all. Reads the data only if
// the list of an earlier pass does not have all that is inside.
void bracket_histogram(const Sample& s, const Bracket& bracket, Part& part) {
  std::fill_n(part.histogram, kBins, 0u);
  const int shift = bracket.shift();
  if (part.listed <= kListed && bracket.low >= part.list_bracket.low && bracket.top <= part.list_bracket.top) {
    part.above = part.list_above;
    for (int64_t i = 0; i < part.listed; i++) {
      const int32_t m = part.list[i];
      if (m > bracket.top)
        part.above++;
      else if (m >= bracket.low)
        part.histogram[(m - bracket.low) >> shift]++;
    }
    return;
  }
  VecI above[kGroupVectors] = {}, largest[kGroupVectors] = {};
  int64_t listed = 0;
  for (int64_t b = part.begin; b < part.end; b++)
    for (int64_t g = 0; g < s.at.groups; g++) {
      const Tile tile(s.at, s.x, s.mean, b, g);
      uint64_t word[kGroupColumns];
      tile.mask(word, [&](VecI m, int v) {
        const VecI over = m > bracket.top;
        above[v] -= over;
        largest[v] = m > largest[v] ? m : largest[v];
        return (m >= bracket.low) & ~over;
      });
      for (int64_t j = 0; j < kGroupColumns; j++)
        for (uint64_t w = word[j]; w; w &= w - 1) {
          const int32_t m = magnitude(tile.residual(__builtin_ctzll(w), j));
          part.histogram[(m - bracket.low) >> shift]++;
          if (listed < kListed) part.list[listed] = m;
          listed++;
        }
    }
  part.above = 0, part.largest = 0, part.listed = listed, part.list_bracket = bracket;
  for (int v = 0; v < kGroupVectors; v++)
    for (int j = 0; j < kLanes; j++) {
      part.above += above[v][j];
      part.largest = std::max<int32_t>(part.largest, largest[v][j]);
    }
  part.list_above = part.above;
}

// int8 = round(residual / scale); `residuals` may be read up to a multiple of kLanes.
void quantize(const float* residuals, int64_t n, float scale, uint8_t* out) {
  if (scale == 0) {
    std::memset(out, 0, n);
    return;
  }
  const VecF magic =
      broadcast(12582912.f);  // 1.5·2^23: its unit in the last place is 1, so adding it rounds to nearest even
  for (int64_t i = 0; i < n; i += kLanes) {
    VecF q = load(residuals + i) / broadcast(scale);
    q = min(max(q, broadcast(-127.f)), broadcast(127.f)) + magic;
    const VecB b = __builtin_convertvector(bits(q) - bits(magic), VecB);
    std::memcpy(out + i, &b, std::min<int64_t>(n - i, kLanes));
  }
}

inline VecH to_bf16_vector(VecF x) {
  const VecU u = (VecU)x;
  return __builtin_convertvector((u + 0x7fff + ((u >> 16) & 1)) >> 16, VecH);
}

void round_to_bf16(const float* x, int64_t n, uint8_t* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecH h = to_bf16_vector(load(x + i));
    std::memcpy(out + 2 * i, &h, 2 * std::min<int64_t>(n - i, kLanes));
  }
}

// Keeps of each column the first `ties` bits of tie[], adds them to word[].
void add_ties(const Tile& tile, int32_t tie_magnitude, int64_t* ties, uint64_t* word) {
  uint64_t tie[kGroupColumns];
  tile.mask(tie, [&](VecI m, int) { return m == tie_magnitude; });
  for (int64_t j = 0; j < tile.cols; j++)
    for (; tie[j] && *ties; tie[j] &= tie[j] - 1, --*ties) word[j] |= tie[j] & -tie[j];
}

// Writes mask, offsets and values of a part whose first value has index `index` in the sample and which keeps the first
// `ties` ties.
void write_values(const Sample& s, const Threshold& threshold, float scale, int64_t index, int64_t ties,
                  const Part& part) {
  for (int64_t b = part.begin; b < part.end; b++)
    for (int64_t g = 0; g < s.at.groups; g++) {
      const Tile tile(s.at, s.x, s.mean, b, g);
      uint64_t word[kGroupColumns];
      tile.mask(word, [&](VecI m, int) { return m >= threshold.least; });
      if (ties) add_ties(tile, threshold.least - 1, &ties, word);
      std::memcpy(s.mask + b * s.at.cols + g * kGroupColumns, word, tile.cols * sizeof(uint64_t));
      s.offset[b * s.at.groups + g] = static_cast<uint32_t>(index);
      alignas(64) float kept[kBlockRows * kGroupColumns];
      int64_t n = 0;
      for (int64_t j = 0; j < tile.cols; j++)
        for (uint64_t w = word[j]; w; w &= w - 1) kept[n++] = tile.residual(__builtin_ctzll(w), j);
      for (int64_t i = n; i % kLanes; i++) kept[i] = 0;
      if (s.at.form == kCentered)
        quantize(kept, n, scale, s.value + index);
      else
        round_to_bf16(kept, n, s.value + 2 * index);
      index += n;
    }
}

// From the histogram of every `step`-th row: a bracket that very likely holds the keep-th largest magnitude.
Bracket guess_bracket(const Part* parts, int n_parts, int step, int64_t keep) {
  const int64_t margin = step == 1 ? 0 : keep / 16 + 64 * step;
  Bracket bracket;
  bool top_found = false;
  int64_t count = 0;
  for (int bin = kBins - 1; bin >= 0; bin--) {
    for (int p = 0; p < n_parts; p++) count += static_cast<int64_t>(parts[p].histogram[bin]) * step;
    if (!top_found && count >= keep - margin) {
      top_found = true;
      bracket.top = bin == kBins - 1 ? INT_MAX : ((bin + 1) << kGuessShift) - 1;
    }
    if (count >= keep + margin) {
      bracket.low = std::max(1, bin << kGuessShift);
      return bracket;
    }
  }
  return bracket;
}

// Narrows the bracket by the histogram of its inside until the threshold is exact: true, and *threshold.
bool narrow(const Part* parts, int n_parts, int64_t keep, Bracket* bracket, Threshold* threshold) {
  *threshold = {};
  if (!keep) return true;
  int64_t count = 0;
  for (int p = 0; p < n_parts; p++) count += parts[p].above;
  if (count > keep) {
    *bracket = {bracket->top + 1, INT_MAX};
    return false;
  }
  const int shift = bracket->shift();
  for (int bin = (bracket->top - bracket->low) >> shift; bin >= 0; bin--) {
    int64_t here = 0;
    for (int p = 0; p < n_parts; p++) here += parts[p].histogram[bin];
    if (count + here < keep) {
      count += here;
      continue;
    }
    const int32_t least = bracket->low + (bin << shift);
    if (count + here == keep) {
      *threshold = {least, 0, bin};
      return true;
    }
    if (shift == 0) {
      *threshold = {least + 1, keep - count, bin + 1};
      return true;
    }
    *bracket = {least, static_cast<int32_t>(std::min<int64_t>(bracket->top, least + (INT64_C(1) << shift) - 1))};
    return false;
  }
  if (bracket->low == 1) {  // fewer values than `keep` differ from zero: all are kept
    *threshold = {1, 0, 0};
    return true;
  }
  *bracket = {1, bracket->low - 1};
  return false;
}

// Packs one sample with n_parts threads; each(f) calls f(part) for every part. False if a value is not finite.
template <class Each>
bool pack_sample(const Sample& s, Part* parts, int n_parts, Each&& each) {
  const int64_t elements = s.at.rows * s.at.cols, keep = s.at.keep;
  const int step = elements > kGuessAllBelow ? kGuessStep : 1;
  for (int p = 0; p < n_parts; p++) {
    parts[p].begin = s.at.blocks * p / n_parts, parts[p].end = s.at.blocks * (p + 1) / n_parts;
    parts[p].finite = true;
    parts[p].listed = kListed + 1;
  }
  auto all_finite = [&] { return std::all_of(parts, parts + n_parts, [](const Part& p) { return p.finite; }); };
  each([&](int p) {
    std::fill_n(parts[p].histogram, kBins, 0u);
    Part block = parts[p];
    for (block.begin = parts[p].begin; block.begin < parts[p].end; block.begin++) {  // while the block is in cache
      block.end = block.begin + 1;
      if (s.mean) write_means(s, block);
      guess_histogram(s, step, block);
    }
    parts[p].finite = block.finite;
  });
  if (!all_finite()) return false;
  Bracket bracket = guess_bracket(parts, n_parts, step, keep);
  Threshold threshold;
  int32_t largest;
  do {
    each([&](int p) { bracket_histogram(s, bracket, parts[p]); });
    largest = 0;
    for (int p = 0; p < n_parts; p++) largest = std::max(largest, parts[p].largest);
    if (largest >= (s.at.form == kPlain ? kBf16Overflow : kInfinity)) return false;
  } while (!narrow(parts, n_parts, keep, &bracket, &threshold));

  float scale = 0;
  if (keep) std::memcpy(&scale, &largest, sizeof scale);
  scale /= 127;
  if (s.scale) *s.scale = scale;
  // A part's values begin where the values of the parts before it end.
  each([&](int p) {
    int64_t index = 0, ties = threshold.ties;
    for (int before = 0; before < p; before++) {
      const Part& part = parts[before];
      index += keep ? part.above : 0;
      for (int bin = threshold.bin; bin < kBins; bin++) index += part.histogram[bin];
      if (threshold.ties) {
        const int64_t taken = std::min<int64_t>(ties, part.histogram[threshold.bin - 1]);
        index += taken, ties -= taken;
      }
    }
    write_values(s, threshold, scale, index, ties, parts[p]);
  });
  return true;
}

// The kept tensor that `pack` writes and `mul_grad` reads: ints form, samples, rows, cols, keep.
bool call_layout(const Call& call, PackedLayout* at) {
  const int64_t* i = call.ints;
  return call.n_ints >= 5 && packed_layout(i[0], i[1], i[2], i[3], i[4], at);
}

constexpr const char* kNoLayout = "no kept tensor has this form, these sizes and this many values a sample";

std::string pack_check(const Call& call) {
  CallCheck check(call, 3, 5, 0);
  PackedLayout at{};
  check.require(check.ok() && call_layout(call, &at), kNoLayout);
  check.require(at.form != kDense, "form must be 1, 2 or 3");
  check.present(0, "X", byte_size({at.samples, at.rows, at.cols}));
  check.present(1, "out", at.bytes);
  return check.error();
}

uint64_t pack_scratch(const Call& call, int threads) {
  PackedLayout at;
  if (!call_layout(call, &at)) return UINT64_MAX;
  return at.razor() ? threads * (kBins * sizeof(uint32_t) + kListed * sizeof(int32_t)) : 0;
}

bool pack_bf16(const Call& call, const PackedLayout& at) {
  const float* x = call.as<const float>(0);
  uint16_t* out = call.as<uint16_t>(1);
  std::atomic<bool> finite{true};
  parallel_elements(call, at.samples * at.rows * at.cols, [&](int64_t begin, int64_t end) {
    VecI largest = {};
    int32_t most = 0;
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
      const VecF v = load(x + i);
      const VecI m = bits(abs(v));
      largest = m > largest ? m : largest;
      const VecH h = to_bf16_vector(v);
      std::memcpy(out + i, &h, sizeof h);
    }
    for (; i < end; i++) most = std::max(most, magnitude(x[i])), out[i] = to_bf16(x[i]);
    for (int j = 0; j < kLanes; j++) most = std::max<int32_t>(most, largest[j]);
    if (most >= kBf16Overflow) finite.store(false, std::memory_order_relaxed);
  });
  return finite;
}

bool pack_run(const Call& call) {
  PackedLayout at;
  call_layout(call, &at);
  if (!at.razor()) return pack_bf16(call, at);
  const float* x = call.as<const float>(0);
  const PackedSections out(at, call.operands[1].data);
  uint32_t* histograms = call.as<uint32_t>(2);
  int32_t* lists = reinterpret_cast<int32_t*>(histograms + call.pool->threads() * kBins);
  const int64_t words = at.blocks * at.cols;
  const bool centered = at.form == kCentered;
  auto sample = [&](int64_t i) {
    return Sample{at,
                  x + i * at.rows * at.cols,
                  centered ? out.mean + i * words : nullptr,
                  out.mask + i * words,
                  out.offset + i * at.blocks * at.groups,
                  out.value + i * at.keep * at.value_bytes(),
                  centered ? out.scale + i : nullptr};
  };
  const int threads = call.pool->threads();
  if (threads == 1 || at.samples % threads == 0 || at.samples >= 4 * threads) {
    std::atomic<bool> finite{true};
    call.pool->split(at.samples, 1, [&](int64_t begin, int64_t end, int thread) {
      Part part{};
      part.histogram = histograms + thread * kBins, part.list = lists + thread * kListed;
      for (int64_t i = begin; i < end; i++)
        if (!pack_sample(sample(i), &part, 1, [](auto&& f) { f(0); })) finite.store(false, std::memory_order_relaxed);
    });
    return finite;
  }
  constexpr int kMaxParts = 64;
  Part parts[kMaxParts] = {};
  const int n_parts = std::min(threads, kMaxParts);
  for (int p = 0; p < n_parts; p++) {
    parts[p].histogram = histograms + p * kBins, parts[p].list = lists + p * kListed;
  }
  auto each = [&](auto&& f) {
    call.pool->run([&](int thread) {
      if (thread < n_parts) f(thread);
    });
  };
  for (int64_t i = 0; i < at.samples; i++)
    if (!pack_sample(sample(i), parts, n_parts, each)) return false;
  return true;
}

std::string mul_grad_check(const Call& call) {
  CallCheck check(call, 4, 6, 0);
  PackedLayout at{};
  check.require(check.ok() && call_layout(call, &at), kNoLayout);
  const int64_t all = check.integer(5, "reduce", 0, 1);
  check.present(0, "X", at.bytes);
  check.present(1, "dY", byte_size({at.samples, at.rows, at.cols}));
  check.present(2, "out", byte_size({all ? 1 : at.samples, at.cols}));
  return check.error();
}

// out[samples][cols] = Σ X·dY over rows, or out[cols] over samples too. One thread sums a column group of a sample (or
// of all), block by block, so the result does not depend on the number of threads.
bool mul_grad_run(const Call& call) {
  PackedLayout at;
  call_layout(call, &at);
  const KeptReader x(at, call.operands[0].data);
  const float* dy = call.as<const float>(1);
  float* out = call.as<float>(2);
  const int64_t outs = call.ints[5] ? 1 : at.samples, samples_each = at.samples / outs;
  std::atomic<bool> valid{true};
  parallel(call, outs * at.groups, samples_each * at.rows * kGroupColumns, [&](int64_t begin, int64_t end) {
    alignas(64) float tile[kBlockRows * kGroupColumns], values[kGroupValues];
    for (int64_t item = begin; item < end; item++) {
      const int64_t c = item % at.groups * kGroupColumns, count = std::min(kGroupColumns, at.cols - c);
      const int64_t first = item / at.groups * samples_each;
      VecF total[kGroupVectors] = {};
      for (int64_t s = first; s < first + samples_each; s++)
        for (int64_t b = 0; b < at.blocks; b++) {
          if (!x.tile(s, b, c, count, tile, kGroupColumns, values))
            return valid.store(false, std::memory_order_relaxed);
          const int64_t row = at.row_begin(b), rows = at.row_begin(b + 1) - row;
          const float* d = dy + (s * at.rows + row) * at.cols + c;
          for (int v = 0; v * kLanes < count; v++) {
            VecF sum = {};  // of one block: sums of sums lose less than one long sum
            for (int64_t i = 0; i < rows; i++)
              sum += load_upto(tile + i * kGroupColumns + v * kLanes, count - v * kLanes) *
                     load_upto(d + i * at.cols + v * kLanes, count - v * kLanes);
            total[v] += sum;
          }
        }
      for (int v = 0; v * kLanes < count; v++)
        store_upto(out + item / at.groups * at.cols + c + v * kLanes, total[v], count - v * kLanes);
    }
  });
  return valid;
}

}  // namespace

extern const Kernel razor_kernels[];
const Kernel razor_kernels[] = {
    {"pack", pack_check, pack_scratch, pack_run},
    {"mul_grad", mul_grad_check, nullptr, mul_grad_run},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
