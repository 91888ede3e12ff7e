// The forward pass of one query tile: rows against their visible keys, block by block, segment by
// segment.
//
// Order     blocks ascending inside a segment, segments ascending in the fold, d and keys ascending
// in the products. Scratch   everything fp32; `rows` is the tile's height, d_pad the head dim
// rounded up to 16.
#pragma once

#include "csrc/cpu/dropout.h"
#include "csrc/cpu/family.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/scores.h"

namespace fa::cpu::FA_ISA {

// One tile's scratch, cut from a single allocation.
struct ForwardScratch {
  float* q;       // (rows, d_pad)     queries, scaled
  float* o;       // (rows, d_pad)     this segment's sum of p v
  float* o_fold;  // (rows, d_pad)     the segments folded so far
  float* s;       // (rows, 64)        scores, then probabilities
  float* k;       // (d_pad, 64)       this block's keys, transposed
  float* v;       // (64, d_pad)       this block's values
  float* l;       // (rows, 16)        this segment's running sums, one a lane
  float* m;       // (rows)            this segment's running maximum, log2 units
  float* m_row;   // (rows)            the maximum over all segments
  float* m_fold;  // (rows)            reference of the fold, an integer
  float* l_fold;  // (rows)            sum of the fold
  RowView* rows;  // (rows)            coordinates and visible sets

  static constexpr int64_t kRowViewFloats = (sizeof(RowView) + 3) / 4;

