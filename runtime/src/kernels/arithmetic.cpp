// Elementwise arithmetic with broadcasting, its gradients (reduce, broadcast), and moving data (copy, fill).
#include <algorithm>
#include <cstring>
#include <numeric>

#include "../kernel.h"
#include "../simd.h"
#include "call_check.h"
#include "column_sum.h"
#include "strided.h"

namespace er::ER_ISA {
namespace {

// ---- Checks of strided attributes ----

// The rank at ints[at], with `sets` vectors of that length behind it and `fixed` ints in all beside them.
int check_rank(CallCheck& check, const Call& call, uint32_t at, uint32_t fixed, uint32_t sets) {
  if (call.n_ints < fixed) {
    check.count("ints", call.n_ints, fixed);
    return 0;
  }
  const int rank = static_cast<int>(check.integer(at, "rank", 0, ER_MAX_RANK));
  check.count("ints", call.n_ints, fixed + sets * static_cast<uint32_t>(rank));
  return check.ok() ? rank : 0;
}

// Sizes at ints[at …]: each at least 1.
uint64_t check_dims(CallCheck& check, uint32_t at, int rank) {
  uint64_t bytes = sizeof(float);
  for (int d = 0; d < rank; d++) {
    const int64_t dim = check.size(at + d, "dimension");
    if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(dim), &bytes)) return UINT64_MAX;
  }
  return bytes;
}

// Bytes from the operand's start to the end of its last element, for dims at ints[dims_at …] and strides at
// ints[strides_at …].
uint64_t check_span(CallCheck& check, const Call& call, uint32_t dims_at, uint32_t strides_at, int rank,
                    int64_t offset) {
  uint64_t last = static_cast<uint64_t>(offset), bytes;
  for (int d = 0; d < rank && check.ok(); d++) {
    const int64_t stride = check.integer(strides_at + d, "stride", 0, INT64_MAX);
    uint64_t reach;
    if (__builtin_mul_overflow(static_cast<uint64_t>(call.ints[dims_at + d] - 1), static_cast<uint64_t>(stride),
                               &reach) ||
        __builtin_add_overflow(last, reach, &last))
      return UINT64_MAX;
  }
  if (last == UINT64_MAX || __builtin_mul_overflow(last + 1, sizeof(float), &bytes)) return UINT64_MAX;
  return bytes;
}

// ---- binary: out = A op B, and what is a special case of it ----

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Sub {
  template <class T>
  T operator()(T a, T b) const {
    return a - b;
  }
};
struct Mul {
  template <class T>
  T operator()(T a, T b) const {
    return a * b;
  }
};
struct Div {
  template <class T>
  T operator()(T a, T b) const {
    return a / b;
  }
};

// One row: out[i] = a[i·sa] op b[i·sb].
template <class Op>
inline void binary_row(Op op, int64_t n, float* out, const float* a, int64_t sa, const float* b, int64_t sb) {
  if (sa == 1 && sb == 1) {
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes)
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) store(out + i + v * kLanes, op(load(a + i + v * kLanes), load(b + i + v * kLanes)));
    for (; i < n; i += kLanes) store_upto(out + i, op(load_upto(a + i, n - i), load_upto(b + i, n - i)), n - i);
  } else if (sa == 1 && sb == 0) {
    const VecF y = broadcast(*b);
    for (int64_t i = 0; i < n; i += kLanes) store_upto(out + i, op(load_upto(a + i, n - i), y), n - i);
  } else if (sa == 0 && sb == 1) {
    const VecF x = broadcast(*a);
    for (int64_t i = 0; i < n; i += kLanes) store_upto(out + i, op(x, load_upto(b + i, n - i)), n - i);
  } else {
    for (int64_t i = 0; i < n; i++) out[i] = op(a[i * sa], b[i * sb]);
  }
}

