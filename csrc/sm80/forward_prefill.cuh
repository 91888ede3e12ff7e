// A prefill: tiles of query rows, each against consecutive segments of keys. A warp owns its rows.
//
// Blocks ascend inside a segment and segments in the fold. Which rows share a tile, which segments
// a thread block takes and which tile comes after which is the scheduler's choice and cannot reach
// a bit.
#pragma once

#include "csrc/gpu/forward_tile.cuh"
#include "csrc/gpu/softmax_state.cuh"
#include "csrc/sm80/key_tiles.cuh"
#include "csrc/sm80/product.cuh"
#include "csrc/sm80/traits.h"

namespace fa::gpu::sm80 {

template <class Traits>
struct PrefillShared {
  TileInfo<Traits, KeyTiles<Traits>> info;
  float m_fold[Traits::kRows], l_fold[Traits::kRows];
  int next_work;
};

template <class Traits>
struct PrefillTile : ForwardTile<Traits, KeyTiles<Traits>> {
  using Base = ForwardTile<Traits, KeyTiles<Traits>>;
  using Base::call, Base::lane, Base::launch, Base::info, Base::warp;
  using Element = typename Traits::Element;
  using SoftmaxRows = SoftmaxState<Traits>;
  using Scores = typename SoftmaxRows::Scores;
  using QueryFragments = uint32_t[Traits::kD / 16][Traits::kRowTiles][4];
  using Part = typename KeyTiles<Traits>::Part;
  static constexpr int kD = Traits::kD, kRows = Traits::kRows, kStages = Traits::kStages;
  static constexpr int kStageBytes = 2 * Traits::kLoadBytes;

  PrefillShared<Traits>& shared;
  uint32_t const q, k, v;  // tiles (kRows, kD), (kBlockKeys, kD), (kBlockKeys, kD)
  int const warp_row = warp * Traits::kRowsPerWarp;  // first row of this warp, in the tile

  __device__ PrefillTile(ForwardLaunch const& l, char* memory)
      : PrefillTile(l, memory,
                    *reinterpret_cast<PrefillShared<Traits>*>(memory + Traits::kTileBytes)) {}
  __device__ PrefillTile(ForwardLaunch const& l, char* memory, PrefillShared<Traits>& s)
      : Base(l, s.info),
        shared(s),
        q(shared_address(memory)),
        k(q + Traits::kQueryBytes),
        v(k + Traits::kLoadBytes) {
    static_assert(Traits::kTileBytes + sizeof(PrefillShared<Traits>) <= Traits::kSharedBytes);
  }

  __device__ void run() {
    int const total = static_cast<int>(launch.plan.work);
    for (int work = static_cast<int>(blockIdx.x); work < total;) {
      this->find_work(work);
      if (this->find_rows()) run_tile();
      if (!launch.next_work) return;
      __syncthreads();  // all are done with this tile
      if (threadIdx.x == 0)
        shared.next_work = launch.plan.blocks + atomicAdd(launch.next_work, 1);  // integer
      __syncthreads();  // the number is there
      work = shared.next_work;
    }
  }

  // The i-th row of this warp.
  __device__ char* warp_row_address(RowTensor const& t, int i) const {
    return i < Traits::kRowsPerWarp ? this->row_address(t, warp_row + i) : nullptr;
  }

  // The keys that the rows of this warp see: rows ascend, so the first begins and ends first.
  struct Seen {
    int first_begin = 0, last_begin = 0, first_end = 0, last_end = 0;

    __device__ bool by_any(int begin, int end) const {
      return begin < last_end && end > first_begin;
    }
    __device__ bool by_all(int begin, int end) const {
      return begin >= last_begin && end <= first_end;
    }
  };
  __device__ __forceinline__ Seen seen_by_warp() const {
    int const last_row = this->rows_here() - 1;
    if (warp_row > last_row) return {};
    RowView const& first = info.rows[warp_row];
    RowView const& last = info.rows[min(warp_row + Traits::kRowsPerWarp - 1, last_row)];
    return {first.begin, last.begin, first.end, last.end};
  }

  __device__ void run_tile() {
    contract::KeyRange const keys = this->keys();
    int const begin = static_cast<int>(keys.begin), end = static_cast<int>(keys.end);
    // The fold leaves out what a row does not see.
    if (launch.hands_on_partials() && begin >= end) return;
    SoftmaxRows state;
    state.open_segment();
    if (begin < end) walk(state, begin, end, seen_by_warp());
    if (!launch.hands_on_partials()) finish(state);
  }