  static int64_t floats(int64_t rows, int64_t d) {
    int64_t const d_pad = round_up_lanes(d);
    return rows * (3 * d_pad + kBlockKeys + kLanes) + 4 * round_up_lanes(rows) +
           round_up_lanes(rows * kRowViewFloats) + 2 * kBlockKeys * d_pad;
  }
  ForwardScratch(float* base, int64_t rows, int64_t d) {
    int64_t const d_pad = round_up_lanes(d);
    auto const take = [&](int64_t n) {
      float* const p = base;
      base += round_up_lanes(n);
      return p;
    };
    q = take(rows * d_pad), o = take(rows * d_pad), o_fold = take(rows * d_pad),
    s = take(rows * kBlockKeys);
    k = take(d_pad * kBlockKeys), v = take(kBlockKeys * d_pad), l = take(rows * kLanes);
    m = take(rows), m_row = take(rows), m_fold = take(rows), l_fold = take(rows);
    this->rows = reinterpret_cast<RowView*>(take(rows * kRowViewFloats));
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
  ForwardScratch const scratch;

  ForwardTile(ForwardParams const& p, QueryTile const& t, float* workspace)
      : params(p),
        tile(t),
        group(p.layout.h_q / p.layout.h_kv),
        d(p.layout.d),
        d_pad(round_up_lanes(p.layout.d)),
        sequence(sequence_of(p.layout, t.batch)),
        scale(ScoreScale::of(p.score)),
        scratch(workspace, t.num_rows, p.layout.d) {
    for (int64_t r = 0; r < t.num_rows; ++r) {
      int64_t const flat = t.row_begin + r;
      scratch.rows[r] =
          view_row(p.score, sequence, t.batch, t.head_kv * group + flat % group, flat / group);
    }
  }

  RowView const& row(int64_t r) const { return scratch.rows[r]; }
  int64_t lse_index(RowView const& row) const {
    return sequence.lse_base + row.head * params.layout.lse_head_stride + row.query;
  }

  // The keys that any row of the tile sees: rows ascend, so the first begins and the last ends the
  // union.
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

  // s (rows r0 .. r0 + n, 64 keys of the block) = scores in log2 units, -inf where masked. Only the
  // lanes of
  // [*vec_begin, *vec_end) * 16 are computed: no row of the group sees the others. False: none sees
  // any.
  bool scores(int64_t r0, int64_t n, int64_t block_begin, float const* keys, RowView const* rows,
              int* vec_begin, int* vec_end) const {
    BlockView seen = view_block(rows[0], block_begin);
    for (int64_t r = 1; r < n; ++r) {
      BlockView const view = view_block(rows[r], block_begin);
      seen.begin = view.begin < seen.begin ? view.begin : seen.begin;
      seen.end = view.end > seen.end ? view.end : seen.end;
    }
    if (seen.begin >= seen.end) return false;
    *vec_begin = seen.begin / kLanes;
    *vec_end = (seen.end + kLanes - 1) / kLanes;
    float* const s = scratch.s + r0 * kBlockKeys + *vec_begin * kLanes;
    multiply(n, s, kBlockKeys, nullptr, /*from_zero=*/true, {scratch.q + r0 * d_pad, d_pad, 1},
             keys + *vec_begin * kLanes, kBlockKeys, *vec_end - *vec_begin, d);

    bool const shaped = scale.cap > 0.0f || params.score.alibi;
    for (int64_t r = 0; r < n; ++r) {
      BlockView const view = view_block(rows[r], block_begin);
      bool const masked = view.begin > *vec_begin * kLanes || view.end < *vec_end * kLanes;
      if (!shaped && !masked) continue;
      for (int v = *vec_begin; v < *vec_end; ++v) {
        float* const lanes = scratch.s + (r0 + r) * kBlockKeys + v * kLanes;
        Vec tanh;
        Vec score = load(lanes);
        if (shaped) score = score_lanes(score, scale, rows[r], block_begin + v * kLanes, &tanh);
        if (masked) score = keep_range(score, view, v, -kInfinity);
        store(lanes, score);
      }
    }
    return true;
  }

  FA_INLINE Vec keep_range(Vec a, BlockView view, int v, float fill) {
    auto const clamp = [&](int key) {
      int const lane = key - v * kLanes;
      return lane < 0 ? 0 : lane > kLanes ? kLanes : lane;
    };
    return keep_lanes(a, clamp(view.begin), clamp(view.end), broadcast(fill));
  }

  // Values of the block as fp32 rows: in place where they already are, else converted.
  float const* values(KeyRows const& v, int64_t block_begin, int64_t num_keys, int64_t* ld) const {
    if (kDType == DType::kFloat32 && d % kLanes == 0 &&
        v.evenly_spaced(block_begin, block_begin + num_keys)) {
      *ld = v.row_bytes / 4;
      return reinterpret_cast<float const*>(v.row(block_begin));
    }
    pack_rows<kDType>(scratch.v, v, block_begin, num_keys, d);
    *ld = d_pad;
    return scratch.v;
  }

  // One block for up to six rows: online softmax, then O = O * a + P V.
  void block(int64_t r0, int64_t n, int64_t block_begin, float const* values,
             int64_t ld_values) const {
    RowView const* const rows = scratch.rows + r0;
    int vec_begin, vec_end;
    if (!scores(r0, n, block_begin, scratch.k, rows, &vec_begin, &vec_end)) return;

    // m' = max(m, scores); a = exp2(m - m'), all rows of the group in one vector.
    alignas(64) float rescale[kLanes] = {};
    float reference[kTileRows];
    for (int64_t r = 0; r < n; ++r) {
      float const* const s = scratch.s + (r0 + r) * kBlockKeys;
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
    int last = 0;
    for (int64_t r = 0; r < n; ++r) {
      float* const s = scratch.s + (r0 + r) * kBlockKeys;
      Vec l = load(scratch.l + (r0 + r) * kLanes) * broadcast(rescale[r]);
      for (int v = vec_begin; v < vec_end; ++v) {
        Vec const p = exp2_of(load(s + v * kLanes) - broadcast(reference[r]));
        store(s + v * kLanes, p);
        l = l + p;
      }
      store(scratch.l + (r0 + r) * kLanes, l);
      BlockView const view = view_block(rows[r], block_begin);
      last = view.end > last ? view.end : last;
      if (params.score.dropout_p > 0.0f) drop(rows[r], block_begin, s);
    }
    multiply(n, scratch.o + r0 * d_pad, d_pad, rescale, /*from_zero=*/false,
             {scratch.s + r0 * kBlockKeys + vec_begin * kLanes, kBlockKeys, 1},
             values + vec_begin * kLanes * ld_values, ld_values, d_pad / kLanes,
             last - vec_begin * kLanes);
  }

  void drop(RowView const& row, int64_t block_begin, float* p) const {
    alignas(64) float factor[kBlockKeys];
    Dropout(params.score).factors(tile.batch, row.head, row.query, block_begin, kBlockKeys, factor);
    for (int64_t j = 0; j < kBlockKeys; ++j) p[j] = factor[j] == 0.0f ? 0.0f : p[j] * factor[j];
  }

  void open_segment() const {
    for (int64_t r = 0; r < tile.num_rows; ++r) scratch.m[r] = -kInfinity;
    std::memset(scratch.l, 0, sizeof(float) * tile.num_rows * kLanes);
    std::memset(scratch.o, 0, sizeof(float) * tile.num_rows * d_pad);
  }

  // Moves a row's segment to the reference ceil(m), once: O *= 2^(m - M). Returns M; *sum is the
  // row's l.
  float close_row(int64_t r, float* sum) const {
    float const m = scratch.m[r], reference = std::ceil(m);
    float const shift = m == -kInfinity ? 0.0f : m - reference;
    Vec const weight = exp2_of(broadcast(shift));
    for (int64_t c = 0; c < d_pad; c += kLanes) {
      store(scratch.o + r * d_pad + c, load(scratch.o + r * d_pad + c) * weight);
    }
    alignas(64) float w[kLanes];
    store(w, weight);
    *sum = sum_of_lanes(load(scratch.l + r * kLanes)) * w[0];
    return reference;
  }

  // fold = fold * 2^(M1 - M') + (o, l) * 2^(M2 - M'): exact products, one rounding.
  void fold_row(int64_t r, float const* o, float reference, float sum) const {
    float const common = contract::fold_reference(scratch.m_fold[r], reference);
    float const w1 = contract::fold_weight(scratch.m_fold[r], common),
                w2 = contract::fold_weight(reference, common);
    float* const fold = scratch.o_fold + r * d_pad;
    for (int64_t c = 0; c < d_pad; c += kLanes) {
      store(fold + c, load(fold + c) * broadcast(w1) + load(o + c) * broadcast(w2));
    }
    scratch.l_fold[r] = scratch.l_fold[r] * w1 + sum * w2;
    scratch.m_fold[r] = common;
  }

  void open_fold() const {
    for (int64_t r = 0; r < tile.num_rows; ++r)
      scratch.m_fold[r] = -kInfinity, scratch.l_fold[r] = 0.0f;
    std::memset(scratch.o_fold, 0, sizeof(float) * tile.num_rows * d_pad);
  }

  // out = O / l, rounded once; a row that saw nothing is zero. Adding +0 gives every zero the same
  // sign.
  void finish() const {
    for (int64_t r = 0; r < tile.num_rows; ++r) {
      RowView const& view = row(r);
      float* const o = scratch.o_fold + r * d_pad;
      float const sum = scratch.l_fold[r], divisor = sum == 0.0f ? 1.0f : sum;
      for (int64_t c = 0; c < d_pad; c += kLanes) {
        store(o + c, load(o + c) / broadcast(divisor) + broadcast(0.0f));
      }
      unpack_row(kDType, query_row(params.out, sequence, view.query, view.head, kBytes), o, d);
      params.lse[lse_index(view)] = contract::log_sum_exp(scratch.m_fold[r], sum);
    }
  }

  void emit(PartialBuffers const& partials, int64_t segment, int64_t r, float reference,
            float sum) const {
    int64_t const index = segment * partials.rows + lse_index(row(r));
    std::memcpy(partials.out + index * d, scratch.o + r * d_pad, sizeof(float) * d);
    partials.max_log2[index] = reference;
    partials.sum[index] = sum;
  }
};

template <DType kDType>
static void store_dropout_mask(ForwardTile<kDType> const& t, KeyRows const& keys);

template <DType kDType>
static void forward_tile(ForwardParams const& params, QueryTile const& tile,
                         Segmentation const& segmentation, int64_t segment_begin,
                         int64_t segment_end, PartialBuffers const* partials, float* workspace) {
  ForwardTile<kDType> const t(params, tile, workspace);
  KeyRows const keys = key_rows(params.k, params.layout, t.sequence, tile.head_kv, t.kBytes);
  KeyRows const values = key_rows(params.v, params.layout, t.sequence, tile.head_kv, t.kBytes);
  contract::KeyRange const visible = t.visible();
  t.load_queries();
  t.open_fold();
  for (int64_t r = 0; r < tile.num_rows; ++r) t.scratch.m_row[r] = -kInfinity;

  for (int64_t segment = segment_begin; segment < segment_end; ++segment) {  // ascending
    int64_t begin = segmentation.begin(segment), end = segmentation.begin(segment + 1);
    if (begin < visible.begin) begin = visible.begin / kBlockKeys * kBlockKeys;
    if (end > visible.end) end = visible.end;
    if (begin >= end && !partials) continue;
    t.open_segment();
    for (int64_t block = begin; block < end; block += kBlockKeys) {  // ascending
      int64_t const left = t.sequence.s_k - block, num_keys = left < kBlockKeys ? left : kBlockKeys;
      pack_transposed<kDType>(t.scratch.k, keys, block, num_keys, t.d);
      int64_t ld_values;
      float const* const block_values = t.values(values, block, num_keys, &ld_values);
      for (int64_t r = 0; r < tile.num_rows; r += kTileRows) {
        int64_t const n = tile.num_rows - r < kTileRows ? tile.num_rows - r : kTileRows;
        t.block(r, n, block, block_values, ld_values);
      }
    }
    for (int64_t r = 0; r < tile.num_rows; ++r) {
      if (t.scratch.m[r] > t.scratch.m_row[r]) t.scratch.m_row[r] = t.scratch.m[r];
      float sum;
      float const reference = t.close_row(r, &sum);
      if (partials) {
        t.emit(*partials, segment, r, reference, sum);
      } else {
        t.fold_row(r, t.scratch.o + r * t.d_pad, reference, sum);
      }
    }
  }
  if (partials) return;
  t.finish();
  if (params.s_dmask) store_dropout_mask(t, keys);
}

// S_dmask = exp(score - the row's maximum), negative where dropped; a second walk over the keys,
// for debugging only.
template <DType kDType>
static void store_dropout_mask(ForwardTile<kDType> const& t, KeyRows const& keys) {
  contract::KeyRange const visible = t.visible();
  for (int64_t block = visible.begin / kBlockKeys * kBlockKeys; block < visible.end;
       block += kBlockKeys) {
    int64_t const left = t.sequence.s_k - block, num_keys = left < kBlockKeys ? left : kBlockKeys;
    pack_transposed<kDType>(t.scratch.k, keys, block, num_keys, t.d);
    for (int64_t r = 0; r < t.tile.num_rows; ++r) {
      RowView const& row = t.row(r);
      int vec_begin, vec_end;
      if (!t.scores(r, 1, block, t.scratch.k, &row, &vec_begin, &vec_end)) continue;
      alignas(64) float factor[kBlockKeys];
      Dropout(t.params.score).factors(t.tile.batch, row.head, row.query, block, kBlockKeys, factor);
      BlockView const view = view_block(row, block);
      int64_t const base =
          ((t.tile.batch * t.params.layout.h_q + row.head) * t.params.s_dmask_rows + row.query) *
              t.params.s_dmask_cols +
          block;
      for (int v = vec_begin; v < vec_end; ++v) {
        float* const s = t.scratch.s + r * kBlockKeys + v * kLanes;
        store(s, exp2_of(load(s) - broadcast(t.scratch.m_row[r])));
      }
      for (int j = view.begin; j < view.end; ++j) {
        float const p = t.scratch.s[r * kBlockKeys + j];
        store_scalar(kDType, t.params.s_dmask, base + j, factor[j] == 0.0f ? 0.0f - p : p);
      }
    }
  }
}

template <DType kDType>
static void fold_tile(ForwardParams const& params, QueryTile const& tile,
                      PartialBuffers const& partials, int64_t num_segments, float* workspace) {
  ForwardTile<kDType> const t(params, tile, workspace);
  t.open_fold();
  std::memset(t.scratch.o, 0, sizeof(float) * tile.num_rows * t.d_pad);
  for (int64_t segment = 0; segment < num_segments; ++segment) {  // ascending
    for (int64_t r = 0; r < tile.num_rows; ++r) {
      int64_t const index = segment * partials.rows + t.lse_index(t.row(r));
      float* const o = t.scratch.o + r * t.d_pad;
      std::memcpy(o, partials.out + index * t.d, sizeof(float) * t.d);
      t.fold_row(r, o, partials.max_log2[index], partials.sum[index]);
    }
  }
  t.finish();
}

}  // namespace fa::cpu::FA_ISA
