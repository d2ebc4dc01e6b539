#include "packed.h"

#include "edge_razor.h"
#include "error.h"

namespace er {

bool packed_layout(int64_t form, int64_t samples, int64_t rows, int64_t cols, int64_t keep, PackedLayout* layout) {
  constexpr int64_t kElementLimit = int64_t{1} << 40;
  int64_t sample, total;
  if (form < kDense || form > kCentered || samples < 1 || rows < 1 || cols < 1 || keep < 0) return false;
  if (__builtin_mul_overflow(rows, cols, &sample) || __builtin_mul_overflow(sample, samples, &total) ||
      total > kElementLimit)
    return false;
  PackedLayout at{};
  at.form = form, at.samples = samples, at.rows = rows, at.cols = cols, at.keep = keep;
  at.blocks = (rows + kBlockRows - 1) / kBlockRows;
  at.groups = (cols + kGroupColumns - 1) / kGroupColumns;
  if (!at.razor()) {
    if (keep) return false;
    at.bytes = static_cast<uint64_t>(total * at.value_bytes());
    *layout = at;
    return true;
  }
  if (keep > sample || sample > INT64_C(0xffffffff)) return false;
  uint64_t end = 0;
  auto section = [&end](uint64_t items, uint64_t bytes) {
    uint64_t begin = (end + 63) / 64 * 64;
    end = begin + items * bytes;
    return begin;
  };
  const bool centered = form == kCentered;
  const uint64_t words = static_cast<uint64_t>(samples * at.blocks * cols);
  at.scale = section(centered ? samples : 0, sizeof(float));
  at.mean = section(centered ? words : 0, sizeof(uint16_t));
  at.mask = section(words, sizeof(uint64_t));
  at.offset = section(samples * at.blocks * at.groups, sizeof(uint32_t));
  at.value = section(static_cast<uint64_t>(samples * keep), at.value_bytes());
  at.bytes = end;
  *layout = at;
  return true;
}

PackedLayout PackedLayout::part(int64_t first, int64_t count) const {
  PackedLayout at = *this;
  const auto skip = [&](uint64_t* section, int64_t items, int64_t bytes) {
    *section += static_cast<uint64_t>(first * items * bytes);
  };
  at.samples = count;
  skip(&at.scale, 1, sizeof(float));
  skip(&at.mean, blocks * cols, sizeof(uint16_t));
  skip(&at.mask, blocks * cols, sizeof(uint64_t));
  skip(&at.offset, blocks * groups, sizeof(uint32_t));
  skip(&at.value, razor() ? keep : rows * cols, value_bytes());
  return at;
}

bool rows_layout(int64_t samples, int64_t rows, int64_t cols, int64_t keep, RowsLayout* layout) {
  constexpr int64_t kElementLimit = int64_t{1} << 40;
  int64_t all, total;
  if (samples < 1 || rows < 1 || cols < 1 || keep < 1 || keep > cols) return false;
  if (__builtin_mul_overflow(samples, rows, &all) || __builtin_mul_overflow(all, cols, &total) || total > kElementLimit)
    return false;
  RowsLayout at{};
  at.rows = all, at.cols = cols, at.keep = keep, at.words = (cols + 63) / 64;
  at.value = (static_cast<uint64_t>(all * at.words) * sizeof(uint64_t) + 63) / 64 * 64;
  at.bytes = at.value + static_cast<uint64_t>(all * keep) * sizeof(uint16_t);
  *layout = at;
  return true;
}

// Writes one block and group of a razor tensor into `out` (row stride cols); false if its values lie outside the
// sample's.
static bool unpack_group(const PackedLayout& at, const PackedSections& in, int64_t sample, int64_t block, int64_t group,
                         float* out) {
  const int64_t begin = at.row_begin(block), rows = at.row_begin(block + 1) - begin;
  const int64_t word = (sample * at.blocks + block) * at.cols;
  const bool centered = at.form == kCentered;
  int64_t index = in.offset[(sample * at.blocks + block) * at.groups + group];
  for (int64_t c = group * kGroupColumns; c < at.cols && c < (group + 1) * kGroupColumns; c++) {
    const float mean = centered ? from_bf16(in.mean[word + c]) : 0.f;
    for (int64_t i = 0; i < rows; i++) {
      float x = mean;
      if (in.mask[word + c] >> i & 1) {
        if (index >= at.keep) return false;
        const uint8_t* value = in.value + (sample * at.keep + index++) * at.value_bytes();
        uint16_t half;
        if (centered)
          x += in.scale[sample] * static_cast<float>(static_cast<int8_t>(*value));
        else
          std::memcpy(&half, value, sizeof half), x = from_bf16(half);
      }
      out[(begin + i) * at.cols + c] = x;
    }
  }
  return true;
}

static er_status unpack(const PackedLayout& at, const void* packed, float* dense) {
  const int64_t sample = at.rows * at.cols;
  if (at.form == kDense) {
    std::memcpy(dense, packed, at.bytes);
  } else if (at.form == kBf16) {
    for (int64_t i = 0; i < at.samples * sample; i++) dense[i] = from_bf16(static_cast<const uint16_t*>(packed)[i]);
  } else {
    const PackedSections in(at, const_cast<void*>(packed));
    for (int64_t s = 0; s < at.samples; s++)
      for (int64_t b = 0; b < at.blocks; b++)
        for (int64_t g = 0; g < at.groups; g++)
          if (!unpack_group(at, in, s, b, g, dense + s * sample))
            return fail(ER_INVALID_ARGUMENT, "unpack: sample %lld has more mask bits than its %lld values",
                        static_cast<long long>(s), static_cast<long long>(at.keep));
  }
  return ER_OK;
}

// ABI sizes are unsigned; what does not fit the signed sizes of the layout becomes -1, which it refuses.
static int64_t size(uint64_t x) { return x > INT64_MAX ? -1 : static_cast<int64_t>(x); }

}  // namespace er

extern "C" uint64_t er_packed_bytes(uint32_t form, uint64_t samples, uint64_t rows, uint64_t cols, uint64_t keep) {
  if (form == er::kRows) {
    er::RowsLayout at;
    return er::rows_layout(er::size(samples), er::size(rows), er::size(cols), er::size(keep), &at) ? at.bytes : 0;
  }
  er::PackedLayout at;
  return er::packed_layout(form, er::size(samples), er::size(rows), er::size(cols), er::size(keep), &at) ? at.bytes : 0;
}

extern "C" er_status er_unpack(uint32_t form, uint64_t samples, uint64_t rows, uint64_t cols, uint64_t keep,
                               const void* packed, uint64_t packed_bytes, float* dense) {
  er::PackedLayout at;
  if (!er::packed_layout(form, er::size(samples), er::size(rows), er::size(cols), er::size(keep), &at))
    return er::fail(ER_INVALID_ARGUMENT, "unpack: no kept tensor has form %u, these sizes and %llu values a sample",
                    form, static_cast<unsigned long long>(keep));
  if (!packed || !dense) return er::fail(ER_INVALID_ARGUMENT, "unpack: a NULL array");
  if (packed_bytes < at.bytes)
    return er::fail(ER_INVALID_ARGUMENT, "unpack: %llu bytes given, the kept tensor has %llu",
                    static_cast<unsigned long long>(packed_bytes), static_cast<unsigned long long>(at.bytes));
  return er::unpack(at, packed, dense);
}
