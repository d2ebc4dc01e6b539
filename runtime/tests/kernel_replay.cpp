// Runs kernel calls that device_tests/record_kernels.py wrote down on one machine, and compares with what came out
// there: so an emulated processor, which has no Python, runs the kernel tests. Exit status 1 if a result differs by
// more than float32 rounding.
//
//   kernel_replay CALLS
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <string>
#include <vector>

#include "edge_razor.h"

namespace {

// Of the largest magnitude of an output. Sums of a few thousand terms in another order, with or without fused
// multiply-add, differ by less.
constexpr double kTolerance = 1e-5;
// Of quantized results (masks, nibbles, int8, bf16): a value that lies on the border of two codes may get either.
constexpr double kByteShare = 0.01;
// Razor forms: root of the squared difference over the squared values, of the tensors that they stand for.
constexpr double kPackedDifference = 0.01;

enum Kind : uint8_t { kAbsent, kInput, kFloats, kBytes, kScratch };

[[noreturn]] void stop(const std::string& what) {
  std::fprintf(stderr, "kernel_replay: %s\n", what.c_str());
  std::exit(2);
}

class Reader {
 public:
  explicit Reader(std::vector<char> bytes) : bytes_(std::move(bytes)) {}
  bool done() const { return at_ == bytes_.size(); }
  template <class T>
  T value() {
    T v;
    std::memcpy(&v, take(sizeof v), sizeof v);
    return v;
  }
  template <class T>
  std::vector<T> values() {
    std::vector<T> v(value<uint32_t>());
    if (!v.empty()) std::memcpy(v.data(), take(v.size() * sizeof(T)), v.size() * sizeof(T));
    return v;
  }
  const char* take(size_t n) {
    if (n > bytes_.size() - at_) stop("the file is truncated");
    at_ += n;
    return bytes_.data() + at_ - n;
  }

