// The k-th largest magnitude of a sample: a guess from some of its rows, then the exact one.
#pragma once
#include "razor_parts.h"

namespace er::ER_ISA {

// The bracket [low, top] in which the k-th largest magnitude is sought, in bins of 2^shift.
struct Bracket {
  int32_t low = 1, top = INT_MAX;
  int shift() const {
    int s = 0;
    while ((top - low) >> s >= kBins) s++;
    return s;
  }
};

// Which magnitudes are kept: those ≥ `least`, and the first `ties` of those that equal least − 1, which are `tie_bin`
// of the last histogram.
struct Threshold {
  int32_t least = INT_MAX;
  int64_t ties = 0;
  int tie_bin = 0;
};

// A bracket that very likely holds the keep-th largest magnitude. Takes the means of some blocks.
Bracket guess(const Sample& s, Part* parts, const Packers& packers);

// The i-th of the blocks of a part that the guess looks at.
inline int64_t guess_block(const Part& part, int64_t blocks, int64_t i) {
  return part.begin + (2 * i + 1) * (part.end - part.begin) / (2 * blocks);
}

// Histogram of the list's magnitudes inside the bracket, and their number above it: of each `step`-th vector.
void list_histogram(const Bracket& bracket, int64_t step, Part& part);
// Narrows the bracket to where an eighth of the lists, which hold `listed` elements, says that the threshold is. It may
// be wrong: narrow() finds that out.
void narrow_by_some(Part* parts, const Packers& packers, int64_t listed, int64_t keep, Bracket* bracket);
// Copies the list's magnitudes inside the bracket behind the list, if there is room: histograms of the bracket and of
// what it is narrowed to then read those alone.
void copy_among(const Sample& s, const Bracket& bracket, Part& part);
// Histogram of the whole part.
void data_histogram(const Sample& s, const Bracket& bracket, Part& part);

// Narrows the bracket by the histogram of its inside until the threshold is exact: true, and *threshold.
bool narrow(const Part* parts, int n_parts, int64_t keep, Bracket* bracket, Threshold* threshold);

// The highest of the bins up to `bin` at which there are `wanted` elements or more in it, above it and in *count, to
// which those above it are added; −1 if there are fewer.
int find_bin(const Part* parts, int n_parts, int bin, int64_t wanted, int64_t* count);

}  // namespace er::ER_ISA
