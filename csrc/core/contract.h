// The order of arithmetic: what every kernel family, and the Python side, must agree on.
//
// A row is one query of one head of one sequence. Its result is a function of the row's own visible
// keys and of the constants below. Every function here takes properties of one row or of one
// sequence, and nothing else: a launch's extent, its neighbours and its hardware cannot be passed
// in, so they cannot reach a bit.
//
//   Blocks: N consecutive keys (per family, below). The online softmax moves its reference at most
//   once a block, and then to the largest score: a row that sees one key has a probability of 1.
//
//   Segments: the keys between two neighbours of a fixed, growing ladder of boundaries; the unit
//   that may run elsewhere.
//
//   Closing: where a row's keys lie in several segments, the reference of each becomes an integer
//   at the segment's end. A row whose keys lie in one segment keeps its reference: nothing is
//   folded, and nothing is multiplied.
//
//   Fold: closed segments are added in ascending order, each with a fused multiply-add by an exact
//   power of two: one rounding a fold.
//
// Key positions count from the sequence's own first key (after left padding).
// Everything is `static inline`: the file is compiled under several instruction sets and must never
// be merged.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "csrc/core/host_device.h"

namespace fa::contract {

// Keys a block, for every head dim and dtype.
static constexpr int64_t kCpuBlockKeys = 64;
static constexpr int64_t kSm80BlockKeys = 64;
// Queries a block of the CPU family's dK and dV, counted from the sequence's first query.
static constexpr int64_t kCpuBlockQueries = 96;
// In the CPU family a row's reference follows the largest score. In the sm80 family a block whose
// largest score lies above the reference moves it: to that score, so that its probability is 1; but
// where the block is flat, to kSm80Slack above the next integer, so that the reference seldom moves
// again. Where few keys carry a row, the rounding error of the largest probability goes straight
// into the output, and 1 has none; where many do, their errors cancel.
//
// A block is flat when each class of its keys has a score within kSm80Near (log2 units) of the
// largest one.
static constexpr float kSm80Slack = 4.0f;
static constexpr float kSm80Near = 4.0f;
// Classes of a block's keys: key % 8 / 2. They are what the four threads that share a row of the
// tensor cores' results have of it.
static constexpr int kNumKeyClasses = 4;

// How far above the fold's reference that of a segment may lie before the fold's moves to it, in
// every family.
static constexpr float kFoldSlack = 8.0f;

// A ladder says where segments begin. Short segments give a short context its parallelism, long
// ones keep a long context's folds few. Each family has its own.
struct Rung {
  int64_t first_key;      // where this extent starts to apply
  int64_t extent;         // keys a segment, a multiple of every family's block
  int64_t first_segment;  // number of segments below first_key
};
static constexpr int kNumRungs = 3;

struct CpuLadder {
  FA_MEMBER static constexpr Rung rung(int r) {
    return r == 0 ? Rung{0, 512, 0} : r == 1 ? Rung{16384, 1024, 32} : Rung{65536, 4096, 32 + 48};
  }
};
struct Sm80Ladder {
  FA_MEMBER static constexpr Rung rung(int r) {
    return r == 0 ? Rung{0, 1024, 0} : r == 1 ? Rung{16384, 2048, 16} : Rung{65536, 4096, 16 + 24};
  }
};

template <class Ladder>
static constexpr bool ladder_is_consistent() {
  for (int r = 0; r + 1 < kNumRungs; ++r) {
    Rung const here = Ladder::rung(r), above = Ladder::rung(r + 1);
    int64_t const span = above.first_key - here.first_key;
    if (span % here.extent != 0) return false;
    if (here.first_segment + span / here.extent != above.first_segment) return false;
  }
  return true;
}
static_assert(ladder_is_consistent<CpuLadder>() && ladder_is_consistent<Sm80Ladder>(),
              "each rung must start where the one below it ends, on a boundary");

// First key of segment `segment`; segment s covers [segment_begin(s), segment_begin(s + 1)).
template <class Ladder>
FA_HOST_DEVICE static inline int64_t segment_begin(int64_t segment) {
  int64_t begin = segment * Ladder::rung(0).extent;
  for (int r = 1; r < kNumRungs; ++r) {
    int64_t const above = segment - Ladder::rung(r).first_segment;
    if (above >= 0) begin = Ladder::rung(r).first_key + above * Ladder::rung(r).extent;
  }
  return begin;
}

// The segment that holds key `key`. Each quotient is by a constant: a shift.
template <class Ladder>
FA_HOST_DEVICE static inline int64_t segment_of(int64_t key) {
  static_assert(kNumRungs == 3);
  constexpr Rung low = Ladder::rung(0), middle = Ladder::rung(1), high = Ladder::rung(2);
  if (key < middle.first_key) return key / low.extent;
  if (key < high.first_key) return middle.first_segment + (key - middle.first_key) / middle.extent;
  return high.first_segment + (key - high.first_key) / high.extent;
}

struct KeyRange {
  int64_t begin, end;  // half open; empty when begin >= end
};

// Whether a row that sees these keys is closed at the end of a segment [segment_begin,
// segment_end).
FA_HOST_DEVICE static inline bool closes(KeyRange seen, int64_t segment_begin,
                                         int64_t segment_end) {
  return seen.begin < segment_begin || seen.end > segment_end;
}

// A row that is NaN has one NaN, whatever instruction made it.
FA_HOST_DEVICE static inline float canonical_nan() {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  return kNan;
}

// The visible set of query `query` of s_q: the mask is aligned to the bottom right, so that the
// last query sees the last key. A negative left or right is unlimited; causal is right = 0.
FA_HOST_DEVICE static inline KeyRange visible_keys(int64_t query, int64_t s_q, int64_t s_k,
                                                   int64_t left, int64_t right) {
  int64_t const diagonal = query + s_k - s_q;
  KeyRange range{0, s_k};
  if (left >= 0 && diagonal - left > 0) range.begin = diagonal - left;
  if (right >= 0 && diagonal + right + 1 < s_k) range.end = diagonal + right + 1;
  if (range.begin > s_k) range.begin = s_k;
  if (range.end < range.begin) range.end = range.begin;
  return range;
}

// The queries that see any key of [key_begin, key_end), the inverse of visible_keys; a half-open
// range of [0, s_q).
FA_HOST_DEVICE static inline KeyRange seeing_queries(int64_t key_begin, int64_t key_end,
                                                     int64_t s_q, int64_t s_k, int64_t left,
                                                     int64_t right) {
  int64_t const offset = s_k - s_q;
  KeyRange range{0, s_q};
  if (right >= 0 && key_begin - offset - right > 0) range.begin = key_begin - offset - right;
  if (left >= 0 && key_end - offset + left < s_q) range.end = key_end - offset + left;
  if (range.begin > s_q) range.begin = s_q;
  if (range.end < range.begin) range.end = range.begin;
  return range;
}

// 2^exponent for -126 <= exponent <= 127, exact.
FA_HOST_DEVICE static inline float power_of_two(int exponent) {
  uint32_t const bits = static_cast<uint32_t>(exponent + 127) << 23;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// fold' = fma(part, 2^(part_reference - common), fold 2^(reference - common)), the sums likewise.
//
// The fold's reference stays, unless that of a part lies well above it: then the fold is
// multiplied.
FA_HOST_DEVICE static inline float fold_reference(float reference, float part_reference) {
  return part_reference > reference + kFoldSlack ? part_reference : reference;
}

// The weight 2^(reference - common). Both are the same or integers (or -inf for "saw nothing", NaN
// for "is NaN already"), `reference` at most kFoldSlack above; anything 2^126 and more below counts
// as nothing.
FA_HOST_DEVICE static inline float fold_weight(float reference, float common) {
  float const difference = reference - common;
  return difference >= -126.0f ? power_of_two(static_cast<int>(difference)) : 0.0f;
}

// log2(x) for x >= 0, in double, from additions, products and one quotient that are each rounded on
// their own, so that PyTorch's elementwise float64 arithmetic repeats it to the bit. Series of
// atanh in (f - 1) / (f + 1) with sqrt(1/2) <= f < sqrt(2): |argument| < 0.1716, and twelve terms
// leave less than 1e-19.
FA_HOST_DEVICE static inline double log2_of(double x) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (!(x > 0.0)) return x == 0.0 ? -kInfinity : x;
  if (x == kInfinity) return x;
  int exponent;
  double f = std::frexp(x, &exponent);  // [1/2, 1)
  if (f < 0.70710678118654752440) {
    f = f * 2.0;
    exponent -= 1;
  }
  double const s = (f - 1.0) / (f + 1.0);
  double const s2 = s * s;
  double sum = 0.0;
  for (int odd = 23; odd >= 1; odd -= 2) sum = sum * s2 + 1.0 / odd;
  return static_cast<double>(exponent) + (s * sum) * 2.88539008177792681472;  // 2 / ln 2
}

// What a finished row is multiplied by; a row that saw nothing is zero already.
FA_HOST_DEVICE static inline float inverse_of_sum(float sum) {
  return sum == 0.0f ? 1.0f : 1.0f / sum;
}

// Natural log-sum-exp of a finished row: `reference` in log2 units, `sum` relative to it. A row
// that saw nothing has +inf, so that exp(score - lse) is zero in the backward pass.
FA_HOST_DEVICE static inline float log_sum_exp(float reference, float sum) {
  if (sum != sum) return canonical_nan();
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  if (reference == -kInfinity) return kInfinity;
  double const log2_sum = static_cast<double>(reference) + log2_of(static_cast<double>(sum));
  return static_cast<float>(log2_sum * 0.69314718055994530942);
}

}  // namespace fa::contract
