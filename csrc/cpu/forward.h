// The forward pass of one task: the heads of a query tile against their visible keys.
//
// Order: blocks ascending inside a segment, segments ascending in the fold, d and keys ascending in
// the products. Heads take turns at every block, so that keys are read in the order of their
// addresses; heads do not meet, so that is free.
#pragma once

#include <new>

#include "csrc/cpu/forward_tile.h"

namespace fa::cpu::FA_ISA {

// The heads of a task, and their scratch, in one allocation.
template <DType kDType>
class ForwardHeads {
 public:
  ForwardHeads(ForwardParams const& params, QueryTile const& tile, float* workspace)
      : size_(tile.num_heads), heads_(reinterpret_cast<ForwardTile<kDType>*>(workspace)) {
    int64_t const d = params.layout.d;
    float* const block_floats = workspace + round_up_lanes(size_ * kTileFloats);
    float* const row_floats = block_floats + round_up_lanes(BlockScratch::floats(tile.num_rows, d));
    for (int64_t h = 0; h < size_; ++h) {
      float* const own = row_floats + h * round_up_lanes(RowScratch::floats(tile.num_rows, d));
      new (heads_ + h) ForwardTile<kDType>(params, tile, tile.head_kv + h, block_floats, own);
    }
  }
  static int64_t floats(int64_t rows, int64_t heads, int64_t d) {
    return round_up_lanes(heads * kTileFloats) + round_up_lanes(BlockScratch::floats(rows, d)) +
           heads * round_up_lanes(RowScratch::floats(rows, d));
  }

  ForwardTile<kDType> const* begin() const { return heads_; }
  ForwardTile<kDType> const* end() const { return heads_ + size_; }

 private:
  static constexpr int64_t kTileFloats = (sizeof(ForwardTile<kDType>) + 3) / 4;
  int64_t size_;
  ForwardTile<kDType>* heads_;
};

template <DType kDType>
static void store_dropout_mask(ForwardTile<kDType> const& t);

// Reads the block in the order of its addresses: the hardware's prefetcher follows such a walk, and
// not the transposing one that comes after it.
template <DType kDType>
static void touch_block(ForwardHeads<kDType> const& heads, int64_t block, int64_t num_keys,
                        int64_t row_bytes) {
  for (int64_t key = block; key < block + num_keys; ++key) {
    for (auto const& t : heads) touch_row(t.keys.row(key), row_bytes);
  }
  for (int64_t key = block; key < block + num_keys; ++key) {
    for (auto const& t : heads) touch_row(t.values.row(key), row_bytes);
  }
}

template <DType kDType>
static void forward_tile(ForwardParams const& params, QueryTile const& tile,
                         Segmentation const& segmentation, int64_t segment_begin,
                         int64_t segment_end, PartialBuffers const* partials, float* workspace) {
  ForwardHeads<kDType> const heads(params, tile, workspace);
  ForwardTile<kDType> const& first = *heads.begin();
  contract::KeyRange const visible = first.visible();  // the same for all heads
  int64_t const s_k = first.sequence.s_k, row_bytes = first.d * first.kBytes;
  for (auto const& t : heads) t.load_queries(), t.open_fold();

  for (int64_t segment = segment_begin; segment < segment_end; ++segment) {  // ascending
    int64_t const first_key = segmentation.begin(segment);
    int64_t const end_key = segmentation.begin(segment + 1);
    int64_t begin = first_key, end = end_key;
    if (begin < visible.begin) begin = visible.begin / kBlockKeys * kBlockKeys;
    if (end > visible.end) end = visible.end;
    if (begin >= end && !partials) continue;
    for (auto const& t : heads) t.open_segment();
    for (int64_t block = begin; block < end; block += kBlockKeys) {  // ascending
      int64_t const num_keys = s_k - block < kBlockKeys ? s_k - block : kBlockKeys;
      touch_block(heads, block, num_keys, row_bytes);
      for (auto const& t : heads) {
        int64_t ld_values;
        t.load_keys(block, num_keys);
        float const* const values = t.load_values(block, num_keys, &ld_values);
        for (int64_t r = 0; r < tile.num_rows; r += kTileRows) {
          int64_t const n = tile.num_rows - r < kTileRows ? tile.num_rows - r : kTileRows;
          t.block(r, n, block, values, ld_values);
        }
      }
    }
    for (auto const& t : heads) t.close_segment(segment, first_key, end_key, partials);
  }
  if (partials) return;
  for (auto const& t : heads) {
    t.finish();
    if (params.s_dmask) store_dropout_mask(t);
  }
}

// S_dmask = exp(score - the row's maximum), negative where dropped; a second walk over the keys,
// for debugging only.
template <DType kDType>
static void store_dropout_mask(ForwardTile<kDType> const& t) {
  contract::KeyRange const visible = t.visible();
  for (int64_t block = visible.begin / kBlockKeys * kBlockKeys; block < visible.end;
       block += kBlockKeys) {
    int64_t const left = t.sequence.s_k - block, num_keys = left < kBlockKeys ? left : kBlockKeys;
    t.load_keys(block, num_keys);
    for (int64_t r = 0; r < t.tile.num_rows; ++r) {
      RowView const& row = t.row(r);
      int vec_begin, vec_end;
      if (!t.scores(r, 1, block, &row, &vec_begin, &vec_end)) continue;
      alignas(64) float factor[kBlockKeys];
      dropout_factors(t.params.score, t.tile.batch, row.head, row.query, block, kBlockKeys, factor);
      BlockView const view = view_block(row, block);
      int64_t const base =
          ((t.tile.batch * t.params.layout.h_q + row.head) * t.params.s_dmask_rows + row.query) *
              t.params.s_dmask_cols +
          block;
      for (int v = vec_begin; v < vec_end; ++v) {
        float* const s = t.shared.s + r * kBlockKeys + v * kLanes;
        store(s, exp2_of(load(s) - broadcast(t.scratch.m_row[r])));
      }
      for (int j = view.begin; j < view.end; ++j) {
        float const p = t.shared.s[r * kBlockKeys + j];
        store_scalar(kDType, t.params.s_dmask, base + j, factor[j] == 0.0f ? 0.0f - p : p);
      }
    }
  }
}

template <DType kDType>
static void fold_tile(ForwardParams const& params, QueryTile const& tile,
                      PartialBuffers const& partials, int64_t num_segments, float* workspace) {
  ForwardHeads<kDType> const heads(params, tile, workspace);
  for (auto const& t : heads) {
    t.open_fold();
    std::memset(t.scratch.o, 0, sizeof(float) * tile.num_rows * t.d_pad);
    for (int64_t segment = 0; segment < num_segments; ++segment) {  // ascending
      for (int64_t r = 0; r < tile.num_rows; ++r) {
        int64_t const index = segment * partials.rows + t.lse_index(t.row(r));
        float* const o = t.scratch.o + r * t.d_pad;
        std::memcpy(o, partials.out + index * t.d, sizeof(float) * t.d);
        t.fold_row(r, o, {partials.max_log2[index], partials.sum[index], /*weight=*/1.0f});
      }
    }
    t.finish();
  }
}

}  // namespace fa::cpu::FA_ISA
