// The backward pass, in two walks that never add into each other's results:
//   query tiles  dQ of a row sums over blocks of keys in ascending order;
//   key tiles    dK, dV of a key sum over query heads, in each over blocks of queries, ascending.
// Scores are computed in both, which costs two products of seven and buys results that no schedule
// can touch, with no memory beyond the tile's own.
//
//   P = exp(S - lse), dP = dO V^T, dS = P (dP - delta), delta = sum(dO * O)
//   dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO
// Dropout multiplies P in dV, and dP, by keep / (1 - p).
#pragma once

#include "csrc/cpu/dropout.h"
#include "csrc/cpu/family.h"
#include "csrc/cpu/gemm.h"
#include "csrc/cpu/scores.h"

namespace fa::cpu::FA_ISA {

constexpr float kLog2EHigh = static_cast<float>(kLog2E);
constexpr float kLog2ELow = static_cast<float>(kLog2E - static_cast<double>(kLog2EHigh));
constexpr int64_t kBlockQueries = contract::CpuOrder::gradients(0).block_queries;

struct BackwardScratch {
  float* q;     // (rows, d_pad)   queries, scaled as in the forward pass
  float* dout;  // (rows, d_pad)
  float* s;     // (rows, 64)      scores, then P (what dV sums)
  float* ds;    // (rows, 64)      dP, then dS
  float* k_t;   // (d_pad, 64)     keys, transposed
  float* v_t;   // (d_pad, 64)     values, transposed
  float* acc0;  // (rows or 64, d_pad)   dQ, or dK
  float* acc1;  // (64, d_pad)           keys for dQ, or dV

  static int64_t floats(int64_t rows, int64_t d) {
    int64_t const d_pad = round_up_lanes(d), tall = rows > kBlockKeys ? rows : kBlockKeys;
    return rows * (2 * d_pad + 2 * kBlockKeys) + 3 * kBlockKeys * d_pad + tall * d_pad;
  }
  BackwardScratch(float* base, int64_t rows, int64_t d) {
    int64_t const d_pad = round_up_lanes(d), tall = rows > kBlockKeys ? rows : kBlockKeys;
    auto const take = [&](int64_t n) {
      float* const p = base;
      base += n;
      return p;
    };
    q = take(rows * d_pad), dout = take(rows * d_pad), s = take(rows * kBlockKeys),
    ds = take(rows * kBlockKeys);
    k_t = take(d_pad * kBlockKeys), v_t = take(d_pad * kBlockKeys);
    acc0 = take(tall * d_pad), acc1 = take(kBlockKeys * d_pad);
  }
};

template <DType kDType>
struct BackwardTile {
  static constexpr int64_t kBytes = kDType == DType::kFloat32 ? 4 : 2;
  BackwardParams const& params;
  int64_t const batch, group, d, d_pad;
  Sequence const sequence;
  ScoreScale const scale;
  BackwardScratch const scratch;

  BackwardTile(BackwardParams const& p, int64_t batch_idx, int64_t rows, float* workspace)
      : params(p),
        batch(batch_idx),
        group(p.layout.h_q / p.layout.h_kv),
        d(p.layout.d),
        d_pad(round_up_lanes(p.layout.d)),
        sequence(sequence_of(p.layout, batch_idx)),
        scale(ScoreScale::of(p.score)),
        scratch(workspace, rows, p.layout.d) {}

  RowView view(int64_t head, int64_t query) const {
    return view_row(params.score, sequence, batch, head, query);
  }
  RowView flat_row(int64_t head_kv, int64_t flat) const {
    return view_flat_row(params.score, sequence, batch, head_kv, group, flat);
  }
  float lse(RowView const& row) const {
    return params.lse[sequence.lse_base + row.head * params.layout.lse_head_stride + row.query];
  }
  float* delta(RowView const& row) const {
    int64_t const base = params.layout.cu_seqlens_q
                             ? sequence.first_query + batch * params.delta_sequence_pad
                             : batch * params.delta_batch_stride;
    return params.delta + base + row.head * params.delta_head_stride + row.query;
  }

  void load_row(int64_t r, RowView const& row) const {
    pack_row<kDType>(scratch.q + r * d_pad,
                     query_row(params.q, sequence, row.query, row.head, kBytes), d, scale.query);
    pack_row<kDType>(scratch.dout + r * d_pad,
                     query_row(params.dout, sequence, row.query, row.head, kBytes), d, 1.0f);
  }

  void load_block(KeyRows const& keys, KeyRows const& values, int64_t begin,
                  int64_t num_keys) const {
    pack_transposed<kDType>(scratch.k_t, keys, begin, num_keys, d);
    pack_transposed<kDType>(scratch.v_t, values, begin, num_keys, d);
  }

