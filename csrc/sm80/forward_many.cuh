// The forward pass of one thread block with many rows: tiles of query rows, each against
// consecutive segments of keys.
//
// Blocks ascend inside a segment and segments in the fold. Which rows share a tile, which segments
// a thread block takes and which tile comes after which is the scheduler's choice and cannot reach
// a bit.
#pragma once

#include "csrc/sm80/forward_rows.cuh"
#include "csrc/sm80/forward_tile.cuh"

namespace fa::sm80 {

template <class Traits>
struct ManyRowsShared {
  TilePlace<Traits> place;
  float m_fold[Traits::kRows], l_fold[Traits::kRows];
  int next_work;
};

template <class Traits>
struct ManyRowsTile : ForwardTile<Traits> {
  using Base = ForwardTile<Traits>;
  using Base::call, Base::lane, Base::launch, Base::place, Base::warp;
  using Element = typename Traits::Element;
  using Rows = ForwardRows<Traits>;
  using Part = typename KeyTiles<Traits>::Part;
  static constexpr int kD = Traits::kD, kRows = Traits::kRows, kStages = Traits::kStages;
  static constexpr int kStageBytes = 2 * Traits::kLoadBytes;

  ManyRowsShared<Traits>& shared;
  uint32_t const q, k, v;  // tiles (kRows, kD), (kBlockKeys, kD), (kBlockKeys, kD)
  int const warp_row = warp * Traits::kRowsAWarp;  // first row of this warp, in the tile

  __device__ ManyRowsTile(ForwardLaunch const& l, char* memory)
      : ManyRowsTile(l, memory,
                     *reinterpret_cast<ManyRowsShared<Traits>*>(memory + Traits::kTileBytes)) {}
  __device__ ManyRowsTile(ForwardLaunch const& l, char* memory, ManyRowsShared<Traits>& s)
      : Base(l, s.place),
        shared(s),
        q(shared_address(memory)),
        k(q + Traits::kQueryBytes),
        v(k + Traits::kLoadBytes) {
    static_assert(Traits::kTileBytes + sizeof(ManyRowsShared<Traits>) <= Traits::kSharedBytes);
  }

