// One query tile of one key head in the forward pass: what happens to its rows at a block, at the
// end of a segment, in the fold and at the end.
//
// Everything is fp32 scratch; `rows` is the tile's height, d_pad the head dim rounded up to 16.
#pragma once

#include "csrc/cpu/dropout.h"
#include "csrc/cpu/family.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/scores.h"

namespace fa::cpu::FA_ISA {

// What the heads of a task share, one block at a time.
struct BlockScratch {
  float* s;  // (rows, 64)   scores, then probabilities
  float* k;  // (d_pad, 64)  this block's keys, transposed
  float* v;  // (64, d_pad)  this block's values

  static int64_t floats(int64_t rows, int64_t d) {
    return kBlockKeys * (rows + 2 * round_up_lanes(d));
  }
  BlockScratch(float* base, int64_t rows, int64_t d)
      : s(base), k(s + rows * kBlockKeys), v(k + round_up_lanes(d) * kBlockKeys) {}
};

// What a head keeps from block to block.
struct RowScratch {
  float* q;       // (rows, d_pad)  queries, scaled
  float* o;       // (rows, d_pad)  this segment's sum of p v
  float* o_fold;  // (rows, d_pad)  the segments folded so far
  float* l;       // (rows, 16)     this segment's running sums, one a lane
  float* m;       // (rows)         this segment's running maximum, log2 units
  float* m_row;   // (rows)         the maximum over all segments
  float* m_fold;  // (rows)         reference of the fold, an integer
  float* l_fold;  // (rows)         sum of the fold
  RowView* rows;  // (rows)         coordinates and visible sets

  static constexpr int64_t kRowViewFloats = (sizeof(RowView) + 3) / 4;

  static int64_t floats(int64_t rows, int64_t d) {
    return rows * (3 * round_up_lanes(d) + kLanes) + 4 * round_up_lanes(rows) +
           round_up_lanes(rows * kRowViewFloats);
  }
  RowScratch(float* base, int64_t num_rows, int64_t d) {
    int64_t const d_pad = round_up_lanes(d);
    auto const take = [&](int64_t n) {
      float* const p = base;
      base += round_up_lanes(n);
      return p;
    };
    q = take(num_rows * d_pad), o = take(num_rows * d_pad), o_fold = take(num_rows * d_pad);
    l = take(num_rows * kLanes), m = take(num_rows), m_row = take(num_rows);
    m_fold = take(num_rows), l_fold = take(num_rows);
    rows = reinterpret_cast<RowView*>(take(num_rows * kRowViewFloats));
  }
};

// A tile's coordinates, worked out once.
template <DType kDType>
struct ForwardTile {
  static constexpr int64_t kBytes = kDType == DType::kFloat32 ? 4 : 2;
  ForwardParams const& params;
  QueryTile const& tile;
  int64_t const group, d, d_pad;
  Sequence const sequence;
  ScoreScale const scale;
  BlockScratch const shared;
  RowScratch const scratch;
  KeyRows const keys, values;

  ForwardTile(ForwardParams const& p, QueryTile const& t, int64_t head, float* block_floats,
              float* row_floats)
      : params(p),
        tile(t),
        group(p.layout.h_q / p.layout.h_kv),
        d(p.layout.d),
        d_pad(round_up_lanes(p.layout.d)),
        sequence(sequence_of(p.layout, t.batch)),
        scale(ScoreScale::of(p.score)),
        shared(block_floats, t.num_rows, p.layout.d),
        scratch(row_floats, t.num_rows, p.layout.d),
        keys(key_rows(p.k, p.layout, sequence, head, kBytes)),
        values(key_rows(p.v, p.layout, sequence, head, kBytes)) {
    for (int64_t r = 0; r < t.num_rows; ++r) {
      scratch.rows[r] = view_flat_row(p.score, sequence, t.batch, head, group, t.row_begin + r);
    }
  }

  RowView const& row(int64_t r) const { return scratch.rows[r]; }
  int64_t lse_index(RowView const& row) const {
    return sequence.lse_base + row.head * params.layout.lse_head_stride + row.query;
  }

  // The keys that any row sees: rows ascend, so the first begins and the last ends the union.
  contract::KeyRange visible() const {
    return {row(0).visible.begin, row(tile.num_rows - 1).visible.end};
  }

  void load_queries() const {
    for (int64_t r = 0; r < tile.num_rows; ++r) {
      RowView const& view = row(r);
      pack_row<kDType>(scratch.q + r * d_pad,
                       query_row(params.q, sequence, view.query, view.head, kBytes), d,
                       scale.query);
    }
  }

