// A decode: a tile of sixteen query rows against consecutive segments of keys.
//
// Memory bounds it, so four warps share the rows and a span of keys: each has the scores of its own
// keys, hands its probabilities to the others, and then has its own columns of the output. The
// order of arithmetic is that of a prefill, block for block.
#pragma once

#include "csrc/gpu/forward_tile.cuh"
#include "csrc/gpu/softmax.cuh"
#include "csrc/sm80/key_tiles.cuh"
#include "csrc/sm80/product.cuh"
#include "csrc/sm80/traits.h"

namespace fa::gpu::sm80 {

template <class Traits>
struct __align__(16) DecodeShared {
  TileInfo<Traits, KeyTiles<Traits>> info;
  float top[kWarpsPerBlock][Traits::kRows][4];  // of each warp's keys, by class
  float sum[kWarpsPerBlock][Traits::kRows][4];  // of each warp's probabilities, by class
  float m[Traits::kRows], l[Traits::kRows];     // of finished rows
};

template <class Traits>
struct DecodeTile : ForwardTile<Traits, KeyTiles<Traits>> {
  using Base = ForwardTile<Traits, KeyTiles<Traits>>;
  using Base::call, Base::lane, Base::launch, Base::info, Base::warp;
  using Element = typename Traits::Element;
  static constexpr int kD = Traits::kD, kRows = Traits::kRows, kSpan = Traits::kLoadKeys;
  static constexpr int kWarpKeys = Traits::kWarpKeys, kBlocks = Traits::kBlocks;
  static constexpr int kWarpsOfBlock = kWarpsPerBlock / kBlocks;
  static_assert(kWarpsOfBlock * kWarpKeys == kBlockKeys && kWarpKeys <= 32);
  static constexpr int kGroups = kD / 8 / kWarpsPerBlock;  // of eight columns, two of each sixteen
  static constexpr int kStages = Traits::kStages, kStageBytes = 2 * Traits::kLoadBytes;
  static constexpr int kUnderWay = 2 * kStages - 1;  // groups of copies behind the awaited one
  static constexpr int kClasses = contract::GpuOrder::kNumKeyClasses;
  using Scores = Product<1, kWarpKeys / 8>;
  using Columns = Product<1, kGroups>;

  DecodeShared<Traits>& shared;
  uint32_t const q, k, v, p;  // tiles (kRows, kD), (kSpan, kD), (kSpan, kD) a stage, (kRows, kSpan)

  // Of rows lane / 4 and + 8: this segment, and what was before it. Maxima and sums are the same in
  // all warps.
  Columns o, fold;
  float m[2], l[2], m_fold[2], l_fold[2];

  __device__ DecodeTile(ForwardLaunch const& l, char* memory)
      : DecodeTile(l, memory,
                   *reinterpret_cast<DecodeShared<Traits>*>(memory + Traits::kTileBytes)) {}
  __device__ DecodeTile(ForwardLaunch const& l, char* memory, DecodeShared<Traits>& s)
      : Base(l, s.info),
        shared(s),
        q(shared_address(memory)),
        k(q + Traits::kQueryBytes),
        v(k + Traits::kLoadBytes),
        p(k + kStages * kStageBytes) {
    static_assert(Traits::kTileBytes + sizeof(DecodeShared<Traits>) <= Traits::kSharedBytes);
  }

  __device__ void run() {
    this->find_work(static_cast<int>(blockIdx.x));
    if (this->find_rows()) run_tile();
  }

  __device__ void open_segment() {
    set_zero(o);
    m[0] = m[1] = kNoReference, l[0] = l[1] = 0.0f;
  }