  __device__ void run() {
    int const total = static_cast<int>(launch.plan.work);
    for (int work = static_cast<int>(blockIdx.x); work < total;) {
      this->find_place(work);
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
    return i < Traits::kRowsAWarp ? this->row_address(t, warp_row + i) : nullptr;
  }

  __device__ void run_tile() {
    contract::KeyRange const keys = this->keys();
    int const begin = static_cast<int>(keys.begin), end = static_cast<int>(keys.end);
    if (launch.partials && begin >= end) return;  // the fold leaves out what a row does not see

    // The keys that any of this warp's rows sees, and those that all see.
    int first_begin = 0, last_begin = 0, first_end = 0, last_end = 0;
    int const last_row = this->rows_here() - 1;
    if (warp_row <= last_row) {
      RowView const& first = place.rows[warp_row];
      RowView const& last = place.rows[min(warp_row + Traits::kRowsAWarp - 1, last_row)];
      first_begin = first.begin, first_end = first.end;
      last_begin = last.begin, last_end = last.end;
    }
    RowView const* const rows = place.rows + warp_row;
    uint64_t dropout_key = 0;
    if (Traits::kFeatures && launch.scale.drops) dropout_key = philox_key(call.score.seed);
    bool const paged = call.layout.block_table != nullptr;

    Rows state;
    state.open_segment();
    if (begin < end) {
      int segment = static_cast<int>(launch.plan.segmentation.of(begin));
      int segment_end = this->segment_begin(segment + 1);
      bool first_segment = true;
      fill_scattered_rows<kD, Traits::kRowsAWarp, Traits::kAnyAddress>(
          q, warp_row, warp_row_address(call.q, lane), nullptr, static_cast<int>(call.layout.d),
          launch.aligned, lane);
      Part early[kStages];  // what is copied during the product
      early[0] = place.keys.part(k, begin, paged, warp, lane);
      if constexpr (kStages == 2) early[1] = place.values.part(v, begin, paged, warp, lane);
      for (Part const& part : early) part.copy_all();
      commit_copies();
      int stage_bytes = 0;  // before this block's stage
      uint32_t queries[kD / 16][Rows::kRowTiles][4];
#pragma unroll 1
      for (int block = begin; block < end; block += kBlockKeys) {  // ascending
        int const next = block + kBlockKeys;
        typename Rows::Scores s_or_p;
        wait_copies<0>();
        __syncthreads();  // the keys are there, and nobody reads the block before them any more
        uint32_t const k_now = k + stage_bytes, v_now = v + stage_bytes;
        // Copied while this block is worked on: its values, then the next keys; or, with two
        // stages, both of the next block.
        auto const next_keys = [&] {
          Part part = place.keys.part(k, next, paged, warp, lane);
          part.wanted = next < end;
          return part;
        };
        if constexpr (kStages == 1) {
          early[0] = place.values.part(v, block, paged, warp, lane);
        } else {
          stage_bytes = kStageBytes - stage_bytes;
          place.keys.advance(early[0], k + stage_bytes, next, paged, warp, lane);
          place.values.advance(early[1], v + stage_bytes, next, paged, warp, lane);
          early[0].wanted = early[1].wanted = next < end;
        }
        static_assert(Part::kSteps <= kD / 16, "the product has too few steps for the copies");
        auto const copy = [&](int i) {
#pragma unroll
          for (Part const& part : early)
            if (i < Part::kSteps) part.copy(i);
        };
        if (kD == 64 && block == begin) load_queries(queries);
        // Even where nobody sees the block: a barrier may not lie on a way that not all warps take.
        auto const q_at = cursor_a<kD>(q, warp_row, lane);
        multiply_by_rows<Element, kD>(
            s_or_p,
            [&](int i, int t, uint32_t (&to)[4]) {
              if constexpr (kD == 64) {
#pragma unroll
                for (int j = 0; j < 4; ++j) to[j] = queries[i][t][j];
              } else {
                load_matrix(to, q_at.at(t * 16, 2 * i));
              }
              if (t == 0) copy(i);
            },
            k_now, 0, lane);
        commit_copies();
        Part late{};
        if constexpr (kStages == 1) {
          late = next_keys();
          wait_copies<0>();
          __syncthreads();  // the values are there, and nobody reads the keys any more
        }
        if (block < last_end && next > first_begin) {  // one of this warp's rows sees it
          int const first_key = block + lane % 4 * 2;
          if (Traits::kFeatures || block < last_begin || next > first_end)
            shape_and_mask<Traits::kFeatures>(s_or_p, rows, first_key, launch.scale, lane);
          state.softmax(s_or_p, launch.scale.exponent_scale, [&](int r) {
            if (kStages == 2) return;
#pragma unroll
            for (int i = r; i < Part::kSteps; i += Traits::kThreadRows) late.copy(i);
          });
          if (kStages == 1) commit_copies();
          if (Traits::kFeatures && launch.scale.drops)
            drop(s_or_p, rows, first_key, launch.scale.keep, dropout_key, place.batch, lane);
          add_product<Element, kD>(state.o, s_or_p, v_now, 0, lane);
        } else if (kStages == 1) {
          late.copy_all(), commit_copies();
        }
        if (next >= segment_end || next >= end) {
          float sum[Traits::kThreadRows];
#pragma unroll
          for (int r = 0; r < Traits::kThreadRows; ++r) sum[r] = sum_of_quad(state.l[r]);
          // Seldom for short keys: no row of this warp has keys elsewhere, or can have one key.
          int const segment_first = this->segment_begin(segment);
          if (first_begin < segment_first || last_end > segment_end || first_end <= last_begin + 1)
            state.close_segment(sum, rows, segment_first, segment_end, lane);
          if (launch.partials) {
            emit(state, sum, segment);
            state.open_segment();
          } else {
            state.fold_segment(sum, fold_memory(), shared.m_fold + warp_row,
                               shared.l_fold + warp_row, first_segment, next >= end, lane);
          }
          first_segment = false;
          segment += 1;
          segment_end = this->segment_begin(segment + 1);
        }
      }
    }
    if (!launch.partials) finish(state);
  }

  __device__ __forceinline__ void load_queries(uint32_t (&to)[kD / 16][Rows::kRowTiles][4]) const {
    auto const at = cursor_a<kD>(q, warp_row, lane);
#pragma unroll
    for (int k = 0; k < kD / 16; ++k)
#pragma unroll
      for (int t = 0; t < Rows::kRowTiles; ++t) load_matrix(to[k][t], at.at(t * 16, 2 * k));
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
  __device__ void emit(Rows const& state, float const (&sum)[Traits::kThreadRows],
                       int segment) const {
    Sequence const s = this->sequence();
    int const d = static_cast<int>(call.layout.d);
    PartialBuffers const& partials = call.partials;
#pragma unroll
    for (int r = 0; r < Traits::kThreadRows; ++r) {
      int const row = warp_row + row_of(r, lane);
      if (row >= this->rows_here()) continue;
      int64_t const index = segment * partials.rows + this->lse_index(s, place.rows[row]);
#pragma unroll
      for (int n = 0; n < Rows::kColumnGroups; ++n) {
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
  __device__ void finish(Rows const& state) const {
    Sequence const s = this->sequence();
    __syncwarp();  // the warp has read its queries: their room is the results' now
    store_product<Element, kD, Rows::kRowTiles>(
        q, warp_row, state.o, [&](int r) { return contract::inverse_of_sum(state.l[r]); }, lane);
    if (lane % 4 == 0) {
#pragma unroll
      for (int r = 0; r < Traits::kThreadRows; ++r) {
        int const row = warp_row + row_of(r, lane);
        shared.m_fold[row] = closed_reference(state.m[r]), shared.l_fold[row] = state.l[r];
      }
    }
    __syncwarp();  // the rows are complete
    store_rows<Element, kD, Traits::kRowsAWarp, Traits::kAnyAddress>(
        q, warp_row_address(call.out, lane), warp_row, static_cast<int>(call.layout.d),
        launch.aligned, lane);
    int const row = warp_row + lane;  // a row a lane: the logarithm takes long
    if (lane < Traits::kRowsAWarp && row < this->rows_here()) {
      call.lse[this->lse_index(s, place.rows[row])] =
          contract::log_sum_exp(shared.m_fold[row], shared.l_fold[row]);
    }
  }
};

}  // namespace fa::sm80
