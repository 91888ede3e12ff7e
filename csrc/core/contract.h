// The order of arithmetic: what all kernels, and the Python side, must agree on.
//
// There are two contracts: one for the CPU, whatever its instruction set, and one for GPUs,
// whatever kernels run. `CpuOrder` and `GpuOrder` hold all that the two do not share.
//
// A row is one query of one head of one sequence. Its result is a function of the row's own visible
// keys and of the constants below. Every function here takes properties of one row or of one
// sequence, and nothing else: a launch's extent, its neighbours and its hardware cannot be passed
// in, so they cannot reach a bit.
//
//   Blocks: kBlockKeys consecutive keys. The online softmax moves its reference at most once a
//   block, and then to the largest score: a row that sees one key has a probability of 1.
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

// A ladder says where segments begin. Short segments give a short context its parallelism, long
// ones keep a long context's folds few.
struct Rung {
  int64_t first_key;      // where this extent starts to apply
  int64_t extent;         // keys a segment, a multiple of the block
  int64_t first_segment;  // number of segments below first_key
};
static constexpr int kNumRungs = 3;

// The order of the sums in a backward pass.
struct GradientOrder {
  // dQ of a query: keys that are summed by themselves, from zero; the parts are added in ascending
  // order. 0: one sum over all keys, ascending.
  int64_t part_keys;
  // dK and dV of a key: the sum runs over query heads, ascending, in each over blocks of queries,
  // and in a block over queries, ascending. Blocks count from the sequence's first query.
  int64_t block_queries;
  bool blocks_descend;
};

struct CpuOrder {
  static constexpr int64_t kBlockKeys = 64;

  FA_MEMBER static constexpr Rung rung(int r) {
    return r == 0 ? Rung{0, 512, 0} : r == 1 ? Rung{16384, 1024, 32} : Rung{65536, 4096, 32 + 48};
  }
  FA_MEMBER static constexpr GradientOrder gradients(int64_t) { return {0, 96, false}; }
};

struct GpuOrder {
  static constexpr int64_t kBlockKeys = 64;

  // When a row's reference moves. (On the CPU it follows the largest score.) A block whose largest
  // score lies above the reference moves it: to that score, so that its probability is 1; but where
  // the block is flat, to kSlack above the next integer, so that the reference seldom moves again.
  // Where few keys carry a row, the rounding error of the largest probability goes straight into
  // the output, and 1 has none; where many do, their errors cancel.
  //
  // A block is flat when each class of its keys has a score within kNear of the largest one. Both
  // are in log2 units. A key's class is key % 8 / 2: the keys that one of the four threads has
  // which share a row of the tensor cores' results.
  static constexpr float kSlack = 4.0f;
  static constexpr float kNear = 4.0f;
  static constexpr int kNumKeyClasses = 4;

  FA_MEMBER static constexpr Rung rung(int r) {
    return r == 0 ? Rung{0, 1024, 0} : r == 1 ? Rung{16384, 2048, 16} : Rung{65536, 4096, 16 + 24};
  }
  // Up to d = 128 one walk over the queries computes all gradients; wider heads take two.
  FA_MEMBER static constexpr GradientOrder gradients(int64_t d) {
    return d <= 128 ? GradientOrder{128, 64, true} : GradientOrder{0, 32, false};
  }
};

// How far above the fold's reference that of a segment may lie before the fold's moves to it, in
// both contracts.
static constexpr float kFoldSlack = 8.0f;

template <class Order>
static constexpr bool ladder_is_consistent() {
  for (int r = 0; r + 1 < kNumRungs; ++r) {
    Rung const here = Order::rung(r), above = Order::rung(r + 1);
    int64_t const span = above.first_key - here.first_key;
    if (span % here.extent != 0 || here.extent % Order::kBlockKeys != 0) return false;
    if (here.first_segment + span / here.extent != above.first_segment) return false;
  }
  return true;
}
static_assert(
    ladder_is_consistent<CpuOrder>() && ladder_is_consistent<GpuOrder>(),
    "each rung starts where the one below it ends, on a boundary, and segments are whole blocks");