 private:
  std::vector<char> bytes_;
  size_t at_ = 0;
};

struct Operand {
  Kind kind;
  uint64_t bytes;
  const char *before, *after;
  std::vector<uint64_t> memory;  // 8-byte aligned
};

struct Tally {
  int calls = 0, wrong = 0;
  double error = 0, share = 0;
};

double largest_magnitude(const float* x, uint64_t n) {
  double largest = 0;
  for (uint64_t i = 0; i < n; i++)
    if (std::isfinite(x[i])) largest = std::max(largest, std::fabs(static_cast<double>(x[i])));
  return largest;
}

// The largest error over the largest magnitude, or over `scale` if that is larger.
double float_error(const float* got, const float* wanted, uint64_t n, double scale) {
  const double largest = std::max(scale, largest_magnitude(wanted, n));
  double error = 0;
  for (uint64_t i = 0; i < n; i++) {
    if (std::isnan(wanted[i]) ? std::isnan(got[i]) : got[i] == wanted[i]) continue;
    if (!std::isfinite(wanted[i]) || !std::isfinite(got[i])) return INFINITY;
    error = std::max(error, std::fabs(static_cast<double>(got[i]) - wanted[i]));
  }
  return error == 0 ? 0 : error / std::max(largest, 1e-30);
}

// Of what two razor tensors stand for, or −1 if the operand of this call is none.
double packed_difference(const std::string& kernel, const std::vector<int64_t>& ints, const void* got,
                         const void* wanted, uint64_t bytes) {
  if (kernel != "pack" || ints.size() != 5 || ints[0] < 2) return -1;
  const auto u = [&](int i) { return static_cast<uint64_t>(ints[static_cast<size_t>(i)]); };
  std::vector<float> a(u(1) * u(2) * u(3)), b(a.size());
  const uint32_t form = static_cast<uint32_t>(ints[0]);
  if (er_unpack(form, u(1), u(2), u(3), u(4), got, bytes, a.data()) ||
      er_unpack(form, u(1), u(2), u(3), u(4), wanted, bytes, b.data()))
    return INFINITY;
  double square = 0, total = 0;
  for (size_t i = 0; i < a.size(); i++) {
    square += std::pow(static_cast<double>(a[i]) - b[i], 2);
    total += std::pow(static_cast<double>(b[i]), 2);
  }
  return square == 0 ? 0 : std::sqrt(square / std::max(total, 1e-30));
}

void replay(Reader& in, std::map<std::string, Tally>& tallies) {
  const uint32_t length = in.value<uint32_t>();
  const std::string name(in.take(length), length);
  const std::vector<int64_t> ints = in.values<int64_t>();
  const std::vector<float> floats = in.values<float>();
  const uint32_t threads = in.value<uint32_t>();
  er_context context{};
  context.learning_rate = in.value<float>();
  context.update = in.value<uint64_t>();
  context.seed = in.value<uint64_t>();
  context.micro_index = in.value<uint32_t>();
  context.micro_count = in.value<uint32_t>();
  context.valid_batch = in.value<uint64_t>();
  context.valid_micro = in.value<uint64_t>();
  context.first_sample = in.value<uint64_t>();
  context.loss = in.value<double>();
  context.counted_batch = in.value<uint64_t>();
  const uint32_t status = in.value<uint32_t>();
  const double loss = in.value<double>();
  std::vector<Operand> operands(in.value<uint32_t>());
  for (Operand& o : operands) {
    o.kind = in.value<Kind>();
    o.bytes = in.value<uint64_t>();
    o.before = o.kind >= kInput && o.kind <= kBytes ? in.take(o.bytes) : nullptr;
    o.after = o.kind == kFloats || o.kind == kBytes ? in.take(o.bytes) : nullptr;
    o.memory.assign((o.bytes + 7) / 8, 0xA5A5A5A5A5A5A5A5u);
    if (o.before) std::memcpy(o.memory.data(), o.before, o.bytes);
  }

  Tally& tally = tallies[name];
  tally.calls++;
  const auto wrong = [&](const std::string& what) {
    tally.wrong++;
    std::string shape;
    for (int64_t i : ints) shape += " " + std::to_string(i);
    std::printf("%s [%s], %u threads: %s\n", name.c_str(), shape.c_str(), threads, what.c_str());
  };
  uint64_t scratch = 0;
  er_kernel_scratch(name.c_str(), ints.data(), static_cast<uint32_t>(ints.size()), floats.data(),
                    static_cast<uint32_t>(floats.size()), threads, &scratch);
  if (scratch && operands.back().kind == kScratch && scratch > operands.back().bytes)
    return wrong("needs " + std::to_string(scratch) + " bytes of scratch, the plan has " +
                 std::to_string(operands.back().bytes));
  std::vector<er_operand> pointers;
  for (Operand& o : operands) pointers.push_back({o.kind == kAbsent ? nullptr : o.memory.data(), o.bytes});
  const er_status got = er_kernel_run(name.c_str(), ints.data(), static_cast<uint32_t>(ints.size()), floats.data(),
                                      static_cast<uint32_t>(floats.size()), pointers.data(),
                                      static_cast<uint32_t>(pointers.size()), threads, &context);
  if (got != status)
    return wrong("status " + std::to_string(got) + " instead of " + std::to_string(status) + ": " + er_last_error());
  if (status != ER_OK) return;
  if (std::isnan(loss) ? !std::isnan(context.loss) : std::fabs(context.loss - loss) > kTolerance * std::fabs(loss))
    wrong("loss " + std::to_string(context.loss) + " instead of " + std::to_string(loss));
  const auto floats_after = [](const Operand& o) {
    std::vector<float> floats(o.bytes / 4);
    std::memcpy(floats.data(), o.after, o.bytes);
    return floats;
  };
  for (size_t i = 0; i < operands.size(); i++) {
    Operand& o = operands[i];
    const char* result = reinterpret_cast<const char*>(o.memory.data());
    if (o.kind == kInput && std::memcmp(result, o.before, o.bytes)) wrong("an operand changed that did not before");
    if (o.kind == kFloats) {
      const std::vector<float> wanted = floats_after(o);
      double scale = 0;
      if (name == "attention_grad" && i >= 10 && operands[i - 3].kind == kFloats) {
        // The terms of a sum of dK cancel, as a softmax's gradient adds up to 0: its error is that of its terms.
        const std::vector<float> terms = floats_after(operands[i - 3]);
        scale = largest_magnitude(terms.data(), terms.size());
      }
      const double error = float_error(reinterpret_cast<const float*>(result), wanted.data(), wanted.size(), scale);
      tally.error = std::max(tally.error, error);
      if (error > kTolerance) wrong("error " + std::to_string(error) + " of the largest value");
    } else if (o.kind == kBytes) {
      std::vector<uint64_t> wanted(o.memory.size());
      std::memcpy(wanted.data(), o.after, o.bytes);
      const double packed = packed_difference(name, ints, result, wanted.data(), o.bytes);
      if (packed > kPackedDifference) wrong("stands for values that differ by " + std::to_string(packed));
      uint64_t differ = 0;
      for (uint64_t b = 0; b < o.bytes; b++) differ += result[b] != o.after[b];
      const double share = static_cast<double>(differ) / static_cast<double>(o.bytes);
      tally.share = std::max(tally.share, packed < 0 ? share : packed);
      if (packed < 0 && differ > 1 && share > kByteShare) wrong(std::to_string(differ) + " of the bytes differ");
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) stop("usage: kernel_replay CALLS");
  std::ifstream file(argv[1], std::ios::binary);
  if (!file) stop(std::string("cannot read ") + argv[1]);
  Reader in({std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()});
  if (std::memcmp(in.take(8), "ERCALLS\n", 8)) stop("this is no file of kernel calls");
  std::map<std::string, Tally> tallies;
  while (!in.done()) replay(in, tallies);
  Tally all;
  std::printf("%s\n%-20s %6s %12s %12s\n", er_isa(), "kernel", "calls", "error", "quantized");
  for (const auto& [name, tally] : tallies) {
    std::printf("%-20s %6d %12.2g %12.2g\n", name.c_str(), tally.calls, tally.error, tally.share);
    all.calls += tally.calls;
    all.wrong += tally.wrong;
  }
  std::printf("%zu kernels, %d calls, %d wrong\n", tallies.size(), all.calls, all.wrong);
  return all.wrong || tallies.empty();
}
