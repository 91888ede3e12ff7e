// What happens to scores: shape and mask, the softmax of a block, dropout; and to a row at the end
// of a segment.
//
// A thread holds elements of 2 kRowTiles rows, and the four lanes of a quad share them
// (gpu/accumulator.cuh).
#pragma once

#include <limits>

#include "csrc/gpu/accumulator.cuh"
#include "csrc/gpu/convert.cuh"
#include "csrc/gpu/score.cuh"
#include "csrc/gpu/warp.cuh"

namespace fa::gpu {

// Softcap, ALiBi, mask. rows: of the warp, in shared memory; first_key: of this thread.
template <bool kFeatures, int kRowTiles, int kKeyGroups>
__device__ __forceinline__ void shape_and_mask(Product<kRowTiles, kKeyGroups>& s,
                                               RowView const* rows, int first_key,
                                               ScoreScale const& scale, int lane) {
#pragma unroll
  for (int r = 0; r < 2 * kRowTiles; ++r) {
    RowView const& row = rows[accumulator_row(r, lane)];
    int const begin = row.begin, end = row.end;
#pragma unroll
    for (int n = 0; n < kKeyGroups; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = s[r / 2][n][r % 2 * 2 + i];
        int const key = first_key + n * 8 + i;
        if constexpr (kFeatures) {
          float tanh;
          if (scale.shaped) x = shape_score(x, scale, row, key, &tanh);
        }
        if (key < begin || key >= end) x = -INFINITY;
      }
  }
}

// The largest score of a thread row among the keys that this thread has, which are one class
// (contract.h, GpuOrder::kNumKeyClasses).
template <int kRowTiles, int kKeyGroups>
__device__ __forceinline__ float largest_score(Product<kRowTiles, kKeyGroups> const& s, int r) {
  auto const x = [&](int n, int i) { return s[r / 2][n][r % 2 * 2 + i]; };
  float top = fmaxf(x(0, 0), x(0, 1));
#pragma unroll
  for (int n = 1; n < kKeyGroups; ++n) top = fmaxf(top, fmaxf(x(n, 0), x(n, 1)));
  return top;
}

// The reference m of a row's exponents, in log2 units. Before a row has seen a key, its reference
// lies below all scores.
constexpr float kNoReference = -std::numeric_limits<float>::max();

// Whether a block's largest score, `top`, moves a reference.
__device__ __forceinline__ bool moves(float reference, float top, float exponent_scale) {
  return fmaf(top, exponent_scale, -reference) > 0.0f;
}
// Whether another score of the block, or of a class of its keys, lies near the largest one, which
// is `largest` in log2 units.
__device__ __forceinline__ bool is_near(float score, float largest, float exponent_scale) {
  return fmaf(score, exponent_scale, -largest) > -contract::GpuOrder::kNear;
}

// Moves it if so (contract.h, GpuOrder::kSlack); returns what the sums before are multiplied by.
// is_flat(largest): whether the largest scores of all classes are near it; asked by all lanes.
template <class IsFlat>
__device__ __forceinline__ float move_reference(float& reference, float top, float exponent_scale,
                                                IsFlat const& is_flat) {
  float const before = reference, largest = top * exponent_scale;
  bool const flat = is_flat(largest);
  if (moves(before, top, exponent_scale))
    reference = flat ? ceilf(largest) + contract::GpuOrder::kSlack : largest;
  return exp2_of(before - reference);
}

// The reference as partials and the fold have it: -inf where the row has seen no key.
__device__ __forceinline__ float closed_reference(float reference) {
  return reference == kNoReference ? -INFINITY : reference;
}

// Whether the end of a segment can change a row. A reference that is an integer stays as it is. So
// does a row of one key, unless its score is so large that rounding shows in 16 bits. The warp asks
// before it closes a segment and `close_row` asks again, so the other rows of the warp decide
// nothing.
__device__ __forceinline__ bool may_close(float reference) {
  return ceilf(reference) != reference || fabsf(reference) > 0x1p10f;
}

// The end of a segment [begin, end): the reference of a row that sees keys of others too becomes an
// integer. Returns what the segment's sums are multiplied by.
//
// A row that sees one key has a probability of 1, of which exp2(x scale - m) may miss an ulp, since
// m is rounded; what was multiplied by V is that number in 16 bits.
template <class Element>
__device__ __forceinline__ float close_row(float& reference, float& sum, RowView const& row,
                                           int begin, int end) {
  float weight = 1.0f;
  if (!may_close(reference)) return weight;
  if (contract::closes({row.begin, row.end}, begin, end)) {
    weight = exp2_of(reference - ceilf(reference));
    reference = ceilf(reference);
    sum *= weight;
  } else if (row.end - row.begin == 1 && sum > 0.0f && sum < INFINITY) {
    weight = 1.0f / to_float(round_to<Element>(sum));
    sum = 1.0f;
  }
  return weight;
}

// p = exp2(x scale - m) of the sixteen keys of groups n, n + 1 of a thread row; returns this
// thread's sum of them. A block's sum is ((0 + 1) + (2 + 3)) of its four sixteens.
template <int kRowTiles, int kKeyGroups>
__device__ __forceinline__ float exponentiate(Product<kRowTiles, kKeyGroups>& s, int r, int n,
                                              float exponent_scale, float reference) {
  float even = 0.0f, odd = 0.0f;
#pragma unroll
  for (int j = n; j < n + 2; ++j) {
    float& p0 = s[r / 2][j][r % 2 * 2];
    float& p1 = s[r / 2][j][r % 2 * 2 + 1];
    p0 = exp2_of(fmaf(p0, exponent_scale, -reference));
    p1 = exp2_of(fmaf(p1, exponent_scale, -reference));
    even = j == n ? p0 : even + p0, odd = j == n ? p1 : odd + p1;
  }
  return even + odd;
}

// o *= rescale(r). Sixteen rows of which none has moved are left out: nothing would change.
template <int kRowTiles, int kGroups, class Rescale>
__device__ __forceinline__ void rescale_rows(Product<kRowTiles, kGroups>& o,
                                             Rescale const& rescale) {
#pragma unroll
  for (int t = 0; t < kRowTiles; ++t) {
    bool const moved = rescale(2 * t) != 1.0f || rescale(2 * t + 1) != 1.0f;
    if (!__any_sync(kFullWarp, moved)) continue;
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) o[t][n][i] *= rescale(2 * t + i / 2);
  }
}

template <int kRowTiles, int kKeyGroups>
__device__ __forceinline__ void drop(Product<kRowTiles, kKeyGroups>& p, RowView const* rows,
                                     int first_key, Keep const& keep, uint64_t dropout_key,
                                     int batch, int lane) {
#pragma unroll
  for (int r = 0; r < 2 * kRowTiles; ++r) {
    RowView const& row = rows[accumulator_row(r, lane)];
#pragma unroll
    for (int n = 0; n < kKeyGroups; ++n) {
      float2 const factor = dropout_factors(keep, dropout_key, row, batch, first_key + n * 8);
      float& p0 = p[r / 2][n][r % 2 * 2];
      float& p1 = p[r / 2][n][r % 2 * 2 + 1];
      // Not a product: what is dropped is zero even where p is NaN.
      p0 = factor.x == 0.0f ? 0.0f : p0 * factor.x;
      p1 = factor.y == 0.0f ? 0.0f : p1 * factor.y;
    }
  }
}

}  // namespace fa::gpu