// out (contiguous), a and b over `loop` (operands in this order).
template <class Op>
void binary_loop(const Call& call, Strided<3> loop, Op op, float* out, const float* a, const float* b) {
  loop.pad(2);
  const int inner = loop.rank - 1;
  const int64_t cols = loop.dims[inner], rows = loop.dims[inner - 1], all_rows = loop.outer(inner);
  const int64_t sa = loop.strides[1][inner], sb = loop.strides[2][inner];
  auto run_rows = [&](int64_t begin, int64_t end, int64_t first,
                      int64_t last) {  // rows begin … end, columns first … last
    int64_t at[3];
    while (begin < end) {
      loop.locate(begin, inner, at);
      const int64_t stop = std::min(end, begin - begin % rows + rows);
      float* y = out + at[0] + first;
      const float *p = a + at[1] + first * sa, *q = b + at[2] + first * sb;
      for (; begin < stop; begin++) {
        binary_row(op, last - first, y, p, sa, q, sb);
        y += loop.strides[0][inner - 1];
        p += loop.strides[1][inner - 1];
        q += loop.strides[2][inner - 1];
      }
    }
  };
  if (all_rows >= 8 * call.pool->threads())
    parallel(call, all_rows, 3 * cols, [&](int64_t begin, int64_t end) { run_rows(begin, end, 0, cols); });
  else
    parallel_elements(call, cols, [&](int64_t first, int64_t last) { run_rows(0, all_rows, first, last); });
}

// The loop over row-major dims with the two operands' strides.
Strided<3> binary_strided(const int64_t* dims, const int64_t* a, const int64_t* b, int rank) {
  int64_t step = 1, steps[ER_MAX_RANK];
  for (int d = rank - 1; d >= 0; d--) {
    steps[d] = step;
    step *= dims[d];
  }
  Strided<3> loop;
  for (int d = 0; d < rank; d++) loop.push(dims[d], {steps[d], a[d], b[d]});
  return loop;
}

// binary: A, B, out; ints op, rank, dims[rank], strides of A, strides of B.
std::string check_binary(const Call& call) {
  CallCheck check(call, 3, call.n_ints, 0);
  const int rank = check_rank(check, call, 1, 2, 3);
  check.integer(0, "op", 0, 3);
  const uint64_t bytes = check_dims(check, 2, rank);
  check.present(2, "out", bytes);
  check.present(0, "A", check_span(check, call, 2, 2 + rank, rank, 0));
  check.present(1, "B", check_span(check, call, 2, 2 + 2 * rank, rank, 0));
  return check.error();
}

bool run_binary(const Call& call) {
  const int rank = static_cast<int>(call.ints[1]);
  const int64_t* dims = call.ints + 2;
  const Strided<3> loop = binary_strided(dims, dims + rank, dims + 2 * rank, rank);
  const float *a = call.as<float>(0), *b = call.as<float>(1);
  float* out = call.as<float>(2);
  switch (call.ints[0]) {
    case 0:
      binary_loop(call, loop, Add{}, out, a, b);
      break;
    case 1:
      binary_loop(call, loop, Sub{}, out, a, b);
      break;
    case 2:
      binary_loop(call, loop, Mul{}, out, a, b);
      break;
    default:
      binary_loop(call, loop, Div{}, out, a, b);
      break;
  }
  return true;
}

// neg: X, Y; int n.
std::string check_neg(const Call& call) {
  CallCheck check(call, 2, 1, 0);
  const uint64_t bytes = byte_size({check.integer(0, "n", 1, INT64_MAX)});
  check.present(0, "X", bytes);
  check.present(1, "Y", bytes);
  return check.error();
}

bool run_neg(const Call& call) {
  const float minus = -1.0f;
  Strided<3> loop;
  loop.push(call.ints[0], {1, 1, 0});
  binary_loop(call, loop, Mul{}, call.as<float>(1), call.as<float>(0), &minus);
  return true;
}

// broadcast: dY, dX = scale·dY repeated; ints rank, dims of dX, strides of dY; float scale.
std::string check_broadcast(const Call& call) {
  CallCheck check(call, 2, call.n_ints, 1);
  const int rank = check_rank(check, call, 0, 1, 2);
  const uint64_t bytes = check_dims(check, 1, rank);
  check.present(1, "dX", bytes);
  check.present(0, "dY", check_span(check, call, 1, 1 + rank, rank, 0));
  return check.error();
}

