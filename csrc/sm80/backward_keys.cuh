// dK and dV of a tile of keys: for each query head of the group in ascending order, one walk over
// the queries that see them, ascending.
//
// Everything is transposed: a warp's rows are keys, and its columns queries.
#pragma once

#include "csrc/gpu/backward_launch.h"
#include "csrc/gpu/score_gradient.cuh"
#include "csrc/sm80/backward_traits.h"
#include "csrc/sm80/product.cuh"

namespace fa::gpu::sm80 {

// Of the queries of a block, by stages.
template <class Traits>
struct KeyTileShared {
  float lse[Traits::kStages][Traits::kBlock], delta[Traits::kStages][Traits::kBlock];
};

template <class Traits, bool kWantsDk, bool kWantsDv>
struct KeyTileWalk {
  using Element = typename Traits::Element;
  static constexpr int kD = Traits::kD, kTiles = Traits::kTiles, kWarpRows = Traits::kWarpRows;
  static constexpr int kBlock = Traits::kBlock, kStages = Traits::kStages;
  static constexpr int kWarpQueries = kBlock / Traits::kWarps;  // of a block, that a warp loads
  static_assert(Traits::kThreads >= 2 * kBlock, "a thread copies one lse or one delta");
  using Scores = Product<kTiles, kBlock / 8>;
  using Gradient = Product<kTiles, kD / 8>;

  BackwardLaunch const& launch;
  BackwardParams const& call;
  KeyTileShared<Traits>& shared;
  uint32_t const k, v;    // tiles (kRows, kD)
  uint32_t const blocks;  // stages of queries and dout, (kBlock, kD)
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int const warp_row = warp * kWarpRows;  // first row of this warp, in the tile
  Sequence s;
  int head_kv, batch, s_q, s_k, first_key, begin_key, end_key;

  __device__ KeyTileWalk(BackwardLaunch const& l, char* memory)
      : launch(l),
        call(l.call),
        shared(*reinterpret_cast<KeyTileShared<Traits>*>(memory + Traits::kTensorBytes)),
        k(shared_address(memory)),
        v(k + Traits::kTileBytes),
        blocks(v + Traits::kTileBytes) {}

  __device__ __forceinline__ void run() {
    LayoutParams const& layout = call.layout;
    int const h_kv = static_cast<int>(layout.h_kv);
    WorkItem const work =
        launch.work_of(static_cast<int>(blockIdx.x), key_tiles(layout, Traits::kRows), h_kv);
    head_kv = launch.order.head_of(work), batch = launch.order.batch_of(work);
    s = sequence_of(layout, batch);
    s_q = static_cast<int>(s.s_q), s_k = static_cast<int>(s.s_k);
    first_key = work.rank * Traits::kRows;  // early keys are seen by more queries
    if (first_key >= s_k) return;
    begin_key = first_key + warp_row, end_key = begin_key + kWarpRows;
    load_keys(k, call.k);
    load_keys(v, call.v);
    walk();
  }

  __device__ __forceinline__ void load_keys(uint32_t tile, RowTensor const& t) const {
    KeyRows const rows = key_rows(t, call.layout, s, head_kv, 2);
    fill_even_rows<kD, kWarpRows, Traits::kAnyAddress>(
        tile, warp_row, rows.row(begin_key), rows.row_bytes, s_k - begin_key,
        static_cast<int>(call.layout.d), launch.aligned, lane);
  }

  __device__ __forceinline__ void load_queries(int head, int block, int stage) const {
    uint32_t const q = blocks + stage * 2 * Traits::kBlockBytes;
    int const own = warp * kWarpQueries, first = block + own;
    auto const fill = [&](uint32_t to, RowTensor const& t) {
      fill_even_rows<kD, kWarpQueries, Traits::kAnyAddress>(
          to, own, query_row(t, s, first, head, 2), t.row_stride * 2, s_q - first,
          static_cast<int>(call.layout.d), launch.aligned, lane);
    };
    fill(q, call.q);
    fill(q + Traits::kBlockBytes, call.dout);
    // A query that does not exist has zeros for everything, and so adds nothing.
    int const query = block + static_cast<int>(threadIdx.x) % kBlock;
    if (threadIdx.x < kBlock) {
      cp_async_4(shared_address(&shared.lse[stage][query - block]),
                 call.lse + s.lse_base + head * call.layout.lse_head_stride + query, query < s_q);
    } else if (threadIdx.x < 2 * kBlock) {
      cp_async_4(shared_address(&shared.delta[stage][query - block]),
                 call.delta + delta_base(call, s, batch) + head * call.delta_head_stride + query,
                 query < s_q);
    }
  }

