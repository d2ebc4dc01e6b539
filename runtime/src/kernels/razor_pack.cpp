// Packing finds the k-th largest magnitude of a sample exactly, without sorting, in one pass over the sample:
//
// 1. A histogram of a few rows brackets the threshold; it only guesses. How much its blocks differ says how far off the
//    guess may be: activations of pictures differ from place to place.
// 2. The pass takes each block's means and, while its columns are in cache, lists the residuals at or above the
//    bracket's low end (a fifth more than will be kept, as a rule) and sets their mask bits.
// 3. Histograms over the list settle the threshold to the last bit.
// 4. What lies below it leaves the masks and the list, and the list is quantized.
//
// Centered: the pass also adds up the squares of all residuals, for the factor that the kept ones get in `scale`.
//
// If the list is full, what is smaller than the `keep` largest in it leaves it, and the pass goes on. If too few were
// listed, histograms of the whole sample find the threshold, and the pass lists exactly what is kept. A sample is
// packed by one thread, or by several, each with a range of blocks.
#include "razor_pack.h"

#include <cmath>

#include "packed_read.h"

namespace er::ER_ISA {
namespace {

constexpr int kGuessShift = 19;           // bins of the guess: 8 bits of exponent, 4 of mantissa
constexpr int64_t kGuessBlocks = 16;      // it looks at so many blocks
constexpr int64_t kGuessElements = 4096;  // … and at so many elements at least, if there are as many
constexpr double kGuessErrors = 1.5;      // standard errors that the bracket has room for on each side
constexpr int kChunkGroups = 4;           // column groups that are in the first-level cache at once
constexpr int kMaxParts = 64;

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

