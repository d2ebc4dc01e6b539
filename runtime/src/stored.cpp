#include "stored.h"

#include <cmath>
#include <cstring>

#include "error.h"
#include "packed.h"

namespace er {

uint64_t stored_bytes(const PlanParam& param) {
  const uint64_t rows = param.shape.empty() ? 1 : param.shape[param.perm[0]];
  switch (param.form) {
    case kBf16Rows:
      return param.elements * 2;
    case kInt8:
      return (rows * 4 + 63) / 64 * 64 + param.elements;
    default:
      return param.elements * 4;
  }
}

Layout StoredParam::layout() const {
  return make_layout(static_cast<int>(param.shape.size()), param.shape.data(), param.perm.data(), false);
}

void StoredParam::read(uint64_t begin, uint64_t count, float* user) const {
  const auto each = [&](auto&& value) {
    for_each_run(layout(), begin, count,
                 [&](uint64_t at, uint64_t from, uint64_t stride, uint64_t n, uint64_t, uint64_t) {
                   for (uint64_t i = 0; i < n; i++) user[at - begin + i] = value(from + i * stride);
                 });
  };
  const uint64_t cols = columns();
  switch (param.form) {
    case kBf16Rows:
      return each([&](uint64_t i) { return from_bf16(reinterpret_cast<const uint16_t*>(data)[i]); });
    case kInt8:
      return each([&](uint64_t i) { return static_cast<float>(bytes()[i]) * scales()[i / cols]; });
    default:
      return each([&](uint64_t i) {
        float x;  // a table in a zip member may lie at any byte
        std::memcpy(&x, data + i * sizeof x, sizeof x);
        return x;
      });
  }
}

void StoredParam::write(uint64_t begin, uint64_t count, const float* user) const {
  const auto each = [&](auto&& put) {
    for_each_run(layout(), begin, count,
                 [&](uint64_t at, uint64_t to, uint64_t stride, uint64_t n, uint64_t, uint64_t) {
                   for (uint64_t i = 0; i < n; i++) put(to + i * stride, user[at - begin + i]);
                 });
  };
  const uint64_t cols = columns();
  switch (param.form) {
    case kBf16Rows:
      return each([&](uint64_t i, float x) {
        reinterpret_cast<uint16_t*>(data)[i] = std::isnan(x) ? uint16_t{0x7fc0} : to_bf16(x);
      });
    case kInt8:
      return each([&](uint64_t i, float x) {
        const float scale = scales()[i / cols];
        const float q = scale > 0 ? std::nearbyint(x / scale) : 0.0f;
        bytes()[i] = static_cast<int8_t>(std::min(127.0f, std::max(-127.0f, q)));
      });
    default:
      return each([&](uint64_t i, float x) { reinterpret_cast<float*>(data)[i] = x; });
  }
}

void StoredParam::begin_scales() const { std::fill(scales(), scales() + rows(), 0.0f); }

void StoredParam::scan(uint64_t begin, uint64_t count, const float* user) const {
  const uint64_t cols = columns();
  for_each_run(layout(), begin, count, [&](uint64_t at, uint64_t to, uint64_t stride, uint64_t n, uint64_t, uint64_t) {
    for (uint64_t i = 0; i < n; i++) {
      float& most = scales()[(to + i * stride) / cols];
      const float x = std::fabs(user[at - begin + i]);
      if (!(x <= most)) most = x;  // a NaN stays
    }
  });
}

void StoredParam::end_scales() const {
  for (uint64_t r = 0; r < rows(); r++) {
    if (!std::isfinite(scales()[r]))
      throw Error{ER_BAD_FILE, text("parameter '%.200s' holds NaN or infinite values, which int8 cannot express",
                                    param.name.c_str())};
    scales()[r] /= 127.0f;
  }
}

}  // namespace er
