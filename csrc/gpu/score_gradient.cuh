// P and dS of one query and one key.
//
//   P = exp(S - lse), dP = dO V^T, dS = P (dP - delta), delta = sum(dO * O)
//   dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO
// Dropout multiplies P in dV, and dP, by keep / (1 - p).
#pragma once

#include "csrc/core/sequence.h"
#include "csrc/gpu/accumulator.cuh"
#include "csrc/gpu/score.cuh"

namespace fa::gpu {

// The mask of contract.h as tiles ask for it, with 32-bit positions: a query sees the keys with key
// - query in [lowest, highest], where both exist.
struct TileMask {
  int lowest, highest, s_q, s_k, offset;

  __device__ TileMask(ScoreParams const& score, Sequence const& s)
      : s_q(static_cast<int>(s.s_q)),
        s_k(static_cast<int>(s.s_k)),
        offset(static_cast<int>(s.s_k - s.s_q)) {
    constexpr int64_t kFar = 1 << 30;
    contract::Diagonals const seen =
        contract::seen_diagonals(s.s_q, s.s_k, score.window_left, score.window_right);
    lowest = static_cast<int>(max(seen.lowest, -kFar));
    highest = static_cast<int>(min(seen.highest, kFar));
  }
  __device__ __forceinline__ bool sees(int query, int key) const {
    return key - query >= lowest && key - query <= highest && query < s_q && key < s_k;
  }
  // Whether any query of [q0, q1) sees any key of [k0, k1); and whether each of them sees all.
  __device__ __forceinline__ bool any(int q0, int q1, int k0, int k1) const {
    return k1 - 1 - q0 >= lowest && k0 - (q1 - 1) <= highest && k0 < s_k;
  }
  __device__ __forceinline__ bool every(int q0, int q1, int k0, int k1) const {
    return k0 - (q1 - 1) >= lowest && k1 - 1 - q0 <= highest && q1 <= s_q && k1 <= s_k;
  }
};

// Masks scores: a key that a query does not see gives P = 0 and dS = 0, whatever V and dout hold.
// sees(row, column) takes the row and column of an element among those of this thread.
template <int kTiles, int kGroups, class Sees>
__device__ __forceinline__ void mask_scores(Product<kTiles, kGroups>& s,
                                            Product<kTiles, kGroups>& dp, Sees const& sees) {
#pragma unroll
  for (int r = 0; r < 2 * kTiles; ++r)
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (sees(r / 2 * 16 + r % 2 * 8, n * 8 + i)) continue;
        s[r / 2][n][r % 2 * 2 + i] = -INFINITY;
        dp[r / 2][n][r % 2 * 2 + i] = 0.0f;
      }
}

// s: q k^T on entry, -inf where it is masked, then what dV sums; dp: dO V^T on entry, then dS.
// lse_log2: of the row, in log2 units, +inf: it saw nothing.
template <bool kFeatures>
__device__ __forceinline__ void gradient_of_score(float& s, float& dp, float lse_log2, float delta,
                                                  ScoreScale const& scale, RowView const& row,
                                                  int key, float keep) {
  float p, slope = 1.0f;
  if (kFeatures && scale.shaped) {
    float tanh = 0.0f;
    bool const masked = s == -INFINITY;
    float const x = shape_score(s, scale, row, key, &tanh);
    p = exp2_of(masked ? -INFINITY : x - lse_log2);
    slope = 1.0f - tanh * tanh;
  } else {
    p = exp2_of(fmaf(s, scale.exponent_scale, -lse_log2));
  }
  float kept = dp, value = p;
  if (kFeatures && scale.drops) {
    kept = keep == 0.0f ? 0.0f : dp * keep;
    value = p * keep;
  }
  float const ds = p * (kept - delta);
  dp = kFeatures && scale.shaped ? ds * slope : ds;
  s = value;
}

// Index of (head 0, query 0) of a sequence in delta.
__device__ __forceinline__ int64_t delta_base(BackwardParams const& call, Sequence const& s,
                                              int64_t batch) {
  return call.layout.cu_seqlens_q ? s.first_query + batch * call.delta_sequence_pad
                                  : batch * call.delta_batch_stride;
}

}  // namespace fa::gpu
