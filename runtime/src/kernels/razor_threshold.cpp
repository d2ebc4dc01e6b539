#include "razor_threshold.h"

#include <cmath>

namespace er::ER_ISA {
namespace {

constexpr int kGuessShift = 19;           // bins of the guess: 8 bits of exponent, 4 of mantissa
constexpr int64_t kGuessBlocks = 16;      // it looks at so many blocks
constexpr int64_t kGuessElements = 2048;  // … and at so many elements at least, if there are as many
constexpr double kGuessErrors = 1.5;      // standard errors that the bracket has room for on each side

// The number of a part's blocks that the guess looks at.
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
  const int64_t step = std::clamp<int64_t>(elements / s.at.blocks * blocks * n_parts / wanted, 1, 32) * (first ? 1 : 4);
  for (int64_t i = 0; i < blocks; i++) {
    const Block block(s.at, guess_block(part, blocks, i));
    if (s.mean && first) part.finite &= write_means(s, block, 0, s.at.cols);
    VecI over{};
    const bool more = first && i + 1 < blocks;
    Fetch fetch{s.x + Block(s.at, more ? guess_block(part, blocks, i + 1) : 0).begin * s.row,
                s.row - s.at.groups * kGroupColumns, 0, s.at.groups};
    for (int64_t g = 0; g < s.at.groups; g++) {
      const Tile tile(s, s.mean, block, g);
      for (int64_t row = (3 * block.index + 5 * g) % step; row < tile.rows; row += step) {
        int32_t bin[kGroupColumns];
        for (int64_t j = 0; j < kGroupColumns; j += kLanes) {
          const VecI m = bits(abs(load(tile.x + row * tile.stride + j) - load(tile.mean + j)));
          over -= m >= least;  // zeros behind the last column are not
          store(reinterpret_cast<float*>(bin + j), (VecF)(m >> kGuessShift));
        }
        if (first)  // zeros behind the last column are in the lowest bin, where no bracket ends
          for (int64_t j = 0; j < kGroupColumns; j++) part.histogram[bin[j]]++;
        if (more)
          for (int64_t j = 0; j < step; j++) fetch();
        part.looked += tile.cols;
      }
    }
    const double number = total(over);
    part.over += number, part.over2 += number * number;
  }
  if (first) part.guess_blocks = blocks;
}

// From the histograms: the bracket of ranks keep − margin and keep + margin among the sample's magnitudes, each of
// which a looked-at one stands for `each`.
Bracket guess_bracket(const Part* parts, int n_parts, double each, double keep, double margin) {
  int64_t count = 0;
  const int top = find_bin(parts, n_parts, kBins - 1, std::llround((keep - margin) / each), &count);
  const int low = find_bin(parts, n_parts, top, std::llround((keep + margin) / each), &count);
  Bracket bracket;
  if (top >= 0 && top < kBins - 1) bracket.top = ((top + 1) << kGuessShift) - 1;
  if (low >= 0) bracket.low = std::max(1, low << kGuessShift);
  return bracket;
}

}  // namespace

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

int find_bin(const Part* parts, int n_parts, int bin, int64_t wanted, int64_t* count) {
  constexpr int kStep = 128;  // at once, where they are not enough
  while (bin >= 0) {
    if ((bin + 1) % kStep == 0) {
      VecI sums{};
      for (int p = 0; p < n_parts; p++)
        for (int i = bin + 1 - kStep; i < bin; i += kLanes)
          sums += bits(load(reinterpret_cast<const float*>(parts[p].histogram + i)));
      const int64_t here = total(sums);
      if (*count + here < wanted) {
        *count += here, bin -= kStep;
        continue;
      }
    }
    int64_t here = 0;
    for (int p = 0; p < n_parts; p++) here += parts[p].histogram[bin];
    if (*count + here >= wanted) return bin;
    *count += here, bin--;
  }
  return -1;
}