  // Writes the residuals of the set bits in the order (column, row). Up to kAtOnce − 1 floats beyond may be written.
  static constexpr int kAtOnce = 4;
  void extract(const uint64_t* word, float* out) const {
    const uint64_t last = uint64_t{1} << (rows - 1);  // keeps an empty word inside the block
    int64_t n = 0;
    for (int64_t j = 0; j < cols; j++) {
      const float* column = x + j;
      const float m = mean[j];
      uint64_t w = word[j];
      const int64_t count = __builtin_popcountll(w);
      // Always kAtOnce at a time: most words have fewer bits, and a branch on their number is guessed wrong too often.
      int64_t i = 0;
      do {
        for (int at = 0; at < kAtOnce; at++, w &= w - 1)
          out[n + i + at] = column[__builtin_ctzll(w | last) * stride] - m;
        i += kAtOnce;
      } while (i < count);
      n += count;
    }
  }
  // The same where all bits are set.
  __attribute__((noinline)) void extract_all(float* out) const {
    for (int v = 0; v < kGroupVectors; v++) {
      const VecF m = load(mean + v * kLanes);
      for (int64_t row = 0; row < rows; row += kLanes) {
        VecF square[kLanes];
        for (int64_t i = 0; i < kLanes; i++)
          square[i] = row + i < rows ? load(x + (row + i) * stride + v * kLanes) - m : VecF{};
        transpose(square);
        for (int64_t j = v * kLanes; j < std::min<int64_t>(cols, (v + 1) * kLanes); j++)
          store_upto(out + j * rows + row, square[j - v * kLanes], rows - row);
      }
    }
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
  float* list;          // [list_capacity]: residuals
  int64_t listed;       // beyond the capacity if there were too many
  int64_t above;        // magnitudes over the bracket
  int64_t looked;       // elements in the guess's histogram
  double over, over2;   // Σ and Σ² over the guess's blocks of the elements that the second look counts
  double energy;        // Σ r² of all residuals (centered)
  double kept_energy;   // Σ q² of what is kept, as it is stored
  int32_t largest;
  bool finite;
};

// Which magnitudes are kept: those ≥ `least`, and the first `ties` of those that equal least − 1, which are `tie_bin`
// of the last histogram.
struct Threshold {
  int32_t least = INT_MAX;
  int64_t ties = 0;
  int tie_bin = 0;
};

// Means of columns [c, end) of a block, rows added in order. False if one is not finite.
bool write_means(const Sample& s, int64_t block, int64_t c, int64_t end) {
  constexpr int kWide = 4;  // independent sums hide the latency of the addition
  const int64_t cols = s.at.cols, begin = s.at.row_begin(block), rows = s.at.row_begin(block + 1) - begin;
  const float* x = s.x + begin * cols;
  uint16_t* out = s.mean + block * cols;
  const float length = static_cast<float>(rows);
  VecI largest{};
  int32_t most = 0;
  auto put = [&](int64_t at, VecF total) {
    const VecF mean = total / broadcast(length);
    const VecI m = bits(abs(mean));
    largest = m > largest ? m : largest;
    const VecH h = to_bf16_vector(mean);
    std::memcpy(out + at, &h, sizeof h);
  };
  for (; c + kWide * kLanes <= end; c += kWide * kLanes) {
    VecF total[kWide] = {};
    for (int64_t i = 0; i < rows; i++)
      for (int v = 0; v < kWide; v++) total[v] += load(x + i * cols + c + v * kLanes);
    for (int v = 0; v < kWide; v++) put(c + v * kLanes, total[v]);
  }
  for (; c + kLanes <= end; c += kLanes) {
    VecF total = {};
    for (int64_t i = 0; i < rows; i++) total += load(x + i * cols + c);
    put(c, total);
  }
  for (; c < end; c++) {
    float total = 0;
    for (int64_t i = 0; i < rows; i++) total += x[i * cols + c];
    const float mean = total / length;
    most = std::max(most, magnitude(mean));
    out[c] = to_bf16(mean);
  }
  for (int j = 0; j < kLanes; j++) most = std::max<int32_t>(most, largest[j]);
  return most < kBf16Overflow;
}

// The blocks of a part that the guess looks at.
int64_t guess_blocks(const Part& part, int n_parts) {
  return std::min(part.end - part.begin, (kGuessBlocks + n_parts - 1) / n_parts);
}

// Looks at some rows of some blocks. The first row varies, so that it is not always the same column of an image. The
// first look (`least` = INT_MAX) takes the means, and a histogram of magnitudes; the second one counts at a quarter of
// the rows how many of each block are `least` or more.
__attribute__((noinline)) void look(const Sample& s, int n_parts, int32_t least, Part& part) {
  const bool first = least == INT_MAX;
  if (first) std::fill_n(part.histogram, kBins, 0u);
  part.looked = 0;
  part.over = part.over2 = 0;
  const int64_t blocks = guess_blocks(part, n_parts);
  const int64_t elements = s.at.rows * s.at.cols, wanted = std::max(kGuessElements, elements / 64);
  const int64_t step = std::clamp<int64_t>(elements / s.at.blocks * blocks * n_parts / wanted, 1, 16) * (first ? 1 : 4);
  for (int64_t i = 0; i < blocks; i++) {
    const int64_t b = part.begin + (2 * i + 1) * (part.end - part.begin) / (2 * blocks);
    if (s.mean && first) part.finite &= write_means(s, b, 0, s.at.cols);
    int64_t over = 0;
    for (int64_t g = 0; g < s.at.groups; g++) {
      const Tile tile(s.at, s.x, s.mean, b, g);
      for (int64_t row = (3 * b + 5 * g) % step; row < tile.rows; row += step) {
        if (first)
          for (int64_t j = 0; j < tile.cols; j++) part.histogram[magnitude(tile.residual(row, j)) >> kGuessShift]++;
        else
          for (int64_t j = 0; j < tile.cols; j++) over += magnitude(tile.residual(row, j)) >= least;
        part.looked += tile.cols;
      }
    }
    part.over += static_cast<double>(over), part.over2 += static_cast<double>(over * over);
  }
}

// From the histograms: the bracket of ranks keep − margin and keep + margin among the sample's magnitudes, each of
// which a looked-at one stands for `each`.
__attribute__((noinline)) Bracket guess_bracket(const Part* parts, int n_parts, double each, double keep,
                                                double margin) {
  Bracket bracket;
  bool top_found = false;
  double count = 0;
  for (int bin = kBins - 1; bin >= 0; bin--) {
    for (int p = 0; p < n_parts; p++) count += parts[p].histogram[bin] * each;
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

// Keeps of each column the first `ties` bits of tie[], adds them to word[].
void add_ties(const Tile& tile, int32_t tie_magnitude, int64_t* ties, uint64_t* word) {
  uint64_t tie[kGroupColumns];
  tile.mask(tie, [&](VecI m, int) { return m == tie_magnitude; });
  for (int64_t j = 0; j < tile.cols; j++)
    for (; tie[j] && *ties; tie[j] &= tie[j] - 1, --*ties) word[j] |= tie[j] & -tie[j];
}

void pad_list(Part& part) {  // it is read by vectors
  const int64_t tail = part.listed % kLanes;
  if (tail) std::fill_n(part.list + part.listed, kLanes - tail, 0.f);
}

int32_t make_room(const Sample& s, int64_t groups, int32_t least, Part& part);

// Means, masks and the list of the residuals that are kept by a threshold. Where the list becomes full, `least` grows;
// the pass ends early if that is of no use.
void list_residuals(const Sample& s, int32_t least, int64_t ties, Part& part) {
  const int64_t capacity = list_capacity(s.at) - Tile::kAtOnce;
  part.listed = 0, part.energy = 0;
  for (int64_t b = part.begin; b < part.end; b++)
    for (int64_t chunk = 0; chunk < s.at.groups; chunk += kChunkGroups) {
      const int64_t groups_end = std::min(s.at.groups, chunk + kChunkGroups);
      if (s.mean)
        part.finite &= write_means(s, b, chunk * kGroupColumns, std::min(s.at.cols, groups_end * kGroupColumns));
      VecF squares[kGroupVectors] = {};
      for (int64_t g = chunk; g < groups_end; g++) {
        const Tile tile(s.at, s.x, s.mean, b, g);
        uint64_t word[kGroupColumns];
        const VecI bound = broadcast(least);
        tile.mask(word, [&squares, bound](VecI m, int v) {
          squares[v] += (VecF)m * (VecF)m;
          return m >= bound;
        });
        if (ties) add_ties(tile, least - 1, &ties, word);
        int64_t n = 0;
        for (int64_t j = 0; j < tile.cols; j++) n += __builtin_popcountll(word[j]);
        if (part.listed + n > capacity) least = make_room(s, (b - part.begin) * s.at.groups + g, least, part);
        if (part.listed + n > capacity) {
          part.listed = capacity + 1;
          return;
        }
        std::memcpy(s.mask + b * s.at.cols + g * kGroupColumns, word, tile.cols * sizeof(uint64_t));
        if (n == tile.rows * tile.cols)
          tile.extract_all(part.list + part.listed);
        else
          tile.extract(word, part.list + part.listed);
        part.listed += n;
      }
      for (const VecF& v : squares) part.energy += static_cast<double>(sum(v));
    }
  pad_list(part);
}

// The largest magnitude of the list.
void find_largest(Part& part) {
  VecI largest{};
  for (int64_t i = 0; i < part.listed; i += kLanes) {
    const VecI m = bits(abs(load(part.list + i)));
    largest = m > largest ? m : largest;
  }
  part.largest = 0;
  for (int j = 0; j < kLanes; j++) part.largest = std::max<int32_t>(part.largest, largest[j]);
}

// Histogram of the list's magnitudes inside the bracket, and their number above it.
__attribute__((noinline)) void list_histogram(const Bracket& bracket, Part& part) {
  std::fill_n(part.histogram, kBins, 0u);
  const int shift = bracket.shift();
  VecI above{};
  for (int64_t i = 0; i < part.listed; i += kLanes) {
    const VecI m = bits(abs(load(part.list + i)));
    const VecI over = m > bracket.top;
    above -= over;
    for (uint32_t w = mask_bits((m >= bracket.low) & ~over); w; w &= w - 1)
      part.histogram[(magnitude(part.list[i + __builtin_ctz(w)]) - bracket.low) >> shift]++;
  }
  part.above = 0;
  for (int j = 0; j < kLanes; j++) part.above += above[j];
}

// The same of the whole part.
void data_histogram(const Sample& s, const Bracket& bracket, Part& part) {
  std::fill_n(part.histogram, kBins, 0u);
  const int shift = bracket.shift();
  VecI above[kGroupVectors] = {};
  for (int64_t b = part.begin; b < part.end; b++)
    for (int64_t g = 0; g < s.at.groups; g++) {
      const Tile tile(s.at, s.x, s.mean, b, g);
      uint64_t word[kGroupColumns];
      tile.mask(word, [&](VecI m, int v) {
        const VecI over = m > bracket.top;
        above[v] -= over;
        return (m >= bracket.low) & ~over;
      });
      for (int64_t j = 0; j < tile.cols; j++)
        for (uint64_t w = word[j]; w; w &= w - 1)
          part.histogram[(magnitude(tile.residual(__builtin_ctzll(w), j)) - bracket.low) >> shift]++;
    }
  part.above = 0;
  for (int v = 0; v < kGroupVectors; v++)
    for (int j = 0; j < kLanes; j++) part.above += above[v][j];
}

// Narrows the bracket by the histogram of its inside until the threshold is exact: true, and *threshold.
bool narrow(const Part* parts, int n_parts, int64_t keep, Bracket* bracket, Threshold* threshold) {
  *threshold = {};
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
      *threshold = {least, 0, 0};
      return true;
    }
    if (shift == 0) {
      *threshold = {least + 1, keep - count, bin};
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

// Ties of a part that a threshold keeps if `left` are still to be kept, from the histogram that settled it.
int64_t ties_of(const Part& part, const Threshold& threshold, int64_t left) {
  return left ? std::min<int64_t>(left, part.histogram[threshold.tie_bin]) : 0;
}

// Moves the lanes with set bits to `out` in order and returns their number; nothing beyond them is written.
inline int64_t compress(VecF v, uint32_t keep, float* out) {
#if ER_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const int n = __builtin_popcount(keep);
  store_partial(out, (VecF)_mm512_maskz_compress_ps(static_cast<__mmask16>(keep), (__m512)v), n);
  return n;
#else
  int64_t n = 0;
  for (; keep; keep &= keep - 1) out[n++] = v[__builtin_ctz(keep)];
  return n;
#endif
}

// The set bits of `word` whose turn (lowest first) is set in `keep`.
inline uint64_t deposit(uint64_t keep, uint64_t word) {
#if defined(__BMI2__)
  return _pdep_u64(keep, word);
#else
  uint64_t out = 0;
  for (; word; word &= word - 1, keep >>= 1)
    if (keep & 1) out |= word & -word;
  return out;
#endif
}

// Takes what a threshold does not keep from the list, keeps the first `ties` ties. bits[i / 64] bit i % 64 says whether
// element i of the list was kept, for elements [begin, begin + n). Returns the number kept, moved to `out`, which lies
// at or before list + begin.
int64_t filter(const float* list, int64_t n, const Threshold& threshold, int64_t* ties, float* out, uint64_t* kept) {
  int64_t total = 0;
  std::fill_n(kept, n / 64 + 2, uint64_t{0});
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecF v = load_upto(list + i, n - i);
    const VecI m = bits(abs(v));
    const uint32_t inside = n - i >= kLanes ? UINT32_MAX : (1u << (n - i)) - 1;
    uint32_t keep = mask_bits(m >= threshold.least) & inside;
    if (*ties)
      for (uint32_t w = mask_bits(m == threshold.least - 1) & inside; w && *ties; w &= w - 1, --*ties) keep |= w & -w;
    total += compress(v, keep, out + total);
    kept[i / 64] |= static_cast<uint64_t>(keep) << (i % 64);
  }
  return total;
}

// Brings the part's first `groups` column groups, in the order of the list, down to the threshold.
__attribute__((noinline)) void drop_below(const Sample& s, const Threshold& threshold, int64_t ties, int64_t groups,
                                          Part& part) {
  const float* list = part.list;
  float* out = part.list;
  for (int64_t i = 0; i < groups; i++) {
    const int64_t b = part.begin + i / s.at.groups, g = i % s.at.groups;
    uint64_t* word = s.mask + b * s.at.cols + g * kGroupColumns;
    const int64_t cols = std::min(kGroupColumns, s.at.cols - g * kGroupColumns);
    int64_t n = 0;
    for (int64_t j = 0; j < cols; j++) n += __builtin_popcountll(word[j]);
    uint64_t kept[kBlockRows * kGroupColumns / 64 + 2];
    const int64_t left = filter(list, n, threshold, &ties, out, kept);
    if (left < n) {
      int64_t first = 0;
      for (int64_t j = 0; j < cols; j++) {
        const int64_t count = __builtin_popcountll(word[j]), shift = first % 64;
        uint64_t keep = kept[first / 64] >> shift;
        if (shift) keep |= kept[first / 64 + 1] << (64 - shift);
        word[j] = deposit(keep, word[j]);
        first += count;
      }
    }
    list += n, out += left;
  }
  part.listed = out - part.list;
}

// Drops from a full list of the part's first `groups` column groups what is smaller than the `keep` largest in it, as
// near as the bins of a histogram tell: none of that is among the sample's `keep` largest. Returns the least magnitude
// that is still of interest.
__attribute__((noinline)) int32_t make_room(const Sample& s, int64_t groups, int32_t least, Part& part) {
  pad_list(part);
  const Bracket listed{least, INT_MAX};
  list_histogram(listed, part);
  const int shift = listed.shift();
  int bin = (listed.top - listed.low) >> shift;
  for (int64_t count = part.histogram[bin]; count < s.at.keep && bin > 0; count += part.histogram[bin]) bin--;
  least += bin << shift;
  drop_below(s, {least, 0, 0}, 0, groups, part);
  return least;
}

// Offsets of a part's groups, the first value having index `index` in the sample.
void write_offsets(const Sample& s, int64_t index, const Part& part) {
  for (int64_t b = part.begin; b < part.end; b++)
    for (int64_t g = 0; g < s.at.groups; g++) {
      s.offset[b * s.at.groups + g] = static_cast<uint32_t>(index);
      const uint64_t* word = s.mask + b * s.at.cols;
      for (int64_t c = g * kGroupColumns; c < std::min(s.at.cols, (g + 1) * kGroupColumns); c++)
        index += __builtin_popcountll(word[c]);
    }
}

// int8 = round(residual / scale). Returns Σ int8².
double quantize(const float* residuals, int64_t n, float scale, uint8_t* out) {
  if (scale == 0) {
    std::fill_n(out, n, uint8_t{0});
    return 0;
  }
  constexpr int64_t kExact = 512;  // so many squares of up to 127 add up exactly in a float32
  const VecF magic =
      broadcast(12582912.f);  // 1.5·2^23: its unit in the last place is 1, so adding it rounds to nearest even
  VecF squares{};
  auto rounded = [&](VecF r) {
    const VecF q = min(max(r / broadcast(scale), broadcast(-127.f)), broadcast(127.f)) + magic;
    squares += (q - magic) * (q - magic);
    return narrow_to_bytes(bits(q) - bits(magic));
  };
  double total = 0;
  for (int64_t i = 0; i < n;) {
    squares = VecF{};
    for (const int64_t whole = std::min(n - n % kLanes, i + kExact * kLanes); i < whole; i += kLanes) {
      const VecB b = rounded(load(residuals + i));
      std::memcpy(out + i, &b, sizeof b);
    }
    if (n - i < kLanes) {
      const VecB b = rounded(load_upto(residuals + i, n - i));
      std::memcpy(out + i, &b, n - i);
      i = n;
    }
    total += static_cast<double>(sum(squares));
  }
  return total;
}

// What the kept residuals are multiplied by: Σr² / Σr_kept², so that their product with the sample's residuals is that
// of all of them. As these are the largest, it lies between 1 and residuals / kept ones; where the sums over- or
// underflow float32, it is 1.
float energy_factor(const Part* parts, int n_parts, const PackedLayout& at, float scale) {
  const int64_t elements = at.rows * at.cols;
  double all = 0, kept = 0;
  for (int p = 0; p < n_parts; p++) all += parts[p].energy, kept += parts[p].kept_energy;
  kept *= static_cast<double>(scale) * static_cast<double>(scale);
  const double factor = all / kept;
  if (!at.keep || at.keep == elements || !(factor > 1) || !(all < FLT_MAX)) return 1;
  return static_cast<float>(std::min(factor, static_cast<double>(elements) / static_cast<double>(at.keep)));
}

void round_to_bf16(const float* x, int64_t n, uint8_t* out) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const VecH h = to_bf16_vector(load(x + i));
    std::memcpy(out + 2 * i, &h, 2 * std::min<int64_t>(n - i, kLanes));
  }
}

// Who packs the parts of a sample: the threads of a pool, or the calling one its only part.
struct Packers {
  ThreadPool* pool;
  int n_parts;

