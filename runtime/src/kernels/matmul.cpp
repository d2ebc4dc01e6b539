// Products of two computed matrices, sample by sample: what attention that is not recognized as such needs.
#include "../blas.h"
#include "call_check.h"

namespace er::ER_ISA {
namespace {

constexpr int64_t kMaxSize = int64_t{1} << 30;  // BLAS takes ints

// batch_matmul: A[batch, m, k] (transposed: [batch, k, m]), B[batch, k, p] ([batch, p, k]) → Y[batch, m, p];
// ints batch, m, k, p, transpose_a, transpose_b. A thread takes whole products, or rows of one if there are fewer.
std::string check_batch_matmul(const Call& call) {
  CallCheck check(call, 3, 6, 0);
  const int64_t batch = check.size(0, "batch"), m = check.integer(1, "m", 1, kMaxSize),
                k = check.integer(2, "k", 1, kMaxSize), p = check.integer(3, "p", 1, kMaxSize);
  check.integer(4, "transpose_a", 0, 1);
  check.integer(5, "transpose_b", 0, 1);
  check.present(0, "A", byte_size({batch, m, k}));
  check.present(1, "B", byte_size({batch, k, p}));
  check.present(2, "Y", byte_size({batch, m, p}));
  return check.error();
}

bool run_batch_matmul(const Call& call) {
  constexpr int64_t kRows = 128;  // of one product that a thread takes at a time
  const int64_t batch = call.ints[0], m = call.ints[1], k = call.ints[2], p = call.ints[3];
  const bool a_trans = call.ints[4] == 1, b_trans = call.ints[5] == 1;
  const float *a = call.as<const float>(0), *b = call.as<const float>(1);
  float* y = call.as<float>(2);
  const int64_t tiles = (m + kRows - 1) / kRows;
  parallel(call, batch * tiles, 4 * std::min(m, kRows) * (k + p), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t sample = unit / tiles, row = unit % tiles * kRows, rows = std::min(kRows, m - row);
      const float* from = a + sample * m * k + (a_trans ? row : row * k);
      sgemm(a_trans ? Trans::yes : Trans::no, b_trans ? Trans::yes : Trans::no, rows, p, k, 1.f, from, a_trans ? m : k,
            b + sample * k * p, b_trans ? k : p, 0.f, y + (sample * m + row) * p, p);
    }
  });
  return true;
}

}  // namespace

extern const Kernel matmul_kernels[];
const Kernel matmul_kernels[] = {
    {"batch_matmul", ER_CHECK(check_batch_matmul), nullptr, run_batch_matmul},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