  // s (rows r0 .. r0 + n, 64 keys of the block) = scores in log2 units, -inf where masked. Only
  // lanes [*vec_begin, *vec_end) * 16 are computed: no row of the group sees the others. False if
  // no row sees any.
  bool scores(int64_t r0, int64_t n, int64_t block_begin, RowView const* rows, int* vec_begin,
              int* vec_end) const {
    BlockView seen = view_block(rows[0], block_begin);
    for (int64_t r = 1; r < n; ++r) {
      BlockView const view = view_block(rows[r], block_begin);
      seen.begin = view.begin < seen.begin ? view.begin : seen.begin;
      seen.end = view.end > seen.end ? view.end : seen.end;
    }
    if (seen.begin >= seen.end) return false;
    *vec_begin = seen.begin / kLanes;
    *vec_end = (seen.end + kLanes - 1) / kLanes;
    float* const s = shared.s + r0 * kBlockKeys + *vec_begin * kLanes;
    if (is_decode()) {
      int64_t const begin = block_begin + *vec_begin * kLanes;
      int64_t const end = block_begin + *vec_end * kLanes;
      multiply_decode_by_keys<kDType, kTileRows>(n, s, scratch.q + r0 * d_pad, d_pad, keys, begin,
                                                 (end < sequence.s_k ? end : sequence.s_k) - begin,
                                                 d);
    } else {
      multiply(n, s, kBlockKeys, nullptr, /*overwrites=*/true, {scratch.q + r0 * d_pad, d_pad, 1},
               shared.k + *vec_begin * kLanes, kBlockKeys, *vec_end - *vec_begin, d);
    }

    bool const shaped = scale.cap > 0.0f || params.score.alibi;
    for (int64_t r = 0; r < n; ++r) {
      BlockView const view = view_block(rows[r], block_begin);
      bool const masked = view.begin > *vec_begin * kLanes || view.end < *vec_end * kLanes;
      if (!shaped && !masked) continue;
      for (int v = *vec_begin; v < *vec_end; ++v) {
        float* const lanes = shared.s + (r0 + r) * kBlockKeys + v * kLanes;
        Vec tanh;
        Vec score = load(lanes);
        if (shaped) score = score_lanes(score, scale, rows[r], block_begin + v * kLanes, &tanh);
        if (masked) {
          BlockView const kept = view_lanes(view, v);
          score = keep_lanes(score, kept.begin, kept.end, broadcast(-kInfinity));
        }
        store(lanes, score);
      }
    }
    return true;
  }

  // So few queries that a copy of the keys costs more than it saves.
  bool is_decode() const { return tile.num_rows <= kTileRows; }

  void load_keys(int64_t begin, int64_t num_keys) const {
    if (!is_decode()) pack_transposed<kDType>(shared.k, keys, begin, num_keys, d);
  }

  // The block's values as fp32 rows: in place where they are that already and few queries read
  // them, else packed, since rows far apart share cache sets.
  float const* load_values(int64_t begin, int64_t num_keys, int64_t* ld_values) const {
    if (kDType == DType::kFloat32 && d % kLanes == 0 && is_decode() &&
        values.evenly_spaced(begin, begin + num_keys)) {
      *ld_values = values.row_bytes / 4;
      return reinterpret_cast<float const*>(values.row(begin));
    }
    pack_rows<kDType>(shared.v, values, begin, num_keys, d);
    *ld_values = d_pad;
    return shared.v;
  }

  // One block for up to six rows: online softmax, then O = O * a + P V.
  void block(int64_t r0, int64_t n, int64_t block_begin, float const* block_values,
             int64_t ld_values) const {
    RowView const* const rows = scratch.rows + r0;
    int vec_begin, vec_end;
    if (!scores(r0, n, block_begin, rows, &vec_begin, &vec_end)) return;

    // m' = max(m, scores); a = exp2(m - m'), all rows of the group in one vector.
    alignas(64) float rescale[kLanes] = {};
    float reference[kTileRows];
    for (int64_t r = 0; r < n; ++r) {
      float const* const s = shared.s + (r0 + r) * kBlockKeys;
      Vec top = load(s + vec_begin * kLanes);
      for (int v = vec_begin + 1; v < vec_end; ++v) top = maximum(top, load(s + v * kLanes));
      float const block_max = max_of_lanes(top), m = scratch.m[r0 + r];
      float const m_new = m > block_max ? m : block_max;
      reference[r] = m_new == -kInfinity ? 0.0f : m_new;
      rescale[r] = m - reference[r];
      scratch.m[r0 + r] = m_new;
    }
    store(rescale, exp2_of(load(rescale)));

    // p = exp2(s - m'); l = l * a + sum(p): lane i sums keys i, i + 16, ... in ascending order.
    BlockView const first = view_block(rows[0], block_begin);
    bool alike = true;  // all rows see the same keys of the block
    for (int64_t r = 0; r < n; ++r) {
      float* const s = shared.s + (r0 + r) * kBlockKeys;
      Vec l = load(scratch.l + (r0 + r) * kLanes) * broadcast(rescale[r]);
      for (int v = vec_begin; v < vec_end; ++v) {
        Vec const p = exp2_of(load(s + v * kLanes) - broadcast(reference[r]));
        store(s + v * kLanes, p);
        l = l + p;
      }
      store(scratch.l + (r0 + r) * kLanes, l);
      BlockView const seen = view_block(rows[r], block_begin);
      alike = alike && seen.begin == first.begin && seen.end == first.end;
      if (params.score.dropout_p > 0.0) drop(rows[r], block_begin, s);
    }
    // Each row adds the keys that it sees and no other, so that not even an infinity or a NaN in a
    // key beyond its mask can reach it through a neighbour (0 * inf).
    int64_t const step = alike ? n : 1;
    for (int64_t r = 0; r < n; r += step) {
      BlockView const seen = view_block(rows[r], block_begin);
      multiply(step, scratch.o + (r0 + r) * d_pad, d_pad, rescale + r, /*overwrites=*/false,
               {shared.s + (r0 + r) * kBlockKeys + seen.begin, kBlockKeys, 1},
               block_values + seen.begin * ld_values, ld_values, d_pad / kLanes,
               seen.end - seen.begin);
    }
  }