  // f(part) for every part.
  template <class F>
  void each(F&& f) const {
    if (!pool) return f(0);
    pool->run([&](int thread) {
      if (thread < n_parts) f(thread);
    });
  }
};

// A bracket that very likely holds the keep-th largest magnitude.
Bracket guess(const Sample& s, Part* parts, const Packers& packers) {
  const int n_parts = packers.n_parts;
  packers.each([&](int p) { look(s, n_parts, INT_MAX, parts[p]); });
  const double elements = static_cast<double>(s.at.rows * s.at.cols), keep = static_cast<double>(s.at.keep);
  auto scale = [&] {  // elements that each of those looked at stands for
    int64_t looked = 0;
    for (int p = 0; p < n_parts; p++) looked += parts[p].looked;
    return looked ? elements / static_cast<double>(looked) : 1;
  };
  const double each = scale();
  int64_t blocks = 0;
  for (int p = 0; p < n_parts; p++) blocks += guess_blocks(parts[p], n_parts);
  double margin = each == 1 ? 0 : keep / 8 + 16 * each;
  if (blocks < s.at.blocks) {
    // How far the number above a threshold may be off by its differences from block to block, beyond those by chance.
    const int32_t middle = guess_bracket(parts, n_parts, each, keep, 0).low;
    packers.each([&](int p) { look(s, n_parts, middle, parts[p]); });
    double sum = 0, squares = 0;
    for (int p = 0; p < n_parts; p++) sum += parts[p].over, squares += parts[p].over2;
    const double n = static_cast<double>(blocks), all = static_cast<double>(s.at.blocks);
    const double variance = squares - sum * sum / n - sum;
    if (variance > 0) margin = std::max(margin, kGuessErrors * scale() * std::sqrt(variance * (1 - n / all)));
  }
  return guess_bracket(parts, n_parts, each, keep, margin);
}

bool pack_parts(const Sample& s, Part* parts, const Packers& packers) {
  const int n_parts = packers.n_parts;
  const int64_t keep = s.at.keep, capacity = list_capacity(s.at) - Tile::kAtOnce;
  const int32_t overflow = s.at.form == kPlain ? kBf16Overflow : kInfinity;
  for (int p = 0; p < n_parts; p++) {
    parts[p].begin = s.at.blocks * p / n_parts, parts[p].end = s.at.blocks * (p + 1) / n_parts;
    parts[p].finite = true;
  }
  auto all_finite = [&] { return std::all_of(parts, parts + n_parts, [](const Part& p) { return p.finite; }); };
  Bracket bracket;
  if (!keep) {
    bracket.low = overflow;  // the pass only looks for what is not finite
  } else if (keep < s.at.rows * s.at.cols) {
    bracket = guess(s, parts, packers);
  }
  packers.each([&](int p) { list_residuals(s, bracket.low, 0, parts[p]); });
  if (!all_finite()) return false;
  int64_t listed = 0;
  bool full = false;
  for (int p = 0; p < n_parts; p++) listed += parts[p].listed, full |= parts[p].listed > capacity;

  Threshold threshold;
  int64_t ties[kMaxParts];  // that each part keeps
  auto share_ties = [&] {
    int64_t left = threshold.ties;
    for (int p = 0; p < n_parts; p++) {
      ties[p] = left;
      left -= ties_of(parts[p], threshold, left);
    }
  };
  const bool guessed = !full && (listed >= keep || bracket.low == 1);
  if (!guessed) {
    if (s.mean) {  // a full list ended the pass early
      packers.each([&](int p) {
        for (int64_t b = parts[p].begin; b < parts[p].end; b++) parts[p].finite &= write_means(s, b, 0, s.at.cols);
      });
      if (!all_finite()) return false;
    }
    bracket = {};
    do {
      packers.each([&](int p) { data_histogram(s, bracket, parts[p]); });
    } while (!narrow(parts, n_parts, keep, &bracket, &threshold));
    share_ties();
    packers.each([&](int p) { list_residuals(s, threshold.least, ties[p], parts[p]); });
  }

  int32_t largest = 0;
  packers.each([&](int p) { find_largest(parts[p]); });
  for (int p = 0; p < n_parts; p++) largest = std::max(largest, parts[p].largest);
  if (largest >= overflow) return false;
  if (guessed && keep && listed > keep) {
    do {
      packers.each([&](int p) { list_histogram(bracket, parts[p]); });
    } while (!narrow(parts, n_parts, keep, &bracket, &threshold));
    share_ties();
    packers.each(
        [&](int p) { drop_below(s, threshold, ties[p], (parts[p].end - parts[p].begin) * s.at.groups, parts[p]); });
  }

  float scale = 0;
  std::memcpy(&scale, &largest, sizeof scale);
  scale /= 127;
  packers.each([&](int p) {
    int64_t index = 0;  // a part's values begin where those of the parts before it end
    for (int before = 0; before < p; before++) index += parts[before].listed;
    write_offsets(s, index, parts[p]);
    if (s.at.form == kCentered)
      parts[p].kept_energy = quantize(parts[p].list, parts[p].listed, scale, s.value + index);
    else
      round_to_bf16(parts[p].list, parts[p].listed, s.value + 2 * index);
  });
  if (s.scale) *s.scale = scale * energy_factor(parts, n_parts, s.at, scale);
  return true;
}

}  // namespace

bool pack_sample(const Sample& sample, const PackScratch& scratch) {
  Part part{};
  part.histogram = scratch.histogram, part.list = scratch.list;
  return pack_parts(sample, &part, {nullptr, 1});
}

bool pack_sample_shared(const Sample& sample, void* scratch, ThreadPool* pool) {
  Part parts[kMaxParts] = {};
  const int n_parts = std::min(pool->threads(), kMaxParts);
  for (int p = 0; p < n_parts; p++) {
    const PackScratch own = pack_scratch_of(sample.at, scratch, p);
    parts[p].histogram = own.histogram, parts[p].list = own.list;
  }
  return pack_parts(sample, parts, {pool, n_parts});
}

}  // namespace er::ER_ISA