bool run_broadcast(const Call& call) {
  static const int64_t zeros[ER_MAX_RANK] = {};
  const int rank = static_cast<int>(call.ints[0]);
  const Strided<3> loop = binary_strided(call.ints + 1, call.ints + 1 + rank, zeros, rank);
  binary_loop(call, loop, Mul{}, call.as<float>(1), call.as<float>(0), call.floats);
  return true;
}

// ---- reduce: the gradient of broadcasting, and pooling over all positions ----

// Dimensions merged into runs that alternate between reduced and kept.
struct Reduction {
  int rank = 0;
  int64_t dims[ER_MAX_RANK];
  bool reduced[ER_MAX_RANK];
  int64_t terms = 1, kept = 1;  // elements summed into one, elements of the result
};

Reduction reduction(const int64_t* dims, const int64_t* flags, int rank) {
  Reduction r;
  for (int d = 0; d < rank; d++) {
    if (dims[d] == 1) continue;
    const bool flag = flags[d] != 0;
    if (r.rank > 0 && r.reduced[r.rank - 1] == flag) {
      r.dims[r.rank - 1] *= dims[d];
    } else {
      r.dims[r.rank] = dims[d];
      r.reduced[r.rank++] = flag;
    }
    (flag ? r.terms : r.kept) *= dims[d];
  }
  return r;
}

// Rows and columns if the sum runs over the leading dimensions only: then chunks of rows share the work.
bool leading_rows(const Reduction& r) { return r.rank >= 1 && r.rank <= 2 && r.reduced[0]; }

// reduce: X, out, scratch; ints op (0 sum, 1 mean), rank, dims, reduced flags.
std::string check_reduce(const Call& call) {
  CallCheck check(call, 3, call.n_ints, 0);
  const int rank = check_rank(check, call, 1, 2, 2);
  check.integer(0, "op", 0, 1);
  check.present(0, "X", check_dims(check, 2, rank));
  uint64_t bytes = sizeof(float);
  for (int d = 0; d < rank && check.ok(); d++)
    if (!check.integer(2 + rank + d, "reduced", 0, 1)) bytes *= static_cast<uint64_t>(call.ints[2 + d]);
  check.present(1, "out", bytes);
  return check.error();
}

uint64_t scratch_reduce(const Call& call, int) {
  if (call.n_ints < 2 || call.ints[1] < 0 || call.ints[1] > ER_MAX_RANK) return UINT64_MAX;
  const int rank = static_cast<int>(call.ints[1]);
  if (call.n_ints != 2 + 2 * static_cast<uint32_t>(rank)) return UINT64_MAX;
  uint64_t all = sizeof(float);
  for (int d = 0; d < rank; d++) {
    const int64_t dim = call.ints[2 + d];
    if (dim < 1 || dim > kMaxDim || __builtin_mul_overflow(all, static_cast<uint64_t>(dim), &all) || all > INT64_MAX)
      return UINT64_MAX;
  }
  const Reduction r = reduction(call.ints + 2, call.ints + 2 + rank, rank);
  if (!leading_rows(r) || r.rank == 1) return 0;
  const int64_t chunks = sum_chunks(r.dims[0]);
  return chunks == 1 ? 0 : byte_size({chunks, r.kept});
}

// Σ over all of x[n], in a fixed number of parts.
float sum_all(const Call& call, const float* x, int64_t n) {
  constexpr int64_t kParts = 64;
  double part[kParts] = {};
  parallel(call, kParts, n / kParts, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; p++)
      part[p] = sum_contiguous(x + n * p / kParts, n * (p + 1) / kParts - n * p / kParts);
  });
  return static_cast<float>(std::accumulate(part, part + kParts, 0.0));
}

