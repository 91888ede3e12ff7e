// The rows of one warp: what happens to them at a block, at the end of a segment, in the fold.
//
// A thread holds elements of 2 kRowTiles rows: g and g + 8 (g = lane / 4) of each sixteen; the four
// lanes of a quad share them. cuda/product.cuh says which elements.
#pragma once

#include "csrc/cuda/product.cuh"
#include "csrc/cuda/score.cuh"
#include "csrc/sm80/traits.h"

namespace fa::sm80 {

using namespace fa::cuda;

// A segment moved to the reference ceil(m), once; o still has to be multiplied by weight.
template <int kThreadRows>
struct ClosedSegment {
  float reference[kThreadRows], sum[kThreadRows], weight[kThreadRows];
};

template <class Traits>
struct ForwardRows {
  using Element = typename Traits::Element;
  static constexpr int kD = Traits::kD, kRowTiles = Traits::kRowTiles;
  static constexpr int kThreadRows = Traits::kThreadRows;
  static constexpr int kKeyGroups = Traits::kBlockKeys / 8, kColumnGroups = kD / 8;
  using Scores = Product<kRowTiles, kKeyGroups>;
  using Closed = ClosedSegment<kThreadRows>;

  Product<kRowTiles, kColumnGroups> o;  // this segment's sum of p v
  float m[kThreadRows];                 // this segment's running maximum of x
  float l[kThreadRows];                 // its sum of p, over this thread's keys

  // The row of the warp that thread row r is.
  __device__ __forceinline__ static int row_of(int r, int lane) {
    return r / 2 * 16 + r % 2 * 8 + lane / 4;
  }

  __device__ __forceinline__ void open_segment() {
    set_zero<kRowTiles, kColumnGroups>(o);
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) m[r] = -INFINITY, l[r] = 0.0f;
  }

