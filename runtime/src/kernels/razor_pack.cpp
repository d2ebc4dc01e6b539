// Packing finds the k-th largest magnitude of a sample exactly, without sorting, in one pass over the sample:
//
// 1. A histogram of a few rows brackets the threshold; it only guesses (razor_threshold.cpp). How much its blocks
//    differ says how far off the guess may be: activations of pictures differ from place to place.
// 2. The pass takes each block's means and, while its columns are in cache, lists the residuals at or above the
//    bracket's low end (a fifth more than will be kept, as a rule) and sets their mask bits.
// 3. Histograms over the list, first over an eighth of it, settle the threshold to the last bit.
// 4. What lies below it leaves the masks and the list, and the list is quantized.
//
// Centered: the pass also adds up the squares of all residuals, for the factor that the kept ones get in `scale`.
//
// If the list is full, what is smaller than the `keep` largest in it leaves it, and the pass goes on. If too few were
// listed, histograms of the whole sample find the threshold, and the pass lists exactly what is kept. A sample is
// packed by one thread, or by several, each with a range of blocks.
#include "razor_pack.h"

#include <cmath>

#include "razor_threshold.h"

namespace er::ER_ISA {
namespace {

constexpr int kMaxParts = 64;
constexpr int64_t kMeanColumns = 256;  // that are added up at once
constexpr int64_t kChunkGroups = 12;   // column groups, at most, that are in the first-level cache at once

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
  const int64_t capacity = list_capacity(s.at) - Tile::kBeyond;
  const RowSteps step(s.row), padded_step(kGroupColumns);
  const int64_t chunks = (s.at.groups + kChunkGroups - 1) / kChunkGroups;
  const int64_t chunk_groups = (s.at.groups + chunks - 1) / chunks;
  part.listed = 0, part.energy = 0;
  int64_t guessed = 0;
  for (int64_t b = part.begin; b < part.end; b++) {
    const Block block(s.at, b);
    const float* block_x = s.x + block.begin * s.row;
    bool means = s.mean && !part.all_means;
    if (guessed < part.guess_blocks && b == guess_block(part, part.guess_blocks, guessed)) guessed++, means = false;
    for (int64_t chunk = 0; chunk < s.at.groups; chunk += chunk_groups) {
      const int64_t groups_end = std::min(s.at.groups, chunk + chunk_groups);
      if (means)
        part.finite &= write_means(s, block, chunk * kGroupColumns, std::min(s.at.cols, groups_end * kGroupColumns));
      const bool last = groups_end == s.at.groups;
      const int64_t lines = std::min(chunk_groups, s.at.groups - (last ? 0 : groups_end));
      Fetch fetch{block_x + (last ? block.rows * s.row : groups_end * kGroupColumns), s.row - lines * kGroupColumns, 0,
                  lines};
      VecF squares[kGroupVectors] = {};
      for (int64_t g = chunk; g < groups_end; g++) {
        const Tile tile(s, s.mean, block, g);
        uint64_t word[kGroupColumns];
        tile.mask_from(least, word, squares, fetch);
        if (ties) add_ties(tile, least - 1, &ties, word);
        int64_t n = 0;
        for (int64_t j = 0; j < tile.cols; j++) n += __builtin_popcountll(word[j]);
        if (part.listed + n > capacity) least = make_room(s, (b - part.begin) * s.at.groups + g, least, part);
        if (part.listed + n > capacity) {
          part.listed = capacity + 1;
          return;
        }
        std::memcpy(s.mask + b * s.at.cols + g * kGroupColumns, word, tile.cols * sizeof(uint64_t));
        tile.extract(word, n, tile.stride == kGroupColumns ? padded_step : step, part.list + part.listed);
        s.offset[b * s.at.groups + g] = static_cast<uint32_t>(n);  // until the list is final
        part.listed += n;
      }
      for (const VecF& v : squares) part.energy += static_cast<double>(sum(v));
    }
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

// Ties of a part that a threshold keeps if `left` are still to be kept, from the histogram that settled it.
int64_t ties_of(const Part& part, const Threshold& threshold, int64_t left) {
  return left ? std::min<int64_t>(left, part.histogram[threshold.tie_bin]) : 0;
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

// What filter() says of a piece of the list.
struct Kept {
  static constexpr int64_t kGroup = kBlockRows * kGroupColumns;
  static constexpr int64_t kMost = 4 * kGroup;  // elements of a piece
  uint64_t bits[kMost / 64 + 1];                // bit i % 64 of bits[i / 64]: whether element i was kept; then zeros
  uint32_t before[kMost / 64 + 1];              // kept elements before those of a word
  // Of the elements before the i-th.
  uint32_t number(int64_t i) const {
    return before[i / 64] + static_cast<uint32_t>(__builtin_popcountll(bits[i / 64] & ((uint64_t{1} << (i % 64)) - 1)));
  }
  // Of element i and the 56 after it, from bit 0 on.
  uint64_t from(int64_t i) const {
    uint64_t word;
    std::memcpy(&word, reinterpret_cast<const uint8_t*>(bits) + i / 8, sizeof word);
    return word >> (i % 8);
  }
};

// Takes what a threshold does not keep from `n` elements of the list, keeps the first `ties` ties. Returns the number
// kept, moved to `out`, which lies at or before them.
int64_t filter(const float* list, int64_t n, const Threshold& threshold, int64_t* ties, float* out, Kept* kept) {
  int64_t total = 0;
  for (int64_t first = 0; first < n; first += 64) {
    uint64_t word = 0;
    kept->before[first / 64] = static_cast<uint32_t>(total);
    for (int64_t i = first; i < std::min(n, first + 64); i += kLanes) {
      const VecF v = load_upto(list + i, n - i);
      const VecI m = bits(abs(v));
      const uint32_t inside = n - i >= kLanes ? UINT32_MAX : (1u << (n - i)) - 1;
      uint32_t keep = bits_from(m, threshold.least) & inside;
      if (*ties)
        for (uint32_t w = mask_bits(m == threshold.least - 1) & inside; w && *ties; w &= w - 1, --*ties) keep |= w & -w;
      total += compress(v, keep, out + total);
      word |= static_cast<uint64_t>(keep) << (i % 64);
    }
    kept->bits[first / 64] = word;
  }
  kept->bits[(n + 63) / 64] = 0, kept->before[(n + 63) / 64] = static_cast<uint32_t>(total);
  return total;
}

// Of the set bits of word[columns], column after column, leaves those whose element was kept, the first one's being
// `first`. Returns the element after the last one's.
inline int64_t drop_bits(const Kept& kept, int64_t first, int64_t columns, uint64_t* word) {
  for (int64_t j = 0; j < columns; j++) {
    const uint64_t w = word[j];
    const int count = __builtin_popcountll(w);
    uint64_t turn = kept.from(first);
    if (count > 56) turn = (turn & ((uint64_t{1} << 32) - 1)) | kept.from(first + 32) << 32;
    word[j] = deposit(turn, w);
    first += count;
  }
  return first;
}

// Brings the part's first `groups` column groups, in the order of the list, down to the threshold. Many groups at once:
// no branch depends on how many values one of them has.
__attribute__((noinline)) void drop_below(const Sample& s, const Threshold& threshold, int64_t ties, int64_t groups,
                                          Part& part) {
  const float* list = part.list;
  float* out = part.list;
  uint32_t* number = s.offset + part.begin * s.at.groups;
  uint64_t* word = s.mask + part.begin * s.at.cols;
  int64_t g = 0;
  for (int64_t i = 0; i < groups;) {
    int64_t n = 0, end = i;
    while (end < groups && n <= Kept::kMost - Kept::kGroup) n += number[end++];
    Kept kept;
    out += filter(list, n, threshold, &ties, out, &kept);
    list += n;
    uint32_t before = 0;
    for (int64_t first = 0; i < end; i++) {
      const int64_t columns = std::min(kGroupColumns, s.at.cols - g * kGroupColumns);
      if (columns == kGroupColumns)
        first = drop_bits(kept, first, kGroupColumns, word);
      else
        first = drop_bits(kept, first, columns, word);
      const uint32_t after = kept.number(first);
      number[i] = after - before, before = after;
      word += columns;
      if (++g == s.at.groups) g = 0;
    }
  }
  part.listed = out - part.list;
}

// Drops from a full list of the part's first `groups` column groups what is smaller than the `keep` largest in it, as
// near as the bins of a histogram tell: none of that is among the sample's `keep` largest. Returns the least magnitude
// that is still of interest.
__attribute__((noinline)) int32_t make_room(const Sample& s, int64_t groups, int32_t least, Part& part) {
  pad_list(part);
  const Bracket listed{least, INT_MAX};
  list_histogram(listed, 1, part);
  const int shift = listed.shift();
  int64_t count = 0;
  least += std::max(0, find_bin(&part, 1, (listed.top - listed.low) >> shift, s.at.keep, &count)) << shift;
  drop_below(s, {least, 0, 0}, 0, groups, part);
  return least;
}

// From the numbers of values of a part's groups, their offsets, the first value having index `index` in the sample.
void write_offsets(const Sample& s, int64_t index, const Part& part) {
  for (int64_t i = part.begin * s.at.groups; i < part.end * s.at.groups; i++) {
    const uint32_t number = s.offset[i];
    s.offset[i] = static_cast<uint32_t>(index);
    index += number;
  }
}

// int8 = round(residual / scale). Returns Σ int8².
double quantize(const float* residuals, int64_t n, float scale, uint8_t* out) {
  if (scale == 0) {
    std::fill_n(out, n, uint8_t{0});
    return 0;
  }
  constexpr int64_t kExact = 1024;  // so many squares of up to 127 add up exactly in a float32
  const VecF magic =
      broadcast(12582912.f);  // 1.5·2^23: its unit in the last place is 1, so adding it rounds to nearest even
  // A product with the reciprocal takes a fraction of a division's time and rounds alike unless it is near the middle
  // of two integers: it is off by less than 127·2^-22.
  constexpr float kNearMiddle = 0.4999f;
  const bool reciprocal = scale > 0x1p-100f;
  const VecF inverse = broadcast(1 / scale);
  VecF squares{};
  auto rounded = [&](VecF r) {
    VecF product = r * inverse, q = product + magic;
    if (!reciprocal || mask_bits(abs(product - (q - magic)) > kNearMiddle))
      q = min(max(r / broadcast(scale), broadcast(-127.f)), broadcast(127.f)) + magic;
    squares += (q - magic) * (q - magic);
    return narrow_to_bytes(bits(q) - bits(magic));
  };
  double total = 0;
  for (int64_t i = 0; i < n;) {
    squares = VecF{};
    for (const int64_t whole = std::min(n - n % kLanes, i + kExact); i < whole; i += kLanes) {
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

bool pack_parts(const Sample& s, Part* parts, const Packers& packers) {
  const int n_parts = packers.n_parts;
  const int64_t keep = s.at.keep, capacity = list_capacity(s.at) - Tile::kBeyond;
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
        for (int64_t b = parts[p].begin; b < parts[p].end; b++)
          parts[p].finite &= write_means(s, Block(s.at, b), 0, s.at.cols);
        parts[p].all_means = true;
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
    narrow_by_some(parts, packers, listed, keep, &bracket);
    packers.each([&](int p) { copy_among(s, bracket, parts[p]); });
    do {
      packers.each([&](int p) { list_histogram(bracket, 1, parts[p]); });
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

bool write_means(const Sample& s, const Block& block, int64_t c, int64_t end) noexcept {
  constexpr int64_t kRows = 8;  // at once, so that memory is read in its order, in a few streams
  const int64_t rows = block.rows;
  const float* x = s.x + block.begin * s.row;
  uint16_t* out = s.mean + block.index * s.at.cols;
  const float length = static_cast<float>(rows);
  float totals[kMeanColumns];
  VecI largest{};
  auto put = [&](int64_t at, VecF total, int64_t count) {
    const VecF mean = total / broadcast(length);
    const VecI m = bits(abs(mean));
    largest = m > largest ? m : largest;
    const VecH h = to_bf16_vector(mean);
    std::memcpy(out + at, &h, static_cast<size_t>(count) * sizeof *out);
  };
  while (c + kLanes <= end) {
    const int64_t n = std::min(kMeanColumns, end - c) / kLanes * kLanes;
    for (int64_t row = 0; row < rows; row += kRows) {
      const float* in = x + row * s.row + c;
      const int64_t count = std::min(kRows, rows - row);
      for (int64_t j = 0; j < n; j += kLanes) {
        VecF total = row ? load(totals + j) : VecF{};
        if (count == kRows)
          for (int64_t i = 0; i < kRows; i++) total += load(in + i * s.row + j);
        else
          for (int64_t i = 0; i < count; i++) total += load(in + i * s.row + j);
        store(totals + j, total);
      }
    }
    for (int64_t j = 0; j < n; j += kLanes) put(c + j, load(totals + j), kLanes);
    c += n;
  }
  if (c < end) {
    const int count = static_cast<int>(end - c);
    VecF total{};
    for (int64_t i = 0; i < rows; i++) total += load_partial(x + i * s.row + c, count);
    put(c, total, count);
  }
  int32_t most = 0;
  for (int j = 0; j < kLanes; j++) most = std::max<int32_t>(most, largest[j]);
  return most < kBf16Overflow;
}

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