  // s = P and ds = dS for rows r0 .. r0 + n against one block of num_keys keys; zero where a row
  // does not see.
  void gradients_of_scores(int64_t r0, int64_t n, RowView const* rows, int64_t block_begin,
                           int64_t num_keys) const {
    int const vecs = static_cast<int>((num_keys + kLanes - 1) / kLanes);
    float* const s0 = scratch.s + r0 * kBlockKeys;
    float* const ds0 = scratch.ds + r0 * kBlockKeys;
    multiply(n, s0, kBlockKeys, nullptr, /*overwrites=*/true, {scratch.q + r0 * d_pad, d_pad, 1},
             scratch.k_t, kBlockKeys, vecs, d);
    multiply(n, ds0, kBlockKeys, nullptr, /*overwrites=*/true,
             {scratch.dout + r0 * d_pad, d_pad, 1}, scratch.v_t, kBlockKeys, vecs, d);
    Vec const zero = broadcast(0.0f), one = broadcast(1.0f);
    for (int64_t r = 0; r < n; ++r) {
      BlockView const seen = view_block(rows[r], block_begin);
      Vec const minus_lse = broadcast(0.0f - lse(rows[r])), row_delta = broadcast(*delta(rows[r]));
      alignas(64) float keep[kBlockKeys];
      bool const lone =
          rows[r].visible.end - rows[r].visible.begin == 1 && __builtin_isfinite(lse(rows[r]));
      bool const drops = params.score.dropout_p > 0.0;
      if (drops) {
        dropout_factors(params.score, batch, rows[r].head, rows[r].query, block_begin, kBlockKeys,
                        keep);
      }
      for (int v = 0; v < vecs; ++v) {
        float* const s = s0 + r * kBlockKeys + v * kLanes;
        float* const ds = ds0 + r * kBlockKeys + v * kLanes;
        BlockView const kept = view_lanes(seen, v);
        if (kept.begin >= kept.end) {
          store(s, zero), store(ds, zero);
          continue;
        }
        Vec tanh = zero;
        Vec const score = score_lanes(load(s), scale, rows[r], block_begin + v * kLanes, &tanh);
        // score - lse log2 e, with log2 e in two parts: only lse's own rounding is left.
        Vec p = exp2_of(multiply_add(minus_lse, broadcast(kLog2ELow),
                                     multiply_add(minus_lse, broadcast(kLog2EHigh), score)));
        Vec dp = load(ds);
        if (drops) dp = dp * load(keep + v * kLanes);
        // A row that sees one key has P = 1 and dS = 0, of which lse and delta keep roundings.
        if (lone) p = one;
        Vec gradient = (lone ? zero : p) * (dp - row_delta);
        if (scale.cap > 0.0f) gradient = gradient * (one - tanh * tanh);
        if (drops) p = p * load(keep + v * kLanes);
        store(s, keep_lanes(p, kept.begin, kept.end, zero));
        store(ds, keep_lanes(gradient, kept.begin, kept.end, zero));
      }
    }
  }