  __device__ void run_tile() {
    contract::KeyRange const keys = this->keys();
    int const begin = static_cast<int>(keys.begin), end = static_cast<int>(keys.end);
    if (launch.hands_on_partials() && begin >= end)
      return;  // the fold leaves out what a row does not see
    RowView const &first = info.rows[0], &last = info.rows[this->rows_here() - 1];
    int const last_begin = last.begin, first_end = first.end;  // between them all rows see
    uint64_t dropout_key = 0;
    if (Traits::kFeatures && launch.scale.drops) dropout_key = philox_key(call.score.seed);

    open_segment();
    set_zero(fold);
    m_fold[0] = m_fold[1] = -INFINITY, l_fold[0] = l_fold[1] = 0.0f;
    if (begin < end) {
      int segment = static_cast<int>(launch.plan.segmentation.of(begin));
      int segment_end = this->segment_begin(segment + 1);
      if (warp == 0) {
        fill_scattered_rows<kD, kRows, Traits::kAnyAddress>(
            q, 0, this->row_address(call.q, lane), nullptr, static_cast<int>(call.layout.d),
            launch.aligned, lane);
      }
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        int const span = begin + stage * kSpan;
        if (span < end) info.keys.load(k + stage * kStageBytes, span, warp, lane);
        cp_async_commit();
        if (span < end) info.values.load(v + stage * kStageBytes, span, warp, lane);
        cp_async_commit();
      }
      cp_async_wait<kUnderWay>();
      __syncthreads();      // the queries are there
      int stage_bytes = 0;  // before this span's stage
#pragma unroll 1
      for (int span = begin; span < end; span += kSpan) {  // ascending
        int const next = span + kSpan, later = span + kStages * kSpan;
        uint32_t const k_now = k + stage_bytes, v_now = v + stage_bytes;
        stage_bytes = kStages == 2 ? kStageBytes - stage_bytes : 0;
        cp_async_wait<kUnderWay>();
        __syncwarp();  // this warp's keys are there: each warp copies the keys that it multiplies
        Scores s_or_p;
        multiply_abt<Element, kD>(s_or_p, q, 0, k_now, warp * kWarpKeys, lane);
        __syncwarp();  // nobody reads them any more
        if (later < end) info.keys.load(k_now, later, warp, lane);
        cp_async_commit();
        int const first_key = span + warp * kWarpKeys + lane % 4 * 2;
        if (Traits::kFeatures || span < last_begin || next > first_end)
          shape_and_mask<Traits::kFeatures>(s_or_p, info.rows, first_key, launch.scale, lane);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          shared.top[warp][accumulator_row(r, lane)][lane % 4] = largest_score(s_or_p, r);
        }
        __syncthreads();  // the maxima are there, and nobody reads the probabilities any more
        float rescale[kBlocks][2];
        softmax(s_or_p, rescale);
        if (Traits::kFeatures && launch.scale.drops)
          drop(s_or_p, info.rows, first_key, launch.scale.keep, dropout_key, info.batch, lane);
        put_probabilities(s_or_p);
        cp_async_wait<kUnderWay>();
        __syncthreads();  // the probabilities and their sums are there, and the values
        add_values(rescale, v_now);
        __syncthreads();  // nobody reads the values any more
        if (later < end) info.values.load(v_now, later, warp, lane);
        cp_async_commit();
        if (next >= segment_end || next >= end) {
          close(segment);
          open_segment();
          segment += 1;
          segment_end = this->segment_begin(segment + 1);
        }
      }
    }
    if (!launch.hands_on_partials()) finish();
  }

  // The reference moves at most once a block. This warp's scores become probabilities relative to
  // the reference of their block.
  __device__ __forceinline__ void softmax(Scores& s, float (&rescale)[kBlocks][2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int const row = accumulator_row(r, lane);
      float reference = 0.0f;
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
        float top[kClasses];  // of the block's keys
#pragma unroll
        for (int c = 0; c < kClasses; ++c) {
          top[c] = -INFINITY;
#pragma unroll
          for (int w = 0; w < kWarpsOfBlock; ++w)
            top[c] = fmaxf(top[c], shared.top[b * kWarpsOfBlock + w][row][c]);
        }
        float const scale = launch.scale.exponent_scale;
        float const highest = fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3]));
        float const lowest = fminf(fminf(top[0], top[1]), fminf(top[2], top[3]));
        rescale[b][r] = move_reference(
            m[r], highest, scale, [&](float largest) { return is_near(lowest, largest, scale); });
        if (b <= warp / kWarpsOfBlock) reference = m[r];
      }
      float sum = exponentiate(s, r, 0, launch.scale.exponent_scale, reference);