  // Softcap, ALiBi, mask. rows: of the warp, in shared memory; first_key: of this thread.
  __device__ __forceinline__ static void shape_and_mask(Scores& s, RowView const* rows,
                                                        int first_key, ScoreScale const& scale,
                                                        int lane) {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      RowView const& row = rows[row_of(r, lane)];
      int const begin = row.begin, end = row.end;
#pragma unroll
      for (int n = 0; n < kKeyGroups; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& x = s[r / 2][n][r % 2 * 2 + i];
          int const key = first_key + n * 8 + i;
          if constexpr (Traits::kFeatures) {
            float tanh;
            if (scale.shaped) x = shape_score(x, scale, row, key, &tanh);
          }
          if (key < begin || key >= end) x = -INFINITY;
        }
    }
  }

  // m' = max(m, x); a = exp2((m - m') scale); s = p = exp2((x - m') scale); l = l a + sum(p);
  // o = o a.
  __device__ __forceinline__ void softmax(Scores& s, float exponent_scale) {
    float rescale[kThreadRows];
    bool moved = false;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      auto const x = [&](int n, int i) { return s[r / 2][n][r % 2 * 2 + i]; };
      float top = fmaxf(x(0, 0), x(0, 1));
#pragma unroll
      for (int n = 1; n < kKeyGroups; ++n) top = fmaxf(top, fmaxf(x(n, 0), x(n, 1)));
      float const m_new = fmaxf(m[r], max_of_quad(top));
      float const reference = m_new == -INFINITY ? 0.0f : m_new * exponent_scale;
      // Of two rounded products: exactly 1 when the maximum stays, or a block in which the row sees
      // nothing would not leave it as it is.
      rescale[r] = exp2_of(m[r] * exponent_scale - reference);
      moved = moved || rescale[r] != 1.0f;
      m[r] = m_new;
      float even = 0.0f, odd = 0.0f;  // keys ascending in both
#pragma unroll
      for (int n = 0; n < kKeyGroups; ++n) {
        float& p0 = s[r / 2][n][r % 2 * 2];
        float& p1 = s[r / 2][n][r % 2 * 2 + 1];
        p0 = exp2_of(fmaf(p0, exponent_scale, -reference));
        p1 = exp2_of(fmaf(p1, exponent_scale, -reference));
        even += p0, odd += p1;
      }
      l[r] = fmaf(l[r], rescale[r], even + odd);
    }
    if (!__any_sync(kFullWarp, moved)) return;  // a product with 1 changes nothing
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int n = 0; n < kColumnGroups; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[t][n][i] *= rescale[2 * t + i / 2];
  }

  __device__ __forceinline__ static void drop(Scores& s, RowView const* rows, int first_key,
                                              Keep const& keep, uint64_t dropout_key, int batch,
                                              int lane) {
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      RowView const& row = rows[row_of(r, lane)];
#pragma unroll
      for (int n = 0; n < kKeyGroups; ++n) {
        float2 const factor = dropout_factors(keep, dropout_key, row, batch, first_key + n * 8);
        float& p0 = s[r / 2][n][r % 2 * 2];
        float& p1 = s[r / 2][n][r % 2 * 2 + 1];
        // Not a product: what is dropped is zero even where p is NaN.
        p0 = factor.x == 0.0f ? 0.0f : p0 * factor.x;
        p1 = factor.y == 0.0f ? 0.0f : p1 * factor.y;
      }
    }
  }

  __device__ __forceinline__ Closed close_segment(float exponent_scale) const {
    Closed closed;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      float const m_log2 = m[r] * exponent_scale;
      closed.reference[r] = ceilf(m_log2);
      closed.weight[r] = exp2_of(m[r] == -INFINITY ? 0.0f : m_log2 - closed.reference[r]);
      closed.sum[r] = sum_of_quad(l[r]) * closed.weight[r];
    }
    return closed;
  }

  // fold' = fold * 2^(M1 - M') + (o, l) * 2^(M2 - M'): exact products, one rounding. Between
  // segments the fold's rows lie in `fold`, memory of this thread block's own where each thread
  // finds the elements that it put there itself, and its references and sums in `m_fold`, `l_fold`,
  // of the warp's rows in shared memory. After the last segment the result is in o, m (the
  // reference) and l.
  __device__ __forceinline__ void fold_segment(Closed const& closed, float4* fold, float* m_fold,
                                               float* l_fold, bool first, bool last, int lane) {
    float w1[kThreadRows], w2[kThreadRows];
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      int const row = row_of(r, lane);
      float const before = first ? -INFINITY : m_fold[row];
      float const common = contract::fold_reference(before, closed.reference[r]);
      w1[r] = contract::fold_weight(before, common);
      w2[r] = contract::fold_weight(closed.reference[r], common);
      l[r] = (first ? 0.0f : l_fold[row]) * w1[r] + closed.sum[r] * w2[r];
      m[r] = common;
    }
    __syncwarp();  // the quad has read what its first lane overwrites
    if (lane % 4 == 0) {
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
        m_fold[row_of(r, lane)] = m[r];
        l_fold[row_of(r, lane)] = l[r];
      }
    }
    __syncwarp();  // and reads it at the next segment
    // Loads of many columns first: each comes from the second-level cache, and a store between two
    // of them would make the second wait.
    constexpr int kAtOnce = kColumnGroups % 16 == 0 ? 16 : kColumnGroups % 12 == 0 ? 12 : 8;
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int n0 = 0; n0 < kColumnGroups; n0 += kAtOnce) {
        float4* const at = fold + (t * kColumnGroups + n0) * Traits::kThreads;
        float4 sum[kAtOnce];
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n)
          sum[n] = first ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : __ldcg(at + n * Traits::kThreads);
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          float (&x)[4] = o[t][n0 + n];
          float const v1 = w1[2 * t], v2 = w2[2 * t], w = closed.weight[2 * t];
          float const u1 = w1[2 * t + 1], u2 = w2[2 * t + 1], u = closed.weight[2 * t + 1];
          x[0] = sum[n].x * v1 + x[0] * w * v2, x[1] = sum[n].y * v1 + x[1] * w * v2;
          x[2] = sum[n].z * u1 + x[2] * u * u2, x[3] = sum[n].w * u1 + x[3] * u * u2;
        }
        if (last) continue;
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          float const(&x)[4] = o[t][n0 + n];
          __stcg(at + n * Traits::kThreads, make_float4(x[0], x[1], x[2], x[3]));
        }
      }
  }
};

}  // namespace fa::sm80