  // row = acc * factor; adding +0 gives every zero the same sign.
  void write_row(char* row, float* acc, float factor) const {
    for (int64_t c = 0; c < d_pad; c += kLanes) {
      store(acc + c, load(acc + c) * broadcast(factor) + broadcast(0.0f));
    }
    unpack_row(kDType, row, acc, d);
  }
};

// delta = sum over columns of dout * out: lane i sums columns i, i + 16, ..., then the lanes' fixed
// tree.
template <DType kDType>
static void backward_delta_tile(BackwardParams const& params, QueryTile const& tile) {
  BackwardTile<kDType> const t(params, tile.batch, 0, nullptr);
  for (int64_t r = tile.row_begin; r < tile.row_begin + tile.num_rows; ++r) {
    RowView const row = t.flat_row(tile.head_kv, r);
    char const* const out = query_row(params.out, t.sequence, row.query, row.head, t.kBytes);
    char const* const dout = query_row(params.dout, t.sequence, row.query, row.head, t.kBytes);
    Vec sum = broadcast(0.0f);
    for (int64_t c = 0; c < t.d; c += kLanes) {
      sum =
          multiply_add(load_columns<kDType>(out, c, t.d), load_columns<kDType>(dout, c, t.d), sum);
    }
    *t.delta(row) = sum_of_lanes(sum);
  }
}

template <DType kDType>
static void backward_query_tile(BackwardParams const& params, QueryTile const& tile,
                                float* workspace) {
  BackwardTile<kDType> const t(params, tile.batch, tile.num_rows, workspace);
  KeyRows const keys = key_rows(params.k, params.layout, t.sequence, tile.head_kv, t.kBytes);
  KeyRows const values = key_rows(params.v, params.layout, t.sequence, tile.head_kv, t.kBytes);
  auto const row = [&](int64_t r) { return t.flat_row(tile.head_kv, tile.row_begin + r); };
  for (int64_t r = 0; r < tile.num_rows; ++r) t.load_row(r, row(r));
  std::memset(t.scratch.acc0, 0, sizeof(float) * tile.num_rows * t.d_pad);

  int64_t const begin = row(0).visible.begin / kBlockKeys * kBlockKeys,
                end = row(tile.num_rows - 1).visible.end;
  for (int64_t block = begin; block < end; block += kBlockKeys) {  // ascending
    int64_t const left = t.sequence.s_k - block, num_keys = left < kBlockKeys ? left : kBlockKeys;
    t.load_block(keys, values, block, num_keys);
    pack_rows<kDType>(t.scratch.acc1, keys, block, num_keys, t.d);
    for (int64_t r0 = 0; r0 < tile.num_rows; r0 += kTileRows) {
      int64_t const n = tile.num_rows - r0 < kTileRows ? tile.num_rows - r0 : kTileRows;
      RowView rows[kTileRows];
      for (int64_t r = 0; r < n; ++r) rows[r] = row(r0 + r);
      if (rows[0].visible.begin >= block + num_keys || rows[n - 1].visible.end <= block) continue;
      t.gradients_of_scores(r0, n, rows, block, num_keys);
      multiply(n, t.scratch.acc0 + r0 * t.d_pad, t.d_pad, nullptr, /*overwrites=*/false,
               {t.scratch.ds + r0 * kBlockKeys, kBlockKeys, 1}, t.scratch.acc1, t.d_pad,
               t.d_pad / kLanes, num_keys);
    }
  }
  for (int64_t r = 0; r < tile.num_rows; ++r) {
    RowView const view = row(r);
    t.write_row(query_row(params.dq, t.sequence, view.query, view.head, t.kBytes),
                t.scratch.acc0 + r * t.d_pad, static_cast<float>(params.score.softmax_scale));
  }
}

template <DType kDType>
static void backward_key_tile(BackwardParams const& params, KeyTile const& tile, float* workspace) {
  BackwardTile<kDType> const t(params, tile.batch, kBlockQueries, workspace);
  KeyRows const keys = key_rows(params.k, params.layout, t.sequence, tile.head_kv, t.kBytes);
  KeyRows const values = key_rows(params.v, params.layout, t.sequence, tile.head_kv, t.kBytes);
  t.load_block(keys, values, tile.key_begin, tile.num_keys);
  float* const dk = t.scratch.acc0;
  float* const dv = t.scratch.acc1;
  std::memset(dk, 0, sizeof(float) * kBlockKeys * t.d_pad);
  std::memset(dv, 0, sizeof(float) * kBlockKeys * t.d_pad);

  contract::KeyRange const seeing =
      contract::seeing_queries(tile.key_begin, tile.key_begin + tile.num_keys, t.sequence.s_q,
                               t.sequence.s_k, params.score.window_left, params.score.window_right);
  for (int64_t g = 0; g < t.group; ++g) {  // query heads ascending
    int64_t const head = tile.head_kv * t.group + g;
    for (int64_t block = seeing.begin / kBlockQueries * kBlockQueries; block < seeing.end;
         block += kBlockQueries) {  // queries ascending; those that see nothing are left out
      int64_t const first = block > seeing.begin ? block : seeing.begin,
                    end = block + kBlockQueries < seeing.end ? block + kBlockQueries : seeing.end,
                    num_rows = end - first;
      for (int64_t r0 = 0; r0 < num_rows; r0 += kTileRows) {
        int64_t const n = num_rows - r0 < kTileRows ? num_rows - r0 : kTileRows;
        RowView rows[kTileRows];
        for (int64_t r = 0; r < n; ++r) {
          rows[r] = t.view(head, first + r0 + r);
          t.load_row(r0 + r, rows[r]);
        }
        t.gradients_of_scores(r0, n, rows, tile.key_begin, tile.num_keys);
      }
      // P and dS are read transposed: row = key, k = query.
      multiply(tile.num_keys, dv, t.d_pad, nullptr, /*overwrites=*/false,
               {t.scratch.s, 1, kBlockKeys}, t.scratch.dout, t.d_pad, t.d_pad / kLanes, num_rows);
      multiply(tile.num_keys, dk, t.d_pad, nullptr, /*overwrites=*/false,
               {t.scratch.ds, 1, kBlockKeys}, t.scratch.q, t.d_pad, t.d_pad / kLanes, num_rows);
    }
  }
  KeyRows const dk_rows = key_rows(params.dk, params.layout, t.sequence, tile.head_kv, t.kBytes);
  KeyRows const dv_rows = key_rows(params.dv, params.layout, t.sequence, tile.head_kv, t.kBytes);
  for (int64_t j = 0; j < tile.num_keys; ++j) {
    t.write_row(dk_rows.row(tile.key_begin + j), dk + j * t.d_pad, t.scale.key_gradient);
    t.write_row(dv_rows.row(tile.key_begin + j), dv + j * t.d_pad, 1.0f);
  }
}

}  // namespace fa::cpu::FA_ISA
