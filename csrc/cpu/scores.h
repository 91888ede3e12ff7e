// From q.k to a score in log2 units: softcap, ALiBi, mask. The forward and the backward pass call
// the same code.
#pragma once

#include "csrc/core/contract.h"
#include "csrc/core/params.h"
#include "csrc/cpu/functions.h"
#include "csrc/cpu/pack.h"

namespace fa::cpu::FA_ISA {

constexpr double kLog2E = 1.44269504088896340736;
constexpr double kLn2 = 0.69314718055994530942;

// The constants of a call's scores, derived once.
struct ScoreScale {
  float query;         // multiplies q before the product: scale * log2 e, or scale / softcap
  float cap;           // softcap * log2 e, 0: none
  float key_gradient;  // turns sum dS (q * query) into dK

  FA_INLINE ScoreScale of(ScoreParams const& p) {
    double const scale = p.softmax_scale, cap = p.softcap;
    if (cap > 0.0) {
      return {static_cast<float>(scale / cap), static_cast<float>(cap * kLog2E),
              static_cast<float>(cap)};
    }
    return {static_cast<float>(scale * kLog2E), 0.0f, static_cast<float>(kLn2)};
  }
};

// A row as the mask and ALiBi see it.
struct RowView {
  contract::KeyRange visible;  // absolute keys
  float alibi_slope;           // log2 units, 0: none
  int64_t diagonal;            // the key that ALiBi counts from
  int64_t query, head;
};

FA_INLINE RowView view_row(ScoreParams const& score, Sequence const& s, int64_t batch, int64_t head,
                           int64_t query) {
  RowView row;
  row.visible = contract::visible_keys(query, s.s_q, s.s_k, score.window_left, score.window_right);
  row.alibi_slope = score.alibi ? score.alibi[batch * score.alibi_batch_stride + head] *
                                      static_cast<float>(kLog2E)
                                : 0.0f;
  row.diagonal = query + s.s_k - s.s_q;
  row.query = query;
  row.head = head;
  return row;
}

// Row `flat` of key head head_kv: the query heads of a group are adjacent rows of the same query.
FA_INLINE RowView view_flat_row(ScoreParams const& score, Sequence const& s, int64_t batch,
                                int64_t head_kv, int64_t group, int64_t flat) {
  return view_row(score, s, batch, head_kv * group + flat % group, flat / group);
}

// The part of a block's 64 keys that a row sees, relative to the block.
struct BlockView {
  int begin, end;
};
FA_INLINE BlockView view_block(RowView const& row, int64_t block_begin) {
  auto const clamp = [&](int64_t key) {
    int64_t const k = key - block_begin;
    return static_cast<int>(k < 0 ? 0 : k > kBlockKeys ? kBlockKeys : k);
  };
  return {clamp(row.visible.begin), clamp(row.visible.end)};
}

// The part of it that lies in the block's vector v, as lanes; empty when begin >= end.
FA_INLINE BlockView view_lanes(BlockView seen, int v) {
  auto const clamp = [&](int key) {
    int const lane = key - v * kLanes;
    return lane < 0 ? 0 : lane > kLanes ? kLanes : lane;
  };
  return {clamp(seen.begin), clamp(seen.end)};
}

// Sixteen raw products of keys first_key ... to log2 units; *tanh receives tanh(u) when there is a
// softcap.
FA_INLINE Vec score_lanes(Vec raw, ScoreScale const& scale, RowView const& row, int64_t first_key,
                          Vec* tanh) {
  Vec s = raw;
  if (scale.cap > 0.0f) {
    *tanh = tanh_of(raw);
    s = *tanh * broadcast(scale.cap);
  }
  if (row.alibi_slope != 0.0f) {
    alignas(64) static constexpr float kLaneIndex[kLanes] = {0, 1, 2,  3,  4,  5,  6,  7,
                                                             8, 9, 10, 11, 12, 13, 14, 15};
    Vec const distance =
        absolute(broadcast(static_cast<float>(row.diagonal - first_key)) - load(kLaneIndex));
    s = multiply_add(distance, broadcast(0.0f - row.alibi_slope), s);
  }
  return s;
}

}  // namespace fa::cpu::FA_ISA
