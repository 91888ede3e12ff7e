// The softmax state of a warp that owns its rows whole: what happens to it at a block, at the end
// of a segment, in the fold.
#pragma once

#include "csrc/gpu/softmax.cuh"

namespace fa::gpu {

// The fold of a tile in vectors of four floats a thread: kFoldStep of them lie together.
constexpr int kFoldStep = 2;

// Where it lies between two segments: each thread's vectors, the first of them in scratch, the
// others in shared memory, kThreads vectors apart.
struct FoldMemory {
  float4 *scratch, *shared;  // each counts from vector 0
  int num_scratch;
};

// Traits: Element, kD, kRowTiles (sixteen rows each), kThreadRows, kThreads.
template <class Traits>
struct SoftmaxState {
  static_assert(Traits::kThreadRows == 2 * Traits::kRowTiles);
  static_assert(contract::GpuOrder::kBlockKeys == 64, "a block's sum is that of four sixteens");
  static constexpr int kD = Traits::kD, kRowTiles = Traits::kRowTiles;
  static constexpr int kThreadRows = Traits::kThreadRows;
  static constexpr int kKeyGroups = contract::GpuOrder::kBlockKeys / 8, kColumnGroups = kD / 8;
  using Scores = Product<kRowTiles, kKeyGroups>;

  Product<kRowTiles, kColumnGroups> o;  // this segment's sum of p v
  float m[kThreadRows];                 // the reference of its exponents
  float l[kThreadRows];                 // its sum of p, over this thread's keys

  __device__ __forceinline__ void open_segment() {
    set_zero(o);
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) m[r] = kNoReference, l[r] = 0.0f;
  }

  // m' = m, or max(x) scale (`move_reference` says when); a = exp2(m - m'); s = p = exp2(x scale -
  // m'); l = l a + sum(p); o = o a. between(r) runs once a thread row.
  template <class Between>
  __device__ __forceinline__ void softmax(Scores& s, float exponent_scale, Between const& between) {
    // The reference of a row moves if and only if the largest score of some lane of its quad would
    // move it. So the lanes exchange their largest scores only after one of them has said so.
    float top[kThreadRows];
    bool any_moves = false;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      top[r] = largest_score(s, r);
      any_moves |= moves(m[r], top[r], exponent_scale);
      between(r);
    }
    __syncwarp();  // keeps the work of `between` in front of the products that follow
    if (__any_sync(kFullWarp, any_moves)) {  // seldom
      float rescale[kThreadRows];
      bool any_sums = false;
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
        any_sums |= m[r] != kNoReference;
        rescale[r] = move_reference(m[r], max_of_quad(top[r]), exponent_scale, [&](float largest) {
          return all_of_quad(is_near(top[r], largest, exponent_scale));
        });
        l[r] *= rescale[r];
      }
      if (__any_sync(kFullWarp, any_sums)) {  // not in a segment's first block
#pragma unroll
        for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
          for (int n = 0; n < kColumnGroups; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) o[t][n][i] *= rescale[2 * t + i / 2];
      }
    }
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      float sum[kKeyGroups / 2];
#pragma unroll
      for (int n = 0; n < kKeyGroups / 2; ++n)
        sum[n] = exponentiate(s, r, 2 * n, exponent_scale, m[r]);
      l[r] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
  }

  // The end of a segment [begin, end), whose sums of p are in `sum`.
  __device__ __forceinline__ void close_segment(float (&sum)[kThreadRows], RowView const* rows,
                                                int begin, int end, int lane) {
    bool any_closes = false;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) any_closes |= may_close(m[r]);
    if (!__any_sync(kFullWarp, any_closes)) return;
    float weight[kThreadRows];
    bool any_weighs = false;
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      weight[r] = close_row<typename Traits::Element>(m[r], sum[r], rows[accumulator_row(r, lane)],
                                                      begin, end);
      any_weighs |= weight[r] != 1.0f;
    }
    if (!__any_sync(kFullWarp, any_weighs)) return;
#pragma unroll
    for (int t = 0; t < kRowTiles; ++t)
#pragma unroll
      for (int n = 0; n < kColumnGroups; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) o[t][n][i] *= weight[2 * t + i / 2];
  }

  // Between segments the elements of the fold lie in `fold`: each thread reads what it has written
  // itself. The references and sums of the warp's rows lie in `m_fold` and `l_fold`, in shared
  // memory. After the last segment the result is in o, m (the reference) and l.
  __device__ __forceinline__ void fold_segment(float const (&sum)[kThreadRows],
                                               FoldMemory const& fold, float* m_fold, float* l_fold,
                                               bool first, bool last, int lane) {
    contract::FoldWeights weights[kThreadRows];
#pragma unroll
    for (int r = 0; r < kThreadRows; ++r) {
      int const row = accumulator_row(r, lane);
      float const reference = first ? -INFINITY : m_fold[row], before = first ? 0.0f : l_fold[row];
      weights[r] = contract::fold_weights(reference, closed_reference(m[r]));
      m[r] = weights[r].reference;
      l[r] = contract::add_part(weights[r], before, sum[r]);
    }
    __syncwarp();  // the quad has read what its first lane overwrites
    if (lane % 4 == 0) {
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) {
        m_fold[accumulator_row(r, lane)] = m[r];
        l_fold[accumulator_row(r, lane)] = l[r];
      }
    }
    __syncwarp();  // and reads it at the next segment
    // Generic addresses reach both memories, and the compiler need not know which one it is.
    auto const vector = [&](int i) {
      bool const far = i / kFoldStep * kFoldStep < fold.num_scratch;
      return (far ? fold.scratch : fold.shared) + i * Traits::kThreads;
    };
    constexpr int kVectors = kRowTiles * kColumnGroups;
    if (!first) {  // the first segment is the fold; `finish` settles the sign of a zero
      bool moved = false;
#pragma unroll
      for (int r = 0; r < kThreadRows; ++r) moved |= weights[r].fold != 1.0f;
      if (__any_sync(kFullWarp, moved)) {  // seldom
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          float4 const x = *vector(i);
          float const upper = weights[i / kColumnGroups * 2].fold;
          float const lower = weights[i / kColumnGroups * 2 + 1].fold;
          *vector(i) = make_float4(x.x * upper, x.y * upper, x.z * lower, x.w * lower);
        }
      }
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        float4 const before = *vector(i);
        float const upper = weights[i / kColumnGroups * 2].part;
        float const lower = weights[i / kColumnGroups * 2 + 1].part;
        float (&x)[4] = o[i / kColumnGroups][i % kColumnGroups];
        x[0] = fmaf(x[0], upper, before.x), x[1] = fmaf(x[1], upper, before.y);
        x[2] = fmaf(x[2], lower, before.z), x[3] = fmaf(x[3], lower, before.w);
      }
    }
    if (last) return;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      float const(&x)[4] = o[i / kColumnGroups][i % kColumnGroups];
      *vector(i) = make_float4(x[0], x[1], x[2], x[3]);
    }
    open_segment();
  }
};

}  // namespace fa::gpu
