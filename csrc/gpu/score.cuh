// From q.k to a score: softcap, ALiBi, mask, and what dropout keeps.
#pragma once

#include "csrc/core/contract.h"
#include "csrc/core/sequence.h"
#include "csrc/gpu/score_scale.h"
#include "csrc/gpu/warp.cuh"

namespace fa::gpu {

constexpr float kLog2E = 1.44269504088896340736f;

// What a thread knows of one row.
struct RowView {
  int begin = 0, end = 0;    // visible keys
  int query = 0, head = 0;   // of h_q
  int diagonal = 0;          // the key that ALiBi counts from
  float alibi_slope = 0.0f;  // log2 units
};

__device__ __forceinline__ RowView view_row(ScoreParams const& score, Sequence const& s, int batch,
                                            int query, int head) {
  RowView row;
  row.query = query, row.head = head;
  contract::KeyRange const seen =
      contract::visible_keys(row.query, s.s_q, s.s_k, score.window_left, score.window_right);
  row.begin = static_cast<int>(seen.begin), row.end = static_cast<int>(seen.end);
  row.diagonal = row.query + static_cast<int>(s.s_k - s.s_q);
  if (score.alibi) {
    row.alibi_slope = score.alibi[batch * score.alibi_batch_stride + row.head] * kLog2E;
  }
  return row;
}

// tanh(x) = (1 - e) / (1 + e) with e = 2^(-2 |x| log2 e), and x's sign.
__device__ __forceinline__ float tanh_of(float x) {
  float const e = exp2_of(fabsf(x) * -2.885390081777927f);
  return copysignf(__fdividef(1.0f - e, 1.0f + e), x);
}

// q.k to log2 units; *tanh receives tanh(u) when there is a softcap.
__device__ __forceinline__ float shape_score(float raw, ScoreScale const& scale, RowView const& row,
                                             int key, float* tanh) {
  float s = raw * scale.raw_scale;
  if (scale.cap > 0.0f) {
    *tanh = tanh_of(s);
    s = *tanh * scale.cap;
  }
  if (row.alibi_slope != 0.0f) {
    s = fmaf(fabsf(static_cast<float>(row.diagonal - key)), -row.alibi_slope, s);
  }
  return s;
}

// Factors of keys key, key + 1 (key even) of a row: the scale of what is kept, or 0.
__device__ __forceinline__ float2 dropout_factors(Keep const& keep, uint64_t dropout_key,
                                                  RowView const& row, int64_t batch, int key) {
  uint32_t const counter[4] = {static_cast<uint32_t>(key / kKeysPerDraw),
                               static_cast<uint32_t>(row.query), static_cast<uint32_t>(row.head),
                               static_cast<uint32_t>(batch)};
  uint32_t word[4];
  philox(counter, dropout_key, word);
  int const i = key % kKeysPerDraw / 2;
  uint32_t const draws = i == 0 ? word[0] : i == 1 ? word[1] : i == 2 ? word[2] : word[3];
  return {(draws & 0xffff) < keep.below ? keep.scale : 0.0f,
          draws >> 16 < keep.below ? keep.scale : 0.0f};
}

}  // namespace fa::gpu