#pragma unroll
      for (int n = 1; n < kWarpKeys / 16; ++n)
        sum += exponentiate(s, r, 2 * n, launch.scale.exponent_scale, reference);
      shared.sum[warp][row][lane % 4] = sum;
    }
  }

  __device__ __forceinline__ void put_probabilities(Scores const& s) const {
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int n = 0; n < kWarpKeys / 8; ++n) {
        int const chunk = warp * (kWarpKeys / kChunk) + n;
        store_pair(p + TileLayout<kSpan>::offset(accumulator_row(r, lane), chunk) + lane % 4 * 4,
                   pack2<Element>(s[0][n][r * 2], s[0][n][r * 2 + 1]));
      }
  }

  // l = l a + sum(p), o = o a + p v, block after block; of o this warp's columns.
  __device__ __forceinline__ void add_values(float const (&rescale)[kBlocks][2], uint32_t v_now) {
    auto const p_at = cursor_a<kSpan>(p, 0, lane);
    auto const v_at = cursor_b_transposed<kD>(v_now, 0, lane, 2 * warp);
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        auto const sum = [&](int i) {
          return shared.sum[b * kWarpsOfBlock + i][accumulator_row(r, lane)][lane % 4];
        };
        float block_sum = sum(0) + sum(1);  // ((0 + 1) + (2 + 3)) of the block's sixteens
        if constexpr (kWarpsOfBlock == 4) block_sum += sum(2) + sum(3);
        l[r] = l[r] * rescale[b][r] + block_sum;
      }
      rescale_rows(o, [&](int r) { return rescale[b][r]; });
      accumulate<Element, kBlockKeys>(
          o, [&](int i, int, uint32_t (&to)[4]) { ldmatrix_x4(to, p_at.at(0, b * 8 + 2 * i)); },
          [&](int i, int n, uint32_t (&to)[4]) {
            ldmatrix_x4_trans(to, v_at.at(b * kBlockKeys + i * 16, 2 * kWarpsPerBlock * n));
          });
    }
  }

  __device__ __forceinline__ int column_of(int n) const {
    return (n / 2 * kWarpsPerBlock + warp) * 16 + n % 2 * 8 + lane % 4 * 2;
  }

  // The end of a segment: its rows are handed on, or folded.
  __device__ __forceinline__ void close(int segment) {
    Sequence const s = this->sequence();
    int const d = static_cast<int>(call.layout.d);
    int const begin = this->segment_begin(segment), end = this->segment_begin(segment + 1);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = sum_of_quad(l[r]);
      float const weight =
          close_row<Element>(m[r], sum, info.rows[accumulator_row(r, lane)], begin, end);
#pragma unroll
      for (int n = 0; n < kGroups; ++n)
#pragma unroll
        for (int i = 2 * r; i < 2 * r + 2; ++i) o[0][n][i] *= weight;
      if (!launch.hands_on_partials()) {
        contract::FoldWeights const weights =
            contract::fold_weights(m_fold[r], closed_reference(m[r]));
        m_fold[r] = weights.reference, l_fold[r] = contract::add_part(weights, l_fold[r], sum);
#pragma unroll
        for (int n = 0; n < kGroups; ++n)
#pragma unroll
          for (int i = 2 * r; i < 2 * r + 2; ++i)
            fold[0][n][i] = contract::add_part(weights, fold[0][n][i], o[0][n][i]);
        continue;
      }
      int const row = accumulator_row(r, lane);
      if (row >= this->rows_here()) continue;
      int64_t const index = segment * call.partials.rows + this->lse_index(s, info.rows[row]);
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {
        this->emit_pair(call.partials.out + index * d, column_of(n), d, o[0][n][2 * r],
                        o[0][n][2 * r + 1]);
      }
      if (warp == 0 && lane % 4 == 0) {
        call.partials.max_log2[index] = closed_reference(m[r]);
        call.partials.sum[index] = sum;
      }
    }
  }

  // out = O * (1 / l); a row that saw nothing is zero.
  __device__ void finish() const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int const row = accumulator_row(r, lane);
      float const inverse = contract::inverse_of_sum(l_fold[r]);
#pragma unroll
      for (int n = 0; n < kGroups; ++n) {  // in the queries' room; adding +0 gives zeros one sign
        store_pair(q + TileLayout<kD>::offset(row, column_of(n) / kChunk) + lane % 4 * 4,
                   pack2<Element>(fmaf(fold[0][n][2 * r], inverse, 0.0f),
                                  fmaf(fold[0][n][2 * r + 1], inverse, 0.0f)));
      }
      if (warp == 0 && lane % 4 == 0) shared.m[row] = m_fold[r], shared.l[row] = l_fold[r];
    }
    __syncthreads();  // the rows are complete
    constexpr int kOwn = kRows / kWarpsPerBlock;
    int const own = warp * kOwn;
    char* const to = lane < kOwn ? this->row_address(call.out, own + lane) : nullptr;
    store_rows<Element, kD, kOwn, Traits::kAnyAddress>(q, to, own, static_cast<int>(call.layout.d),
                                                       launch.aligned, lane);
    int const row = static_cast<int>(threadIdx.x);
    if (row < this->rows_here()) {
      call.lse[this->lse_index(this->sequence(), info.rows[row])] =
          contract::log_sum_exp(shared.m[row], shared.l[row]);
    }
  }
};

}  // namespace fa::gpu::sm80