// The general case. Result elements are walked as [outer][cols], cols being the kept dimension that lies innermost (1
// if a reduced one does).
void reduce_outer(const Call& call, const Reduction& r, const float* x, float factor, float* out) {
  const bool columns = r.rank > 0 && !r.reduced[r.rank - 1];
  const int64_t cols = columns ? r.dims[r.rank - 1] : 1;
  Strided<1> kept, summed;
  int64_t stride = 1, strides[ER_MAX_RANK];
  for (int d = r.rank - 1; d >= 0; d--) {
    strides[d] = stride;
    stride *= r.dims[d];
  }
  for (int d = 0; d < r.rank - (columns ? 1 : 0); d++) (r.reduced[d] ? summed : kept).push(r.dims[d], {strides[d]});
  summed.pad(1);  // the innermost reduced dimension is the loop of rows, or of contiguous terms
  const int inner = summed.rank - 1;
  const int64_t rows = summed.dims[inner], row_stride = summed.strides[0][inner], repeats = summed.outer(inner);
  const int64_t width = kSumTile * kLanes, tiles = (cols + width - 1) / width, outer = kept.outer(kept.rank);
  parallel(call, outer * tiles, r.terms * std::min(cols, width), [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t column = unit % tiles * width;
      int64_t base[1], offset[1];
      kept.locate(unit / tiles, kept.rank, base);
      float* sums = out + unit / tiles * cols;
      const int64_t stop = std::min(cols, column + width);
      double total = 0;
      for (int64_t i = 0; i < repeats; i++) {
        summed.locate(i, inner, offset);
        const float* p = x + base[0] + offset[0];
        if (columns)
          sum_columns(0, rows, column, stop, i > 0, sums, MatrixTerms{p, row_stride});
        else
          total += sum_contiguous(p, rows);
      }
      if (!columns) sums[0] = static_cast<float>(total);
      for (int64_t c = column; c < stop; c++) sums[c] *= factor;
    }
  });
}

bool run_reduce(const Call& call) {
  const int rank = static_cast<int>(call.ints[1]);
  const Reduction r = reduction(call.ints + 2, call.ints + 2 + rank, rank);
  const float* x = call.as<float>(0);
  float* out = call.as<float>(1);
  const float factor = call.ints[0] == 1 ? static_cast<float>(1.0 / static_cast<double>(r.terms)) : 1.0f;
  if (!leading_rows(r))
    reduce_outer(call, r, x, factor, out);
  else if (r.rank == 1)
    out[0] = sum_all(call, x, r.dims[0]) * factor;
  else
    sum_rows(call, x, r.dims[0], r.dims[1], factor, false, out, call.as<float>(2));
  return true;
}

// ---- copy and fill ----

// copy: src, dst; ints rank, dims, src strides, dst strides, src offset, dst offset. Elements of dst must be distinct.
std::string check_copy(const Call& call) {
  CallCheck check(call, 2, call.n_ints, 0);
  const int rank = check_rank(check, call, 0, 3, 3);
  check_dims(check, 1, rank);
  const int64_t src_offset = check.integer(1 + 3 * rank, "src offset", 0, INT64_MAX);
  const int64_t dst_offset = check.integer(2 + 3 * rank, "dst offset", 0, INT64_MAX);
  check.present(0, "src", check_span(check, call, 1, 1 + rank, rank, src_offset));
  check.present(1, "dst", check_span(check, call, 1, 1 + 2 * rank, rank, dst_offset));
  for (int d = 0; d < rank && check.ok(); d++)
    check.require(call.ints[1 + d] == 1 || call.ints[1 + 2 * rank + d] > 0, "a dst stride is 0");
  return check.error();
}

// dst[r·ds + c] = src[r + c·ss] for rows × cols: a transposition, in blocks that stay in the first-level cache.
void transpose(const float* src, int64_t ss, float* dst, int64_t ds, int64_t rows, int64_t cols) {
  constexpr int64_t kBlock = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += kBlock)
    for (int64_t c0 = 0; c0 < cols; c0 += kBlock) {
      const int64_t r1 = std::min(rows, r0 + kBlock), c1 = std::min(cols, c0 + kBlock);
      if (c1 - c0 < r1 - r0) {
        for (int64_t c = c0; c < c1; c++)
          for (int64_t r = r0; r < r1; r++) dst[r * ds + c] = src[r + c * ss];
      } else {
        for (int64_t r = r0; r < r1; r++)
          for (int64_t c = c0; c < c1; c++) dst[r * ds + c] = src[r + c * ss];
      }
    }
}