  void drop(RowView const& row, int64_t block_begin, float* p) const {
    alignas(64) float factor[kBlockKeys];
    dropout_factors(params.score, tile.batch, row.head, row.query, block_begin, kBlockKeys, factor);
    for (int64_t j = 0; j < kBlockKeys; ++j) p[j] = factor[j] == 0.0f ? 0.0f : p[j] * factor[j];
  }

  void open_segment() const {
    for (int64_t r = 0; r < tile.num_rows; ++r) scratch.m[r] = -kInfinity;
    std::memset(scratch.l, 0, sizeof(float) * tile.num_rows * kLanes);
    std::memset(scratch.o, 0, sizeof(float) * tile.num_rows * d_pad);
  }

  // A row's segment moved to the reference ceil(m), once: its O still has to be multiplied by
  // weight. A row that sees this segment alone is not moved.
  struct Closed {
    float reference, sum, weight;
  };
  Closed close_row(int64_t r, int64_t segment_begin, int64_t segment_end) const {
    float const m = scratch.m[r], sum = sum_of_lanes(load(scratch.l + r * kLanes));
    if (!contract::closes(row(r).visible, segment_begin, segment_end)) return {m, sum, 1.0f};
    float const reference = __builtin_ceilf(m);
    alignas(64) float weight[kLanes];
    store(weight, exp2_of(broadcast(m == -kInfinity ? 0.0f : m - reference)));
    return {reference, sum * weight[0], weight[0]};
  }

  // The fold of contract.h.
  void fold_row(int64_t r, float const* o, Closed const& closed) const {
    contract::FoldWeights const weights =
        contract::fold_weights(scratch.m_fold[r], closed.reference);
    float* const fold = scratch.o_fold + r * d_pad;
    for (int64_t c = 0; c < d_pad; c += kLanes) {
      Vec const part = load(o + c) * broadcast(closed.weight);
      Vec const before = load(fold + c) * broadcast(weights.fold);
      store(fold + c, multiply_add(part, broadcast(weights.part), before));
    }
    scratch.l_fold[r] = contract::add_part(weights, scratch.l_fold[r], closed.sum);
    scratch.m_fold[r] = weights.reference;
  }

  void open_fold() const {
    for (int64_t r = 0; r < tile.num_rows; ++r) {
      scratch.m_row[r] = scratch.m_fold[r] = -kInfinity;
      scratch.l_fold[r] = 0.0f;
    }
    std::memset(scratch.o_fold, 0, sizeof(float) * tile.num_rows * d_pad);
  }

  // out = O * (1 / l); a row that saw nothing is zero. Adding +0 gives all zeros one sign.
  void finish() const {
    for (int64_t r = 0; r < tile.num_rows; ++r) {
      RowView const& view = row(r);
      float* const o = scratch.o_fold + r * d_pad;
      float const sum = scratch.l_fold[r], inverse = contract::inverse_of_sum(sum);
      for (int64_t c = 0; c < d_pad; c += kLanes) {
        store(o + c, load(o + c) * broadcast(inverse) + broadcast(0.0f));
      }
      unpack_row(kDType, query_row(params.out, sequence, view.query, view.head, kBytes), o, d);
      params.lse[lse_index(view)] = contract::log_sum_exp(scratch.m_fold[r], sum);
    }
  }

  void emit(PartialBuffers const& partials, int64_t segment, int64_t r,
            Closed const& closed) const {
    int64_t const index = segment * partials.rows + lse_index(row(r));
    float* const o = scratch.o + r * d_pad;
    for (int64_t c = 0; c < d_pad; c += kLanes) {
      store(o + c, load(o + c) * broadcast(closed.weight));
    }
    std::memcpy(partials.out + index * d, o, sizeof(float) * d);
    partials.max_log2[index] = closed.reference;
    partials.sum[index] = closed.sum;
  }

  // Closes segment `segment`, keys [begin, end): hands its rows on, or folds them.
  void close_segment(int64_t segment, int64_t begin, int64_t end,
                     PartialBuffers const* partials) const {
    for (int64_t r = 0; r < tile.num_rows; ++r) {
      if (scratch.m[r] > scratch.m_row[r]) scratch.m_row[r] = scratch.m[r];
      Closed const closed = close_row(r, begin, end);
      if (partials) {
        emit(*partials, segment, r, closed);
      } else {
        fold_row(r, scratch.o + r * d_pad, closed);
      }
    }
  }
};

}  // namespace fa::cpu::FA_ISA