// First key of segment `segment`; segment s covers [segment_begin(s), segment_begin(s + 1)).
template <class Order>
FA_HOST_DEVICE static inline int64_t segment_begin(int64_t segment) {
  int64_t begin = segment * Order::rung(0).extent;
  for (int r = 1; r < kNumRungs; ++r) {
    int64_t const above = segment - Order::rung(r).first_segment;
    if (above >= 0) begin = Order::rung(r).first_key + above * Order::rung(r).extent;
  }
  return begin;
}

// The segment that holds key `key`. Each quotient is by a constant: a shift.
template <class Order>
FA_HOST_DEVICE static inline int64_t segment_of(int64_t key) {
  static_assert(kNumRungs == 3);
  constexpr Rung low = Order::rung(0), middle = Order::rung(1), high = Order::rung(2);
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

// The mask. A query sees the keys with key - query in [lowest, highest]: it is aligned to the
// bottom right, so that the last query sees the last key.
struct Diagonals {
  int64_t lowest, highest;
};

// A negative left or right is unlimited; causal is right = 0.
FA_HOST_DEVICE static inline Diagonals seen_diagonals(int64_t s_q, int64_t s_k, int64_t left,
                                                      int64_t right) {
  constexpr int64_t kFar = int64_t{1} << 41;  // farther than any key of any window
  int64_t const offset = s_k - s_q;
  return {left < 0 ? -kFar : offset - left, right < 0 ? kFar : offset + right};
}

// [begin, end), cut to [0, length).
FA_HOST_DEVICE static inline KeyRange cut_range(int64_t begin, int64_t end, int64_t length) {
  KeyRange range{begin < 0 ? 0 : begin > length ? length : begin, end > length ? length : end};
  if (range.end < range.begin) range.end = range.begin;
  return range;
}

// The visible set of query `query` of s_q.
FA_HOST_DEVICE static inline KeyRange visible_keys(int64_t query, int64_t s_q, int64_t s_k,
                                                   int64_t left, int64_t right) {
  Diagonals const seen = seen_diagonals(s_q, s_k, left, right);
  return cut_range(query + seen.lowest, query + seen.highest + 1, s_k);
}

// The queries that see any key of [key_begin, key_end), the inverse of visible_keys; a half-open
// range of [0, s_q).
FA_HOST_DEVICE static inline KeyRange seeing_queries(int64_t key_begin, int64_t key_end,
                                                     int64_t s_q, int64_t s_k, int64_t left,
                                                     int64_t right) {
  Diagonals const seen = seen_diagonals(s_q, s_k, left, right);
  return cut_range(key_begin - seen.highest, key_end - seen.lowest, s_q);
}

// 2^exponent for -126 <= exponent <= 127, exact.
FA_HOST_DEVICE static inline float power_of_two(int exponent) {
  uint32_t const bits = static_cast<uint32_t>(exponent + 127) << 23;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

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

// What a fold multiplies by when it meets a part: 2^(reference - common) of either.
struct FoldWeights {
  float reference;   // of the fold from here on
  float fold, part;  // powers of two
};
FA_HOST_DEVICE static inline FoldWeights fold_weights(float reference, float part_reference) {
  float const common = fold_reference(reference, part_reference);
  // A fold that saw nothing is zero, which is the same wherever its reference lies.
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  bool const is_empty = reference == -kInfinity;
  return {common, is_empty ? 1.0f : fold_weight(reference, common),
          fold_weight(part_reference, common)};
}

// fold' = fma(part, weights.part, fold weights.fold), of an element of the output, and of the sums.
FA_HOST_DEVICE static inline float add_part(FoldWeights const& weights, float fold, float part) {
  return fmaf(part, weights.part, fold * weights.fold);
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