  // Blocks ascend from `begin` on.
  __device__ __forceinline__ void walk(SoftmaxRows& state, int begin, int end, Seen const& seen) {
    uint64_t dropout_key = 0;
    if (Traits::kFeatures && launch.scale.drops) dropout_key = philox_key(call.score.seed);
    bool const paged = call.layout.block_table != nullptr;
    int segment = static_cast<int>(launch.plan.segmentation.of(begin));
    int segment_end = this->segment_begin(segment + 1);
    bool is_first_segment = true;
    fill_scattered_rows<kD, Traits::kRowsPerWarp, Traits::kAnyAddress>(
        q, warp_row, warp_row_address(call.q, lane), nullptr, static_cast<int>(call.layout.d),
        launch.aligned, lane);
    Part early[kStages];  // what is copied during the product
    early[0] = info.keys.part(k, begin, paged, warp, lane);
    if constexpr (kStages == 2) early[1] = info.values.part(v, begin, paged, warp, lane);
    for (Part const& part : early) part.copy_all();
    cp_async_commit();
    int stage_bytes = 0;  // before this block's stage
    QueryFragments queries;
#pragma unroll 1
    for (int block = begin; block < end; block += kBlockKeys) {
      int const next = block + kBlockKeys;
      Scores s_or_p;
      cp_async_wait<0>();
      __syncthreads();  // the keys are there, and nobody reads the block before them any more
      uint32_t const k_now = k + stage_bytes, v_now = v + stage_bytes;
      // While the warps work on this block, copies bring its values and then the next keys. With
      // two stages they bring the keys and values of the next block.
      if constexpr (kStages == 1) {
        early[0] = info.values.part(v, block, paged, warp, lane);
      } else {
        stage_bytes = kStageBytes - stage_bytes;
        info.keys.advance(early[0], k + stage_bytes, next, paged, warp, lane);
        info.values.advance(early[1], v + stage_bytes, next, paged, warp, lane);
        early[0].wanted = early[1].wanted = next < end;
      }
      if (kD == 64 && block == begin) load_queries(queries);
      // Every warp computes the product, also where none of its rows sees the block: it copies its
      // share meanwhile, and all warps have to reach the next barrier.
      multiply_keys(s_or_p, queries, k_now, early);
      Part late{};
      if constexpr (kStages == 1) {
        late = info.keys.part(k, next, paged, warp, lane);
        late.wanted = next < end;
        cp_async_wait<0>();
        __syncthreads();  // the values are there, and nobody reads the keys any more
      }
      if (seen.by_any(block, next)) {
        add_block(state, s_or_p, block, v_now, late, seen, dropout_key);
      } else if (kStages == 1) {
        late.copy_all(), cp_async_commit();
      }
      if (next >= segment_end || next >= end) {
        end_segment(state, segment, segment_end, is_first_segment, next >= end, seen);
        is_first_segment = false;
        segment += 1;
        segment_end = this->segment_begin(segment + 1);
      }
    }
  }

  // s (kRowsPerWarp, kBlockKeys) = q k^T; copies a step of `early` with each step of the product.
  __device__ __forceinline__ void multiply_keys(Scores& s, QueryFragments const& queries,
                                                uint32_t k_now,
                                                Part const (&early)[kStages]) const {
    static_assert(Part::kSteps <= kD / 16, "the product has too few steps for the copies");
    auto const q_at = cursor_a<kD>(q, warp_row, lane);
    multiply_abt<Element, kD>(
        s,
        [&](int i, int t, uint32_t (&to)[4]) {
          if constexpr (kD == 64) {
#pragma unroll
            for (int j = 0; j < 4; ++j) to[j] = queries[i][t][j];
          } else {
            ldmatrix_x4(to, q_at.at(t * 16, 2 * i));
          }
          if (t > 0 || i >= Part::kSteps) return;
#pragma unroll
          for (Part const& part : early) part.copy(i);
        },
        k_now, 0, lane);
    cp_async_commit();
  }

  // Mask, softmax, and o += p v of one block; copies `late` meanwhile.
  __device__ __forceinline__ void add_block(SoftmaxRows& state, Scores& s_or_p, int block,
                                            uint32_t v_now, Part const& late, Seen const& seen,
                                            uint64_t dropout_key) const {
    RowView const* const rows = info.rows + warp_row;
    int const first_key = block + lane % 4 * 2;
    if (Traits::kFeatures || !seen.by_all(block, block + kBlockKeys))
      shape_and_mask<Traits::kFeatures>(s_or_p, rows, first_key, launch.scale, lane);
    state.softmax(s_or_p, launch.scale.exponent_scale, [&](int r) {
      if constexpr (kStages == 1) {
#pragma unroll
        for (int i = r; i < Part::kSteps; i += Traits::kThreadRows) late.copy(i);
      }
    });
    if (kStages == 1) cp_async_commit();
    if (Traits::kFeatures && launch.scale.drops)
      drop(s_or_p, rows, first_key, launch.scale.keep, dropout_key, info.batch, lane);
    add_product<Element, kD>(state.o, s_or_p, v_now, 0, lane);
  }

