// The forward pass of one thread block: tiles of query rows, each against consecutive segments of
// keys.
//
// Blocks ascend inside a segment and segments in the fold. Which rows share a tile, which segments
// a thread block takes and which tile comes after which is the scheduler's choice and cannot reach
// a bit.
#pragma once

#include "csrc/core/segmentation.h"
#include "csrc/sm80/family.h"
#include "csrc/sm80/forward_rows.cuh"
#include "csrc/sm80/key_tiles.cuh"
#include "csrc/sm80/order.h"
#include "csrc/sm80/rest.cuh"

namespace fa::sm80 {

// Shared memory of a thread block, beside the tiles: what is needed rarely, for registers are what
// this kernel is short of.
template <class Traits>
struct ForwardShared {
  RowView rows[Traits::kRows];
  float m_fold[Traits::kRows], l_fold[Traits::kRows];
  KeyTiles<Traits> keys, values;
  int tile, head_kv, batch, piece;
  int num_rows;  // of the sequence and key head: s_q * group
  int next_work;
};
template <class Traits>
constexpr int kForwardSharedBytes =
    Traits::kTileBytes + static_cast<int>(sizeof(ForwardShared<Traits>));

template <class Traits>
struct ForwardBlock {
  using Element = typename Traits::Element;
  using Rows = ForwardRows<Traits>;
  static constexpr int kD = Traits::kD, kRows = Traits::kRows;
  static constexpr int64_t kBytes = 2;

  ForwardLaunch const& launch;
  ForwardParams const& call;
  ForwardShared<Traits>& shared;
  uint32_t const q, k, v;  // tiles (kRows, kD), (kBlockKeys, kD), (kBlockKeys, kD)
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int const warp_row = warp * Traits::kRowsAWarp;  // first row of this warp, in the tile

  __device__ ForwardBlock(ForwardLaunch const& l, char* memory)
      : launch(l),
        call(l.call),
        shared(*reinterpret_cast<ForwardShared<Traits>*>(memory + Traits::kTileBytes)),
        q(shared_address(memory)),
        k(q + Traits::kQueryBytes),
        v(k + Traits::kBlockBytes) {}

  __device__ void run() {
    int const total = static_cast<int>(launch.plan.work);
    for (int work = static_cast<int>(blockIdx.x); work < total;) {
      find_place(work);
      run_tile();
      if (!launch.next_work) return;
      __syncthreads();  // all are done with this tile
      if (threadIdx.x == 0)
        shared.next_work = gridDim.x + atomicAdd(launch.next_work, 1);  // integer
      __syncthreads();                                                  // the number is there
      work = shared.next_work;
    }
  }

  // Late rows see more keys and late segments are longer, so both go first.
  __device__ void find_place(int work) {
    if (threadIdx.x == 0) {
      int const h_kv = static_cast<int>(call.layout.h_kv), b = static_cast<int>(call.layout.b);
      int const tiles = static_cast<int>(launch.plan.tiles);
      int const pieces = static_cast<int>(launch.plan.pieces);
      Place const place = place_of(work, h_kv * b, tiles * pieces, launch.plan.section);
      int const head_kv = place.head % h_kv, batch = place.head / h_kv;
      shared.head_kv = head_kv, shared.batch = batch;
      shared.tile = tiles - 1 - place.rank % tiles;
      shared.piece = pieces - 1 - place.rank / tiles;
      Sequence const s = sequence_of(call.layout, batch);
      shared.num_rows = static_cast<int>(s.s_q) * launch.group;
      shared.keys.set(call.layout, call.k, s, head_kv, launch.aligned);
      shared.values.set(call.layout, call.v, s, head_kv, launch.aligned);
    }
    __syncthreads();  // the place is there
  }

  __device__ Sequence sequence() const { return sequence_of(call.layout, shared.batch); }

  // The i-th row of this warp, of the tensor t; null: there is no such row.
  __device__ char* row_address(RowTensor const& t, int i) const {
    int const row = warp_row + i;
    if (i >= Traits::kRowsAWarp || shared.tile * kRows + row >= shared.num_rows) return nullptr;
    return query_row(t, sequence(), shared.rows[row].query, shared.rows[row].head, kBytes);
  }

