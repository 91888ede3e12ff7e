// The rows of one warp of many: what happens to them at a block, at the end of a segment, in the
// fold.
#pragma once

#include "csrc/sm80/forward_scores.cuh"
#include "csrc/sm80/traits.h"

namespace fa::sm80 {

// Where the fold of a tile lies between two segments: each thread's vectors, the first of them in
// shared memory, the others in scratch, kThreads vectors apart.
struct FoldMemory {
  float4 *shared, *scratch;
  int num_shared;
};

template <class Traits>
struct ForwardRows {
  static constexpr int kD = Traits::kD, kRowTiles = Traits::kRowTiles;
  static constexpr int kThreadRows = Traits::kThreadRows;
  static constexpr int kKeyGroups = kBlockKeys / 8, kColumnGroups = kD / 8;
  using Scores = Product<kRowTiles, kKeyGroups>;

  Product<kRowTiles, kColumnGroups> o;  // this segment's sum of p v
  float m[kThreadRows];                 // this segment's reference is its multiple (Move)
  float l[kThreadRows];                 // its sum of p, over this thread's keys

  __device__ __forceinline__ void open_segment() {
    set_zero(o);
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) m[r] = -INFINITY, l[r] = 0.0f;
  }

  // m' = m, or max(x) where that lies well above; a = exp2((m - m') scale); s = p = exp2((x - m')
  // scale); l = l a + sum(p); o = o a. between(r) runs in the middle of thread row r.
  template <class Between>
  __device__ __forceinline__ void softmax(Scores& s, float exponent_scale, Between const& between) {
    float rescale[kThreadRows];
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      Move const move = Move::to(m[r], largest_score(s, r), exponent_scale);
      rescale[r] = move.rescale;
      between(r);
      float sum[kKeyGroups / 2];
#pragma unroll
      for (int n = 0; n < kKeyGroups / 2; ++n)
        sum[n] = exponentiate(s, r, 2 * n, exponent_scale, move.reference);
      l[r] = fmaf(l[r], move.rescale, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
    rescale_rows(o, [&](int r) { return rescale[r]; });
  }

  // Between segments the fold's rows lie in `fold`, where each thread finds the elements that it
  // put there itself, and its references and sums in `m_fold`, `l_fold`, of the warp's rows in
  // shared memory. After the last segment the result is in o, m (the reference) and l.
  __device__ __forceinline__ void fold_segment(ClosedRow const (&closed)[kThreadRows],
                                               FoldMemory const& fold, float* m_fold, float* l_fold,
                                               bool first, bool last, int lane) {
    FoldedRow folded[kThreadRows];
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      int const row = row_of(r, lane);
      folded[r] =
          FoldedRow::of(first ? -INFINITY : m_fold[row], first ? 0.0f : l_fold[row], closed[r]);
      m[r] = folded[r].reference, l[r] = folded[r].sum;
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
    // Generic addresses: the compiler need not know which memory it is.
    auto const vector = [&](int i) {
      float4* const base = i / kFoldStep * kFoldStep < fold.num_shared ? fold.shared : fold.scratch;
      return base + i * Traits::kThreads;
    };
    if (first && last) {  // alone; the sign of a zero is settled where results are stored
#pragma unroll
      for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
        for (int n = 0; n < kColumnGroups; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) o[t][n][i] *= folded[2 * t + i / 2].weight;
      return;
    }
    // Loads of many columns first: a store between two of them would make the second wait.
    constexpr int kAtOnce = kColumnGroups % 16 == 0 ? 16 : kColumnGroups % 12 == 0 ? 12 : 8;
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int n0 = 0; n0 < kColumnGroups; n0 += kAtOnce) {
        int const i0 = t * kColumnGroups + n0;
        float4 sum[kAtOnce];
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n)
          sum[n] = first ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : *vector(i0 + n);
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          float (&x)[4] = o[t][n0 + n];
          FoldedRow const &upper = folded[2 * t], &lower = folded[2 * t + 1];
          x[0] = upper(sum[n].x, x[0]), x[1] = upper(sum[n].y, x[1]);
          x[2] = lower(sum[n].z, x[2]), x[3] = lower(sum[n].w, x[3]);
        }
        if (last) continue;
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n) {
          float const(&x)[4] = o[t][n0 + n];
          *vector(i0 + n) = make_float4(x[0], x[1], x[2], x[3]);
        }
      }
  }
};

}  // namespace fa::sm80
