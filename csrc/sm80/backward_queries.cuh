// dQ of a tile of queries: one walk over the keys that they see, ascending.
#pragma once

#include "csrc/gpu/backward_launch.h"
#include "csrc/gpu/score_gradient.cuh"
#include "csrc/sm80/backward_traits.h"
#include "csrc/sm80/key_tiles.cuh"
#include "csrc/sm80/product.cuh"

namespace fa::gpu::sm80 {

template <class Traits>
struct QueryTileShared {
  KeyTiles<Traits> keys, values;
};

template <class Traits>
struct QueryTileWalk {
  using Element = typename Traits::Element;
  static constexpr int kD = Traits::kD, kTiles = Traits::kTiles, kWarpRows = Traits::kWarpRows;
  static constexpr int kBlock = Traits::kBlock, kStages = Traits::kStages;
  using Scores = Product<kTiles, kBlock / 8>;

  BackwardLaunch const& launch;
  BackwardParams const& call;
  QueryTileShared<Traits>& shared;
  uint32_t const q, dout;  // tiles (kRows, kD)
  uint32_t const blocks;   // stages of keys and values, (kBlock, kD)
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int const warp_row = warp * kWarpRows;  // first row of this warp, in the tile
  int head, batch, first_row, begin_row, end_row;

  __device__ QueryTileWalk(BackwardLaunch const& l, char* memory)
      : launch(l),
        call(l.call),
        shared(*reinterpret_cast<QueryTileShared<Traits>*>(memory + Traits::kTensorBytes)),
        q(shared_address(memory)),
        dout(q + Traits::kTileBytes),
        blocks(dout + Traits::kTileBytes) {}

  __device__ __forceinline__ void run() {
    LayoutParams const& layout = call.layout;
    int const h_q = static_cast<int>(layout.h_q);
    WorkItem const work =
        launch.work_of(static_cast<int>(blockIdx.x), query_tiles(layout, 1, Traits::kRows), h_q);
    head = launch.order.head_of(work), batch = launch.order.batch_of(work);
    // Late queries see more keys: they go first.
    int const tile = launch.slots > 0 ? work.rank : launch.tiles - 1 - work.rank;
    Sequence const s = sequence_of(layout, batch);
    int const s_q = static_cast<int>(s.s_q);
    first_row = tile * Traits::kRows;
    if (first_row >= s_q) return;
    if (threadIdx.x == 0) {
      int const head_kv = head / (h_q / static_cast<int>(layout.h_kv));
      shared.keys.set(layout, call.k, s, head_kv, launch.aligned);
      shared.values.set(layout, call.v, s, head_kv, launch.aligned);
    }
    begin_row = first_row + warp_row, end_row = min(begin_row + kWarpRows, s_q);
    walk(s);
  }

  // Of this lane's row of the warp; null: there is no such row.
  __device__ __forceinline__ char* row_address(RowTensor const& t) const {
    int const row = begin_row + lane;
    Sequence const s = sequence_of(call.layout, batch);  // again: registers are short
    return lane < kWarpRows && row < s.s_q ? query_row(t, s, row, head, 2) : nullptr;
  }

  __device__ __forceinline__ void load_keys(int block, int stage) const {
    uint32_t const k = blocks + stage * 2 * Traits::kBlockBytes;
    shared.keys.load(k, block, warp, lane);
    shared.values.load(k + Traits::kBlockBytes, block, warp, lane);
  }

  __device__ __forceinline__ void load_rows(uint32_t tile, RowTensor const& t) const {
    fill_scattered_rows<kD, kWarpRows, Traits::kAnyAddress>(tile, warp_row, row_address(t), nullptr,
                                                            static_cast<int>(call.layout.d),
                                                            launch.aligned, lane);
  }

