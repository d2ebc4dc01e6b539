// Validation of a kernel call's attributes and operands, and helpers to share work. A plan is untrusted: sizes are
// multiplied with overflow checks, and what passes can be trusted by run().
#pragma once
#include <cstdint>
#include <initializer_list>
#include <string>

#include "../columns.h"

namespace er::ER_ISA {

// Checks run once, when a plan is loaded: small code matters more than their speed.
#define ER_COLD __attribute__((cold, noinline))
// For the tables of kernels. Whether a call is valid does not depend on what runs it: the portable kernels' checks
// serve all instruction sets.
#define ER_CHECK(check) (ER_VECTOR_BYTES == 16 ? check : nullptr)

// Larger dimensions cannot be stored; the bound keeps products of two of them inside int64.
constexpr int64_t kMaxDim = int64_t{1} << 31;

// Product of sizes and `bytes` each; UINT64_MAX if one is negative or the product does not fit.
inline uint64_t byte_size(std::initializer_list<int64_t> sizes, uint64_t bytes = sizeof(float)) {
  uint64_t total = bytes;
  for (int64_t size : sizes)
    if (size < 0 || __builtin_mul_overflow(total, static_cast<uint64_t>(size), &total)) return UINT64_MAX;
  return total;
}

// Collects the first problem of a call.
class CallCheck {
 public:
  ER_COLD CallCheck(const Call& call, uint32_t operands, uint32_t ints, uint32_t floats) : call_(call) {
    count("operands", call.n_operands, operands);
    count("ints", call.n_ints, ints);
    count("floats", call.n_floats, floats);
  }
  bool ok() const { return error_.empty(); }
  const std::string& error() const { return error_; }
  ER_COLD void fail(const std::string& what) {
    if (ok()) error_ = what;
  }
  ER_COLD void require(bool condition, const char* what) {
    if (!condition) fail(what);
  }
  ER_COLD void count(const char* what, uint32_t given, uint32_t expected) {
    if (given != expected) fail("expected " + std::to_string(expected) + " " + what + ", got " + std::to_string(given));
  }
  // The int at `index`, which must lie in [low, high]; low if the call is already wrong.
  ER_COLD int64_t integer(uint32_t index, const char* name, int64_t low, int64_t high) {
    if (!ok()) return low;
    int64_t value = call_.ints[index];
    if (value >= low && value <= high) return value;
    fail(std::string(name) + " must be " + std::to_string(low) + " to " + std::to_string(high) + ", not " +
         std::to_string(value));
    return low;
  }
  int64_t size(uint32_t index, const char* name) { return integer(index, name, 1, kMaxDim); }
  // An operand of at least `bytes` bytes.
  ER_COLD void present(uint32_t index, const char* name, uint64_t bytes) {
    if (!ok()) return;
    if (!call_.operands[index].data) return fail(std::string(name) + " is absent");
    enough(index, name, bytes);
  }
  // An operand that may be absent.
  ER_COLD void optional(uint32_t index, const char* name, uint64_t bytes) {
    if (ok() && call_.operands[index].data) enough(index, name, bytes);
  }

 private:
  ER_COLD void enough(uint32_t index, const char* name, uint64_t bytes) {
    uint64_t given = call_.operands[index].bytes;
    if (bytes == UINT64_MAX) return fail(std::string(name) + " is too large");
    if (given < bytes)
      fail(std::string(name) + " has " + std::to_string(given) + " bytes, needs " + std::to_string(bytes));
  }
  const Call& call_;
  std::string error_;
};

// Checks the columns (columns.h) of operand `index`; returns their rows' length.
ER_COLD inline int64_t check_columns(CallCheck& check, const Call& call, uint32_t at, uint32_t index, int64_t width) {
  if (call.n_ints <= at) return width;
  const int64_t row = check.integer(at + 2 * index, "row", width, kMaxDim);
  check.integer(at + 2 * index + 1, "column", 0, row - width);
  return row;
}

// Below this many floats a thread gains less than waking it costs (about 2 µs).
constexpr int64_t kFloatsPerThread = 8192;

// body(begin, end) over [0, items), in parallel if there is work for it. `floats` is how many floats an item touches.
template <class F>
void parallel(const Call& call, int64_t items, int64_t floats, F&& body) {
  call.pool->share(
      items, 1, [&](int64_t begin, int64_t end, int) { body(begin, end); },
      items < 2 || items * floats < 2 * kFloatsPerThread);
}

// The same for contiguous elements; ranges begin at multiples of 64 floats.
template <class F>
void parallel_elements(const Call& call, int64_t n, F&& body) {
  call.pool->share(n, 64, [&](int64_t begin, int64_t end, int) { body(begin, end); }, n < 2 * kFloatsPerThread);
}

}  // namespace er::ER_ISA