  __device__ __forceinline__ void walk() {
    TileMask const mask(call.score, s);
    int const last_key = min(first_key + Traits::kRows, s_k) - 1;
    int const begin = max(first_key - mask.highest, 0) & -kBlock;
    int const end = min(last_key - mask.lowest + 1, s_q);
    Gradient dk, dv;
    if (kWantsDk) set_zero<kTiles, kD / 8>(dk);
    if (kWantsDv) set_zero<kTiles, kD / 8>(dv);
    uint64_t dropout_key = 0;
    if (Traits::kFeatures && launch.scale.drops) dropout_key = philox_key(call.score.seed);
    int const group = static_cast<int>(call.layout.h_q / call.layout.h_kv);
    int const end_head = (head_kv + 1) * group;
    int head = begin < end ? head_kv * group : end_head, block = begin, stage = 0;
    if (head < end_head) load_queries(head, block, 0);
    cp_async_commit();
#pragma unroll 1
    while (head < end_head) {  // heads ascending, in each queries ascending
      int const next_head = block + kBlock < end ? head : head + 1;
      int const next_block = block + kBlock < end ? block + kBlock : begin;
      cp_async_wait<0>();
      __syncthreads();  // this block is there for all, and nobody reads the one before any more
      if (kStages == 2) {
        if (next_head < end_head) load_queries(next_head, next_block, stage ^ 1);
        cp_async_commit();
      }
      uint32_t const q = blocks + stage * 2 * Traits::kBlockBytes, dout = q + Traits::kBlockBytes;
      if (mask.any(block, block + kBlock, begin_key, end_key)) {
        Scores p, ds;
        gradients(p, ds, q, head, block, stage, mask, dropout_key);
        if constexpr (kWantsDv) add_product<Element, kD, kTiles, kBlock / 8>(dv, p, dout, 0, lane);
        if constexpr (kWantsDk) add_product<Element, kD, kTiles, kBlock / 8>(dk, ds, q, 0, lane);
      }
      if (kStages == 1) {
        __syncthreads();  // all have read this block
        if (next_head < end_head) load_queries(next_head, next_block, 0);
        cp_async_commit();
      } else {
        stage ^= 1;
      }
      head = next_head, block = next_block;
    }
    cp_async_wait<0>();
    __syncwarp();  // the warp's keys are read, or came in vain: their room is the results' now
    if constexpr (kWantsDk) store(k, call.dk, dk, static_cast<float>(call.score.softmax_scale));
    if constexpr (kWantsDv) store(v, call.dv, dv, 1.0f);
  }

  // p and ds (kWarpRows, kBlock), transposed, of the queries in `q`, whose dout lies behind them.
  __device__ __forceinline__ void gradients(Scores& p, Scores& ds, uint32_t q, int head, int block,
                                            int stage, TileMask const& mask,
                                            uint64_t dropout_key) const {
    multiply_abt<Element, kD, kTiles, kBlock / 8>(p, k, warp_row, q, 0, lane);
    multiply_abt<Element, kD, kTiles, kBlock / 8>(ds, v, warp_row, q + Traits::kBlockBytes, 0,
                                                  lane);
    if (!mask.every(block, block + kBlock, begin_key, end_key)) {
      mask_scores<kTiles, kBlock / 8>(p, ds, [&](int row, int column) {
        return mask.sees(block + lane % 4 * 2 + column, begin_key + lane / 4 + row);
      });
    }
    float const alibi_slope =
        Traits::kFeatures && call.score.alibi
            ? call.score.alibi[batch * call.score.alibi_batch_stride + head] * kLog2E
            : 0.0f;
#pragma unroll
    for (int n = 0; n < kBlock / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int const column = n * 8 + lane % 4 * 2 + i;
        float const lse_log2 = shared.lse[stage][column] * kLog2E;
        float const delta = shared.delta[stage][column];
        RowView row;
        row.query = block + column, row.head = head, row.diagonal = row.query + mask.offset;
        row.alibi_slope = alibi_slope;
#pragma unroll
        for (int r = 0; r < 2 * kTiles; ++r) {
          int const key = begin_key + accumulator_row(r, lane);
          float keep = 1.0f;
          if (Traits::kFeatures && launch.scale.drops) {
            float2 const pair =
                dropout_factors(launch.scale.keep, dropout_key, row, batch, key & ~1);
            keep = key % 2 == 0 ? pair.x : pair.y;
          }
          gradient_of_score<Traits::kFeatures>(p[r / 2][n][r % 2 * 2 + i],
                                               ds[r / 2][n][r % 2 * 2 + i], lse_log2, delta,
                                               launch.scale, row, key, keep);
        }
      }
  }

  // A gradient of the warp's keys, times factor, through `room` to its rows of t.
  __device__ __forceinline__ void store(uint32_t room, RowTensor const& t, Gradient const& x,
                                        float factor) const {
    store_product<Element, kD, kTiles>(room, warp_row, x, [&](int) { return factor; }, lane);
    __syncwarp();  // the rows are complete
    int const key = begin_key + lane;
    char* const to =
        lane < kWarpRows && key < s_k ? key_rows(t, call.layout, s, head_kv, 2).row(key) : nullptr;
    store_rows<Element, kD, kWarpRows, Traits::kAnyAddress>(
        room, to, warp_row, static_cast<int>(call.layout.d), launch.aligned, lane);
  }
};

// dK, dV, or both, of wide heads.
//   Grid    a thread block for each tile of kRows keys of each key head and sequence.
//   Threads four warps, each with sixteen keys of its own.
//   Shared  the tile's keys and values, and kStages blocks of queries and dout.
//   Order   query heads ascend, in each queries ascend (contract.h, GpuOrder::gradients).
//   Needs   lse and delta; 16-bit elements with d = d_v up to kD; without kFeatures aligned rows.
template <class Traits, bool kWantsDk, bool kWantsDv>
__global__ __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm) void key_tile_kernel(
    __grid_constant__ BackwardLaunch const launch) {
  extern __shared__ __align__(128) char memory[];
  KeyTileWalk<Traits, kWantsDk, kWantsDv>(launch, memory).run();
}

}  // namespace fa::gpu::sm80
