// The kernels `pack` (the way is in razor_pack.cpp) and `mul_grad`, the gradient of a broadcast factor
// (docs/plan-format.md).
#include <algorithm>
#include <atomic>

#include "call_check.h"
#include "packed_read.h"
#include "razor_pack.h"

namespace er::ER_ISA {
namespace {

// The kept tensor that `pack` writes into and `mul_grad` reads: ints form, samples, rows, cols, keep.
bool call_layout(const Call& call, PackedLayout* at) {
  const int64_t* i = call.ints;
  return call.n_ints >= 5 && packed_layout(i[0], i[1], i[2], i[3], i[4], at);
}

constexpr const char* kNoLayout = "no kept tensor has this form, these sizes and this many values a sample";

constexpr uint32_t kPackInts = 5;   // without row and column of X, which may follow
constexpr uint32_t kPackFirst = 7;  // of the samples that X holds; their number follows, or X holds all

std::string pack_check(const Call& call) {
  const bool some = call.n_ints > kPackFirst;
  CallCheck check(call, 3, some ? kPackFirst + 2 : ints_with_columns(call, kPackInts, 1), 0);
  PackedLayout at{};
  check.require(check.ok() && call_layout(call, &at), kNoLayout);
  check.require(at.form != kDense, "form must be 1, 2 or 3");
  if (!check.ok()) return check.error();
  int64_t samples = at.samples;
  if (some) {
    const int64_t first = check.integer(kPackFirst, "first", 0, samples - 1);
    samples = check.integer(kPackFirst + 1, "count", 1, samples - first);
  }
  check.present(0, "X", byte_size({samples, at.rows, check_columns(check, call, kPackInts, 0, at.cols)}));
  check.present(1, "out", at.bytes);
  return check.error();
}

uint64_t pack_scratch(const Call& call, int threads) {
  PackedLayout at;
  if (!call_layout(call, &at)) return UINT64_MAX;
  if (!at.razor()) return 0;
  return static_cast<uint64_t>(threads) * pack_scratch_bytes(at);
}

bool pack_bf16(const Call& call, const PackedLayout& at, const float* all, int64_t row) {
  const int64_t elements = at.samples * at.rows * at.cols, width = row == at.cols ? elements : at.cols;
  uint16_t* out = reinterpret_cast<uint16_t*>(PackedSections(at, call.operands[1].data).value);
  std::atomic<bool> finite{true};
  parallel_elements(call, elements, [&](int64_t begin, int64_t last) {
    VecI largest = {};
    int32_t most = 0;
    for (int64_t i = begin; i < last;) {  // row by row, if there is more than one
      const int64_t index = i / width, end = std::min(last, (index + 1) * width);
      const float* x = all + index * (row - width);
      for (; i + kLanes <= end; i += kLanes) {
        const VecF v = load(x + i);
        const VecI m = bits(abs(v));
        largest = m > largest ? m : largest;
        const VecH h = to_bf16_vector(v);
        std::memcpy(out + i, &h, sizeof h);
      }
      for (; i < end; i++) most = std::max(most, magnitude(x[i])), out[i] = to_bf16(x[i]);
    }
    for (int j = 0; j < kLanes; j++) most = std::max<int32_t>(most, largest[j]);
    if (most >= kBf16Overflow) finite.store(false, std::memory_order_relaxed);
  });
  return finite;
}

bool pack_run(const Call& call) {
  PackedLayout at;
  call_layout(call, &at);
  if (call.n_ints > kPackFirst) at = at.part(call.ints[kPackFirst], call.ints[kPackFirst + 1]);
  Columns in;
  read_columns(call, kPackInts, 1, at.cols, 0, &in);
  const float* x = call.as<const float>(0) + in.column;
  if (!at.razor()) return pack_bf16(call, at, x, in.row);
  const PackedSections out(at, call.operands[1].data);
  const int64_t words = at.blocks * at.cols;
  const bool centered = at.form == kCentered;
  auto sample = [&](int64_t i) {
    return Sample{at,
                  x + i * at.rows * in.row,
                  in.row,
                  centered ? out.mean + i * words : nullptr,
                  out.mask + i * words,
                  out.offset + i * at.blocks * at.groups,
                  out.value + i * at.keep * at.value_bytes(),
                  centered ? out.scale + i : nullptr};
  };
  const int threads = call.pool->threads();
  void* scratch = call.operands[2].data;
  // Each thread's samples from the last one on: what the kernel before wrote last is still in the cache, and what the
  // next one reads first is in it again at the end.
  auto from_last = [&](int64_t i) {
    const int64_t part = ((i + 1) * threads - 1) / at.samples;
    return at.samples * part / threads + at.samples * (part + 1) / threads - 1 - i;
  };
  if (threads == 1 || at.samples % threads == 0 || at.samples >= 4 * threads) {
    std::atomic<bool> finite{true};
    call.pool->share(at.samples, 1, [&](int64_t begin, int64_t end, int thread) {
      for (int64_t i = begin; i < end; i++)
        if (!pack_sample(sample(from_last(i)), pack_scratch_of(at, scratch, thread)))
          finite.store(false, std::memory_order_relaxed);
    });
    return finite;
  }
  for (int64_t i = 0; i < at.samples; i++)
    if (!pack_sample_shared(sample(i), scratch, call.pool)) return false;
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
    {"pack", ER_CHECK(pack_check), pack_scratch, pack_run},
    {"mul_grad", ER_CHECK(mul_grad_check), nullptr, mul_grad_run},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
