// dQ of a tile of queries: one walk over the keys that they see, ascending.
#pragma once

#include "csrc/sm80/backward_scores.cuh"
#include "csrc/sm80/backward_traits.h"
#include "csrc/sm80/key_tiles.cuh"
#include "csrc/sm80/pack_tiles.h"

namespace fa::sm80 {

template <class Traits>
struct QueryTileShared {
  KeyTiles<Traits> keys, values;
};

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kBlocksAProcessor) void query_tile_kernel(
    __grid_constant__ BackwardLaunch const launch) {
  using Element = typename Traits::Element;
  constexpr int kD = Traits::kD, kTiles = Traits::kTiles, kWarpRows = Traits::kWarpRows;
  constexpr int kBlock = Traits::kBlock, kStages = Traits::kStages;
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<QueryTileShared<Traits>*>(memory + Traits::kTensorBytes);
  uint32_t const q = shared_address(memory), dout = q + Traits::kTileBytes;  // (kRows, kD)
  uint32_t const blocks = dout + Traits::kTileBytes;  // stages of keys and values, (kBlock, kD)
  BackwardParams const& call = launch.call;
  LayoutParams const& layout = call.layout;
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = static_cast<int>(layout.d);

  int const h_q = static_cast<int>(layout.h_q);
  int const block_index = static_cast<int>(blockIdx.x);
  bool const in_slots = launch.slots > 0;
  PackTiles const pack = query_tiles(layout, 1, Traits::kRows);
  Place const place =
      in_slots ? pack.at(block_index / h_q, block_index % h_q, h_q) : launch.order.at(block_index);
  int const head = launch.order.head_of(place), batch = launch.order.batch_of(place);
  int const tile = in_slots ? place.rank : launch.tiles - 1 - place.rank;  // late see more keys
  Sequence const s = sequence_of(layout, batch);
  int const s_q = static_cast<int>(s.s_q), s_k = static_cast<int>(s.s_k);
  int const first_row = tile * Traits::kRows, warp_row = warp * kWarpRows;
  if (first_row >= s_q) return;
  if (threadIdx.x == 0) {
    int const head_kv = head / (h_q / static_cast<int>(layout.h_kv));
    shared.keys.set(layout, call.k, s, head_kv, launch.aligned);
    shared.values.set(layout, call.v, s, head_kv, launch.aligned);
  }
  int const begin_row = first_row + warp_row, end_row = min(begin_row + kWarpRows, s_q);
  auto const row_address = [&](RowTensor const& t) -> char* {
    int const row = begin_row + lane;
    if (lane >= kWarpRows || row >= s_q) return nullptr;
    return query_row(t, sequence_of(layout, batch), row, head, 2);  // again: registers are short
  };

  Diagonals const mask(call.score, s);
  int const last_row = min(first_row + Traits::kRows, s_q) - 1;
  int const begin = max(first_row + mask.lowest, 0) & -kBlock;
  int const end = min(last_row + mask.highest + 1, s_k);

  Product<kTiles, kD / 8> dq;
  set_zero<kTiles, kD / 8>(dq);
  float lse_log2[2 * kTiles], delta[2 * kTiles];
#pragma unroll
  for (int r = 0; r < 2 * kTiles; ++r) {
    int const row = begin_row + r / 2 * 16 + r % 2 * 8 + lane / 4;
    bool const exists = row < s_q;
    lse_log2[r] =
        exists ? call.lse[s.lse_base + head * layout.lse_head_stride + row] * kLog2E : INFINITY;
    delta[r] = exists ? call.delta[delta_base(call, s, batch) + head * call.delta_head_stride + row]
                      : 0.0f;
  }
  __syncthreads();  // the addresses are there
  auto const load = [&](int block, int stage) {
    uint32_t const k = blocks + stage * 2 * Traits::kBlockBytes;
    shared.keys.load(k, block, warp, lane);
    shared.values.load(k + Traits::kBlockBytes, block, warp, lane);
  };
  fill_scattered_rows<kD, kWarpRows, Traits::kAnyAddress>(q, warp_row, row_address(call.q), nullptr,
                                                          d, launch.aligned, lane);
  fill_scattered_rows<kD, kWarpRows, Traits::kAnyAddress>(dout, warp_row, row_address(call.dout),
                                                          nullptr, d, launch.aligned, lane);
  if (begin < end) load(begin, 0);
  commit_copies();
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
    wait_copies<0>();
    __syncthreads();  // this block is there for all, and nobody reads the one before any more
    if (kStages == 2) {
      if (next < end) load(next, stage ^ 1);
      commit_copies();
    }
    uint32_t const k = blocks + stage * 2 * Traits::kBlockBytes, v = k + Traits::kBlockBytes;
    if (mask.any(begin_row, end_row, block, next)) {
      Product<kTiles, kBlock / 8> p, ds;
      multiply_rows<Element, kD, kTiles, kBlock / 8>(p, q, warp_row, k, 0, lane);
      multiply_rows<Element, kD, kTiles, kBlock / 8>(ds, dout, warp_row, v, 0, lane);
      if (!mask.every(begin_row, end_row, block, next)) {
        mask_scores<kTiles, kBlock / 8>(p, ds, [&](int row, int column) {
          return mask.sees(begin_row + lane / 4 + row, block + lane % 4 * 2 + column);
        });
      }
#pragma unroll
      for (int r = 0; r < 2 * kTiles; ++r) {
        RowView row;
        row.query = begin_row + r / 2 * 16 + r % 2 * 8 + lane / 4;
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
      add_product<Element, kD, kTiles, kBlock / 8>(dq, ds, k, 0, lane);
    }
    if (kStages == 1) {
      __syncthreads();  // all have read this block
      if (next < end) load(next, 0);
      commit_copies();
    } else {
      stage ^= 1;
    }
  }
  wait_copies<0>();
  __syncwarp();  // the warp's queries are read, or have come without need: their room is the
                 // results'
  float const factor = static_cast<float>(call.score.softmax_scale);
  store_product<Element, kD, kTiles>(q, warp_row, dq, [&](int) { return factor; }, lane);
  __syncwarp();  // the rows are complete
  store_rows<Element, kD, kWarpRows, Traits::kAnyAddress>(q, row_address(call.dq), warp_row, d,
                                                          launch.aligned, lane);
}

}  // namespace fa::sm80