  __device__ __forceinline__ void walk(Sequence const& s) {
    int const s_q = static_cast<int>(s.s_q);
    TileMask const mask(call.score, s);
    int const last_row = min(first_row + Traits::kRows, s_q) - 1;
    int const begin = max(first_row + mask.lowest, 0) & -kBlock;
    int const end = min(last_row + mask.highest + 1, static_cast<int>(s.s_k));
    Product<kTiles, kD / 8> dq;
    set_zero<kTiles, kD / 8>(dq);
    float lse_log2[2 * kTiles], delta[2 * kTiles];
#pragma unroll
    for (int r = 0; r < 2 * kTiles; ++r) {
      int const row = begin_row + accumulator_row(r, lane);
      float const* const lse = call.lse + s.lse_base + head * call.layout.lse_head_stride;
      float const* const deltas =
          call.delta + delta_base(call, s, batch) + head * call.delta_head_stride;
      lse_log2[r] = row < s_q ? lse[row] * kLog2E : INFINITY;
      delta[r] = row < s_q ? deltas[row] : 0.0f;
    }
    __syncthreads();  // the addresses of keys and values are there
    load_rows(q, call.q);
    load_rows(dout, call.dout);
    if (begin < end) load_keys(begin, 0);
    cp_async_commit();
    uint64_t dropout_key = 0;
    if (Traits::kFeatures && launch.scale.drops) dropout_key = philox_key(call.score.seed);
    float const alibi_slope =
        Traits::kFeatures && call.score.alibi
            ? call.score.alibi[batch * call.score.alibi_batch_stride + head] * kLog2E
            : 0.0f;
    int stage = 0;
#pragma unroll 1
    for (int block = begin; block < end; block += kBlock) {  // ascending
      int const next = block + kBlock;
      cp_async_wait<0>();
      __syncthreads();  // this block is there for all, and nobody reads the one before any more
      if (kStages == 2) {
        if (next < end) load_keys(next, stage ^ 1);
        cp_async_commit();
      }
      uint32_t const k = blocks + stage * 2 * Traits::kBlockBytes;
      if (mask.any(begin_row, end_row, block, next)) {
        Scores ds;
        gradients(ds, k, block, mask, lse_log2, delta, alibi_slope, dropout_key);
        add_product<Element, kD, kTiles, kBlock / 8>(dq, ds, k, 0, lane);
      }
      if (kStages == 1) {
        __syncthreads();  // all have read this block
        if (next < end) load_keys(next, 0);
        cp_async_commit();
      } else {
        stage ^= 1;
      }
    }
    cp_async_wait<0>();
    __syncwarp();  // the warp's queries are read, or came in vain: their room is the results' now
    store(dq);
  }

  // ds (kWarpRows, kBlock) of the keys in `k`, whose values lie behind them.
  __device__ __forceinline__ void gradients(Scores& ds, uint32_t k, int block, TileMask const& mask,
                                            float const (&lse_log2)[2 * kTiles],
                                            float const (&delta)[2 * kTiles], float alibi_slope,
                                            uint64_t dropout_key) const {
    Scores p;
    multiply_abt<Element, kD, kTiles, kBlock / 8>(p, q, warp_row, k, 0, lane);
    multiply_abt<Element, kD, kTiles, kBlock / 8>(ds, dout, warp_row, k + Traits::kBlockBytes, 0,
                                                  lane);
    if (!mask.every(begin_row, end_row, block, block + kBlock)) {
      mask_scores<kTiles, kBlock / 8>(p, ds, [&](int row, int column) {
        return mask.sees(begin_row + lane / 4 + row, block + lane % 4 * 2 + column);
      });
    }
#pragma unroll
    for (int r = 0; r < 2 * kTiles; ++r) {
      RowView row;
      row.query = begin_row + accumulator_row(r, lane);
      row.head = head, row.diagonal = row.query + mask.offset, row.alibi_slope = alibi_slope;
#pragma unroll
      for (int n = 0; n < kBlock / 8; ++n) {
        int const key = block + n * 8 + lane % 4 * 2;
        float2 keep = make_float2(1.0f, 1.0f);
        if (Traits::kFeatures && launch.scale.drops)
          keep = dropout_factors(launch.scale.keep, dropout_key, row, batch, key);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          gradient_of_score<Traits::kFeatures>(
              p[r / 2][n][r % 2 * 2 + i], ds[r / 2][n][r % 2 * 2 + i], lse_log2[r], delta[r],
              launch.scale, row, key + i, i == 0 ? keep.x : keep.y);
        }
      }
    }
  }

  __device__ __forceinline__ void store(Product<kTiles, kD / 8> const& dq) const {
    float const factor = static_cast<float>(call.score.softmax_scale);
    store_product<Element, kD, kTiles>(q, warp_row, dq, [&](int) { return factor; }, lane);
    __syncwarp();  // the rows are complete
    store_rows<Element, kD, kWarpRows, Traits::kAnyAddress>(
        q, row_address(call.dq), warp_row, static_cast<int>(call.layout.d), launch.aligned, lane);
  }
};

// dQ of wide heads.
//   Grid    a thread block for each tile of kRows queries of each query head and sequence.
//   Threads four warps, each with sixteen rows of its own.
//   Shared  the tile's queries and dout, and kStages blocks of keys and values.
//   Order   keys ascend, in one sum (contract.h, GpuOrder::gradients).
//   Needs   lse and delta; 16-bit elements with d = d_v up to kD; without kFeatures aligned rows.
template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm) void query_tile_kernel(
    __grid_constant__ BackwardLaunch const launch) {
  extern __shared__ __align__(128) char memory[];
  QueryTileWalk<Traits>(launch, memory).run();
}

}  // namespace fa::gpu::sm80