  __device__ void run_tile() {
    int const tile = shared.tile, num_rows = shared.num_rows, s_k = shared.keys.s_k;
    write_the_rest();
    if (tile * kRows >= num_rows) return;
    if (threadIdx.x < kRows) {
      int const flat = tile * kRows + static_cast<int>(threadIdx.x);
      shared.rows[threadIdx.x] = flat < num_rows ? view_row(call.score, sequence(), shared.batch,
                                                            shared.head_kv, launch.group, flat)
                                                 : RowView{};
    }
    __syncthreads();  // the rows are there

    Segmentation const segmentation = launch.plan.segmentation;
    auto const segment_begin = [&](int segment) {
      return static_cast<int>(segmentation.begin(segment));
    };
    int const pieces = static_cast<int>(launch.plan.pieces);
    int const piece = shared.piece;
    int const num_segments = static_cast<int>(segmentation.count(s_k));
    // The keys that any row of the tile sees: rows ascend, so the first begins and the last ends.
    int const last_row = min(kRows, num_rows - tile * kRows) - 1;
    int const begin = max(segment_begin(num_segments * piece / pieces),
                          shared.rows[0].begin & -Traits::kBlockKeys);
    int const end =
        min(segment_begin(num_segments * (piece + 1) / pieces), shared.rows[last_row].end);
    if (launch.partials && begin >= end) return;  // the fold leaves out what a row does not see

    // The same of this warp's rows, and where all of them see everything.
    int first_begin = 0, last_begin = 0, first_end = 0, last_end = 0;
    if (warp_row <= last_row) {
      RowView const& first = shared.rows[warp_row];
      RowView const& last = shared.rows[min(warp_row + Traits::kRowsAWarp - 1, last_row)];
      first_begin = first.begin, first_end = first.end;
      last_begin = last.begin, last_end = last.end;
    }
    RowView const* const rows = shared.rows + warp_row;
    uint64_t dropout_key = 0;
    if (Traits::kFeatures && launch.scale.drops) dropout_key = philox_key(call.score.seed);
    float const exponent_scale = launch.scale.exponent_scale;

    Rows state;
    state.open_segment();
    if (begin < end) {
      int segment = static_cast<int>(segmentation.of(begin));
      int segment_end = segment_begin(segment + 1);
      bool first_segment = true;
      fill_scattered_rows<kD, Traits::kRowsAWarp, Traits::kAnyAddress>(
          q, warp_row, row_address(call.q, lane), nullptr, static_cast<int>(call.layout.d),
          launch.aligned, lane);
      shared.keys.load(k, begin, warp, lane);
      commit_copies();
#pragma unroll 1
      for (int block = begin; block < end; block += Traits::kBlockKeys) {  // ascending
        int const next = block + Traits::kBlockKeys;
        bool const seen = block < last_end && next > first_begin;
        typename Rows::Scores s_or_p;
        wait_copies<0>();
        __syncthreads();  // the keys are there, and nobody reads the values before them any more
        shared.values.load(v, block, warp, lane);
        commit_copies();
        if (seen) {
          multiply_rows<Element, kD, Rows::kRowTiles, Rows::kKeyGroups>(s_or_p, q, warp_row, k, 0,
                                                                        lane);
        }
        wait_copies<0>();
        __syncthreads();  // the values are there, and nobody reads the keys any more
        if (next < end) shared.keys.load(k, next, warp, lane);
        commit_copies();
        if (seen) {
          int const first_key = block + lane % 4 * 2;
          if (Traits::kFeatures || block < last_begin || next > first_end)
            Rows::shape_and_mask(s_or_p, rows, first_key, launch.scale, lane);
          state.softmax(s_or_p, exponent_scale);
          if (Traits::kFeatures && launch.scale.drops)
            Rows::drop(s_or_p, rows, first_key, launch.scale.keep, dropout_key, shared.batch, lane);
          add_product<Element, kD, Rows::kRowTiles, Rows::kKeyGroups>(state.o, s_or_p, v, 0, lane);
        }
        if (next >= segment_end || next >= end) {
          auto const closed = state.close_segment(exponent_scale);
          if (launch.partials) {
            emit(state, closed, segment);
          } else {
            state.fold_segment(closed, fold_memory(), shared.m_fold + warp_row,
                               shared.l_fold + warp_row, first_segment, next >= end, lane);
          }
          if (next < end) state.open_segment();
          first_segment = false;
          segment += 1;
          segment_end = segment_begin(segment + 1);
        }
      }
    }
    if (!launch.partials) finish(state);
  }