void list_histogram(const Bracket& bracket, int64_t step, Part& part) {
  std::fill_n(part.histogram, kBins, 0u);
  const int shift = bracket.shift();
  constexpr int64_t kChunk = 512;  // bins that are counted at once
  float bin[kChunk + kLanes];
  const bool some = bracket.low >= part.among.low && bracket.top <= part.among.top;
  const float* list = some ? part.among.list : part.list;
  const int64_t listed = some ? part.among.listed : part.listed;
  part.above = some ? part.among.above : 0;
  for (int64_t i = 0; i < listed;) {
    int64_t n = 0;
    for (; i < listed && n <= kChunk; i += step * kLanes) {
      const VecI m = bits(abs(load(list + i)));
      const uint32_t over = bits_above(m, bracket.top), inside = bits_from(m, bracket.low) & ~over;
      part.above += __builtin_popcount(over);
      if (inside) n += compress((VecF)((m - bracket.low) >> shift), inside, bin + n);
    }
    for (int64_t j = 0; j < n; j++) part.histogram[magnitude(bin[j])]++;
  }
}

void copy_among(const Sample& s, const Bracket& bracket, Part& part) {
  const int64_t begin = (part.listed + kLanes - 1) / kLanes * kLanes, room = list_capacity(s.at) - kLanes - begin;
  float* out = part.list + begin;
  int64_t n = 0, above = 0;
  for (int64_t i = 0; i < part.listed; i += kLanes) {
    if (n > room) return;
    const VecF v = load(part.list + i);
    const VecI m = bits(abs(v));
    const uint32_t over = bits_above(m, bracket.top);
    above += __builtin_popcount(over);
    n += compress(v, bits_from(m, bracket.low) & ~over, out + n);
  }
  if (n > room) return;
  std::fill_n(out + n, kLanes, 0.f);
  part.among = {bracket.low, bracket.top, out, n, above};
}

void narrow_by_some(Part* parts, const Packers& packers, int64_t listed, int64_t keep, Bracket* bracket) {
  constexpr int64_t kStep = 8;           // so many vectors of a list apart
  constexpr int64_t kWorthIt = 8192;     // elements listed
  constexpr double kStandardErrors = 4;  // of the rank
  if (listed < kWorthIt) return;
  packers.each([&](int p) { list_histogram(*bracket, kStep, parts[p]); });
  const double rank = static_cast<double>(keep) / kStep, part = static_cast<double>(keep) / static_cast<double>(listed);
  const double margin = kStandardErrors * std::sqrt(rank * (1 - part)) + 2 * kLanes;
  int64_t count = 0;
  for (int p = 0; p < packers.n_parts; p++) count += parts[p].above;
  const int shift = bracket->shift(), bins = (bracket->top - bracket->low) >> shift;
  const int top = find_bin(parts, packers.n_parts, bins, std::llround(rank - margin), &count);
  const int low = find_bin(parts, packers.n_parts, top, std::llround(rank + margin), &count);
  if (top >= 0 && top < bins) bracket->top = bracket->low + ((top + 1) << shift) - 1;
  if (low >= 0) bracket->low += low << shift;
}

void data_histogram(const Sample& s, const Bracket& bracket, Part& part) {
  std::fill_n(part.histogram, kBins, 0u);
  const int shift = bracket.shift();
  VecI above[kGroupVectors] = {};
  for (int64_t b = part.begin; b < part.end; b++)
    for (int64_t g = 0; g < s.at.groups; g++) {
      const Tile tile(s, s.mean, Block(s.at, b), g);
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
  for (const VecI& v : above) part.above += total(v);
}

bool narrow(const Part* parts, int n_parts, int64_t keep, Bracket* bracket, Threshold* threshold) {
  *threshold = {};
  int64_t count = 0;
  for (int p = 0; p < n_parts; p++) count += parts[p].above;
  if (count > keep) {
    *bracket = {bracket->top + 1, INT_MAX};
    return false;
  }
  const int shift = bracket->shift();
  const int bin = find_bin(parts, n_parts, (bracket->top - bracket->low) >> shift, keep, &count);
  if (bin >= 0) {
    const int32_t least = bracket->low + (bin << shift);
    int64_t here = 0;
    for (int p = 0; p < n_parts; p++) here += parts[p].histogram[bin];
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

}  // namespace er::ER_ISA