  // Closes the segment that ends at segment_end, and hands it on or folds it.
  __device__ __forceinline__ void end_segment(SoftmaxRows& state, int segment, int segment_end,
                                              bool is_first, bool is_last, Seen const& seen) {
    float sum[Traits::kThreadRows];
#pragma unroll
    for (int r = 0; r < Traits::kThreadRows; ++r) sum[r] = sum_of_quad(state.l[r]);
    // A segment can change rows whose keys lie in several segments, and rows of one key. With short
    // keys a warp seldom has either.
    int const begin = this->segment_begin(segment);
    if (seen.first_begin < begin || seen.last_end > segment_end ||
        seen.first_end <= seen.last_begin + 1) {
      state.close_segment(sum, info.rows + warp_row, begin, segment_end, lane);
    }
    if (launch.hands_on_partials()) {
      emit(state, sum, segment);
      state.open_segment();
    } else {
      state.fold_segment(sum, fold_memory(), shared.m_fold + warp_row, shared.l_fold + warp_row,
                         is_first, is_last, lane);
    }
  }

  __device__ __forceinline__ void load_queries(QueryFragments& to) const {
    auto const at = cursor_a<kD>(q, warp_row, lane);
#pragma unroll
    for (int k = 0; k < kD / 16; ++k)
#pragma unroll
      for (int t = 0; t < Traits::kRowTiles; ++t) ldmatrix_x4(to[k][t], at.at(t * 16, 2 * k));
  }

  // Of this thread, for the fold between two segments.
  __device__ FoldMemory fold_memory() const {
    int const num_shared = launch.plan.fold_shared, all = fold_vectors(kD);
    char* const behind =
        reinterpret_cast<char*>(&shared) - Traits::kTileBytes + Traits::kSharedBytes;
    int const num_scratch = all - num_shared;
    int64_t const first = static_cast<int64_t>(blockIdx.x) * num_scratch * Traits::kThreads;
    return {launch.folds + first + threadIdx.x,
            reinterpret_cast<float4*>(behind) - num_scratch * Traits::kThreads + threadIdx.x,
            num_scratch};
  }

  // Hands a closed segment's rows on.
  __device__ void emit(SoftmaxRows const& state, float const (&sum)[Traits::kThreadRows],
                       int segment) const {
    Sequence const s = this->sequence();
    int const d = static_cast<int>(call.layout.d);
    PartialBuffers const& partials = call.partials;
#pragma unroll
    for (int r = 0; r < Traits::kThreadRows; ++r) {
      int const row = warp_row + accumulator_row(r, lane);
      if (row >= this->rows_here()) continue;
      int64_t const index = segment * partials.rows + this->lse_index(s, info.rows[row]);
#pragma unroll
      for (int n = 0; n < SoftmaxRows::kColumnGroups; ++n) {
        this->emit_pair(partials.out + index * d, n * 8 + lane % 4 * 2, d,
                        state.o[r / 2][n][r % 2 * 2], state.o[r / 2][n][r % 2 * 2 + 1]);
      }
      if (lane % 4 == 0) {
        partials.max_log2[index] = closed_reference(state.m[r]);
        partials.sum[index] = sum[r];
      }
    }
  }

  // out = O * (1 / l); a row that saw nothing is zero.
  __device__ void finish(SoftmaxRows const& state) const {
    Sequence const s = this->sequence();
    __syncwarp();  // the warp has read its queries: the results take their room
    store_product<Element, kD, Traits::kRowTiles>(
        q, warp_row, state.o, [&](int r) { return contract::inverse_of_sum(state.l[r]); }, lane);
    if (lane % 4 == 0) {
#pragma unroll
      for (int r = 0; r < Traits::kThreadRows; ++r) {
        int const row = warp_row + accumulator_row(r, lane);
        shared.m_fold[row] = closed_reference(state.m[r]), shared.l_fold[row] = state.l[r];
      }
    }
    __syncwarp();  // the rows are complete
    store_rows<Element, kD, Traits::kRowsPerWarp, Traits::kAnyAddress>(
        q, warp_row_address(call.out, lane), warp_row, static_cast<int>(call.layout.d),
        launch.aligned, lane);
    int const row = warp_row + lane;  // each lane has one row, because the logarithm takes long
    if (lane < Traits::kRowsPerWarp && row < this->rows_here()) {
      call.lse[this->lse_index(s, info.rows[row])] =
          contract::log_sum_exp(shared.m_fold[row], shared.l_fold[row]);
    }
  }
};

}  // namespace fa::gpu::sm80