  // Of this thread, for the fold between two segments.
  __device__ float4* fold_memory() const {
    return launch.folds + static_cast<int64_t>(blockIdx.x) * (kRows * kD / 4) + threadIdx.x;
  }

  __device__ int64_t lse_index(Sequence const& s, RowView const& row) const {
    return s.lse_base + row.head * call.layout.lse_head_stride + row.query;
  }

  // Hands a closed segment's rows on.
  __device__ void emit(Rows const& state, typename Rows::Closed const& closed, int segment) const {
    Sequence const s = sequence();
    int const d = static_cast<int>(call.layout.d);
    PartialBuffers const& partials = call.partials;
#pragma unroll
    for (int r = 0; r < Traits::kThreadRows; ++r) {
      int const row = warp_row + Rows::row_of(r, lane);
      if (shared.tile * kRows + row >= shared.num_rows) continue;
      int64_t const index = segment * partials.rows + lse_index(s, shared.rows[row]);
      float* const out = partials.out + index * d;
#pragma unroll
      for (int n = 0; n < Rows::kColumnGroups; ++n) {
        int const column = n * 8 + lane % 4 * 2;
        float const x = state.o[r / 2][n][r % 2 * 2] * closed.weight[r];
        float const y = state.o[r / 2][n][r % 2 * 2 + 1] * closed.weight[r];
        if (d % 2 == 0 && column < d) {
          *reinterpret_cast<float2*>(out + column) = make_float2(x, y);
        } else {
          if (column < d) out[column] = x;
          if (column + 1 < d) out[column + 1] = y;
        }
      }
      if (lane % 4 == 0) {
        partials.max_log2[index] = closed.reference[r];
        partials.sum[index] = closed.sum[r];
      }
    }
  }

  // out = O * (1 / l); a row that saw nothing is zero.
  __device__ void finish(Rows const& state) const {
    Sequence const s = sequence();
    __syncwarp();  // the warp has read its queries: their room is the results' now
    store_product<Element, kD, Rows::kRowTiles>(
        q, warp_row, state.o, [&](int r) { return contract::inverse_of_sum(state.l[r]); }, lane);
    if (lane % 4 == 0) {
#pragma unroll
      for (int r = 0; r < Traits::kThreadRows; ++r) {
        int const row = warp_row + Rows::row_of(r, lane);
        shared.m_fold[row] = state.m[r], shared.l_fold[row] = state.l[r];
      }
    }
    __syncwarp();  // the rows are complete
    store_rows<Element, kD, Traits::kRowsAWarp, Traits::kAnyAddress>(
        q, row_address(call.out, lane), warp_row, static_cast<int>(call.layout.d), launch.aligned,
        lane);
    int const row = warp_row + lane;  // a row a lane: the logarithm takes long
    if (lane < Traits::kRowsAWarp && shared.tile * kRows + row < shared.num_rows) {
      call.lse[lse_index(s, shared.rows[row])] =
          contract::log_sum_exp(shared.m_fold[row], shared.l_fold[row]);
    }
  }

  // The first pieces of the last sequence's tiles share it.
  __device__ void write_the_rest() const {
    if (shared.piece != 0 || shared.batch + 1 < call.layout.b) return;
    sm80::write_the_rest(launch, shared.head_kv, shared.tile, static_cast<int>(launch.plan.tiles));
  }
};

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kBlocksAProcessor) void forward_kernel(
    __grid_constant__ ForwardLaunch const launch) {
  extern __shared__ __align__(128) char memory[];
  ForwardBlock<Traits>(launch, memory).run();
}

}  // namespace fa::sm80