inline void copy_short(const float* src, float* dst, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, load(src + i));
  if (i < n) store_upto(dst + i, load_upto(src + i, n - i), n - i);
}

void copy_run(const float* src, float* dst, int64_t n) {
  if (n >= 256)
    std::memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
  else
    copy_short(src, dst, n);
}

bool run_copy(const Call& call) {
  const int rank = static_cast<int>(call.ints[0]);
  const int64_t *dims = call.ints + 1, *ss = dims + rank, *ds = ss + rank;
  const float* src = call.as<float>(0) + ds[rank];
  float* dst = call.as<float>(1) + ds[rank + 1];
  // In the order of dst, so that writes run forward and dimensions merge.
  int order[ER_MAX_RANK];
  for (int d = 0; d < rank; d++) {
    int at = d;
    for (; at > 0 && ds[order[at - 1]] < ds[d]; at--) order[at] = order[at - 1];
    order[at] = d;
  }
  Strided<2> loop;  // dst, src
  for (int i = 0; i < rank; i++) loop.push(dims[order[i]], {ds[order[i]], ss[order[i]]});
  loop.pad(2);
  const int col = loop.rank - 1, row = col - 1;
  if (loop.strides[1][col] != 1)  // make the rows the dimension that src has contiguous
    for (int d = 0; d < row; d++)
      if (loop.strides[1][d] == 1) {
        std::swap(loop.dims[d], loop.dims[row]);
        for (auto& strides : loop.strides) std::swap(strides[d], strides[row]);
        break;
      }
  const int64_t rows = loop.dims[row], cols = loop.dims[col];
  const int64_t dst_row = loop.strides[0][row], src_row = loop.strides[1][row];
  const int64_t dst_col = loop.strides[0][col], src_col = loop.strides[1][col];
  const bool runs = dst_col == 1 && src_col == 1;
  if (rows * loop.outer(row) == 1 && runs) {
    parallel_elements(call, cols, [&](int64_t begin, int64_t end) { copy_run(src + begin, dst + begin, end - begin); });
    return true;
  }
  const int64_t block = 64, blocks = (rows + block - 1) / block, outer = loop.outer(row);
  parallel(call, outer * blocks, std::min(rows, block) * cols, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; unit++) {
      int64_t at[2];
      loop.locate(unit / blocks, row, at);
      const int64_t first = unit % blocks * block, last = std::min(rows, first + block);
      const float* from = src + at[1] + first * src_row;
      float* to = dst + at[0] + first * dst_row;
      if (runs)
        for (int64_t r = first; r < last; r++, from += src_row, to += dst_row) copy_run(from, to, cols);
      else if (dst_col == 1 && src_row == 1)
        transpose(from, src_col, to, dst_row, last - first, cols);
      else
        for (int64_t r = first; r < last; r++, from += src_row, to += dst_row)
          for (int64_t c = 0; c < cols; c++) to[c * dst_col] = from[c * src_col];
    }
  });
  return true;
}

// fill: dst; int n; float value.
std::string check_fill(const Call& call) {
  CallCheck check(call, 1, 1, 1);
  check.present(0, "dst", byte_size({check.integer(0, "n", 1, INT64_MAX)}));
  return check.error();
}

bool run_fill(const Call& call) {
  float* dst = call.as<float>(0);
  parallel_elements(call, call.ints[0],
                    [&](int64_t begin, int64_t end) { std::fill(dst + begin, dst + end, call.floats[0]); });
  return true;
}

}  // namespace

extern const Kernel arithmetic_kernels[];
const Kernel arithmetic_kernels[] = {
    {"binary", ER_CHECK(check_binary), nullptr, run_binary},
    {"neg", ER_CHECK(check_neg), nullptr, run_neg},
    {"reduce", ER_CHECK(check_reduce), scratch_reduce, run_reduce},
    {"broadcast", ER_CHECK(check_broadcast), nullptr, run_broadcast},
    {"copy", ER_CHECK(check_copy), nullptr, run_copy},
    {"fill", ER_CHECK(check_fill), nullptr, run_fill},
    {nullptr, nullptr, nullptr, nullptr},
};

}  // namespace er::ER_ISA
