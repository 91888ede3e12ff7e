// dK and dV of a tile of keys: for each query head of the group in ascending order, one walk over
// the queries that see them, ascending.
//
// Everything is transposed: a warp's rows are keys, and its columns queries.
#pragma once

#include "csrc/sm80/backward_scores.cuh"
#include "csrc/sm80/backward_traits.h"
#include "csrc/sm80/pack_tiles.h"

namespace fa::sm80 {

template <class Traits>
struct KeyTileShared {
  float lse[Traits::kStages][Traits::kBlock], delta[Traits::kStages][Traits::kBlock];
};

template <class Traits, bool kWantsDk, bool kWantsDv>
__global__ __launch_bounds__(Traits::kThreads, Traits::kBlocksAProcessor) void key_tile_kernel(
    __grid_constant__ BackwardLaunch const launch) {
  using Element = typename Traits::Element;
  constexpr int kD = Traits::kD, kTiles = Traits::kTiles, kWarpRows = Traits::kWarpRows;
  constexpr int kBlock = Traits::kBlock, kStages = Traits::kStages;
  constexpr int kWarpQueries = kBlock / Traits::kWarps;  // of a block, that a warp loads
  extern __shared__ __align__(128) char memory[];
  auto& shared = *reinterpret_cast<KeyTileShared<Traits>*>(memory + Traits::kTensorBytes);
  uint32_t const k = shared_address(memory), v = k + Traits::kTileBytes;  // (kRows, kD)
  uint32_t const blocks = v + Traits::kTileBytes;  // stages of queries and dout, (kBlock, kD)
  BackwardParams const& call = launch.call;
  LayoutParams const& layout = call.layout;
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = static_cast<int>(layout.d);

  int const h_kv = static_cast<int>(layout.h_kv);
  int const block_index = static_cast<int>(blockIdx.x);
  Place const place =
      launch.slots > 0
          ? key_tiles(layout, Traits::kRows).at(block_index / h_kv, block_index % h_kv, h_kv)
          : launch.order.at(block_index);
  int const head_kv = launch.order.head_of(place), batch = launch.order.batch_of(place);
  int const tile = place.rank;  // early keys are seen by more queries
  int const group = static_cast<int>(layout.h_q) / h_kv;
  Sequence const s = sequence_of(layout, batch);
  int const s_q = static_cast<int>(s.s_q), s_k = static_cast<int>(s.s_k);
  int const first_key = tile * Traits::kRows, warp_row = warp * kWarpRows;
  if (first_key >= s_k) return;
  int const begin_key = first_key + warp_row, end_key = begin_key + kWarpRows;
  KeyRows const keys = key_rows(call.k, layout, s, head_kv, 2);
  KeyRows const values = key_rows(call.v, layout, s, head_kv, 2);
  fill_even_rows<kD, kWarpRows, Traits::kAnyAddress>(
      k, warp_row, keys.row(begin_key), keys.row_bytes, s_k - begin_key, d, launch.aligned, lane);
  fill_even_rows<kD, kWarpRows, Traits::kAnyAddress>(v, warp_row, values.row(begin_key),
                                                     values.row_bytes, s_k - begin_key, d,
                                                     launch.aligned, lane);

  Diagonals const mask(call.score, s);
  int const last_key = min(first_key + Traits::kRows, s_k) - 1;
  int const begin = max(first_key - mask.highest, 0) & -kBlock;
  int const end = min(last_key - mask.lowest + 1, s_q);
  auto const load = [&](int head, int block, int stage) {
    uint32_t const q = blocks + stage * 2 * Traits::kBlockBytes;
    int const own = warp * kWarpQueries, first = block + own;
    auto const fill = [&](uint32_t to, RowTensor const& t) {
      fill_even_rows<kD, kWarpQueries, Traits::kAnyAddress>(
          to, own, query_row(t, s, first, head, 2), t.row_stride * 2, s_q - first, d,
          launch.aligned, lane);
    };
    fill(q, call.q);
    fill(q + Traits::kBlockBytes, call.dout);
    // A query that does not exist has zeros for everything, and so adds nothing.
    int const query = block + static_cast<int>(threadIdx.x) % kBlock;
    if (threadIdx.x < kBlock) {
      copy4_async(shared_address(&shared.lse[stage][query - block]),
                  call.lse + s.lse_base + head * layout.lse_head_stride + query, query < s_q);
    } else if (threadIdx.x < 2 * kBlock) {
      copy4_async(shared_address(&shared.delta[stage][query - block]),
                  call.delta + delta_base(call, s, batch) + head * call.delta_head_stride + query,
                  query < s_q);
    }
  };

  Product<kTiles, kD / 8> dk, dv;
  if (kWantsDk) set_zero<kTiles, kD / 8>(dk);
  if (kWantsDv) set_zero<kTiles, kD / 8>(dv);
  uint64_t dropout_key = 0;
  if (Traits::kFeatures && launch.scale.drops) dropout_key = philox_key(call.score.seed);
  int const end_head = (head_kv + 1) * group;
  int head = begin < end ? head_kv * group : end_head, block = begin, stage = 0;
  if (head < end_head) load(head, block, 0);
  commit_copies();
#pragma unroll 1
  while (head < end_head) {  // heads ascending, in each queries ascending
    int const next_head = block + kBlock < end ? head : head + 1;
    int const next_block = block + kBlock < end ? block + kBlock : begin;
    wait_copies<0>();
    __syncthreads();  // this block is there for all, and nobody reads the one before any more
    if (kStages == 2) {
      if (next_head < end_head) load(next_head, next_block, stage ^ 1);
      commit_copies();
    }
    uint32_t const q = blocks + stage * 2 * Traits::kBlockBytes, dout = q + Traits::kBlockBytes;
    if (mask.any(block, block + kBlock, begin_key, end_key)) {
      Product<kTiles, kBlock / 8> p, ds;
      multiply_rows<Element, kD, kTiles, kBlock / 8>(p, k, warp_row, q, 0, lane);
      multiply_rows<Element, kD, kTiles, kBlock / 8>(ds, v, warp_row, dout, 0, lane);
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
            int const key = begin_key + r / 2 * 16 + r % 2 * 8 + lane / 4;
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
      if constexpr (kWantsDv) add_product<Element, kD, kTiles, kBlock / 8>(dv, p, dout, 0, lane);
      if constexpr (kWantsDk) add_product<Element, kD, kTiles, kBlock / 8>(dk, ds, q, 0, lane);
    }
    if (kStages == 1) {
      __syncthreads();  // all have read this block
      if (next_head < end_head) load(next_head, next_block, 0);
      commit_copies();
    } else {
      stage ^= 1;
    }
    head = next_head, block = next_block;
  }

  wait_copies<0>();
  __syncwarp();  // the warp's keys are read, or have come without need: their room is the results'
  auto const write = [&](uint32_t room, RowTensor const& t, Product<kTiles, kD / 8> const& x,
                         float factor) {
    store_product<Element, kD, kTiles>(room, warp_row, x, [&](int) { return factor; }, lane);
    __syncwarp();  // the rows are complete
    int const key = begin_key + lane;
    char* const to =
        lane < kWarpRows && key < s_k ? key_rows(t, layout, s, head_kv, 2).row(key) : nullptr;
    store_rows<Element, kD, kWarpRows, Traits::kAnyAddress>(room, to, warp_row, d, launch.aligned,
                                                            lane);
  };
  if constexpr (kWantsDk) write(k, call.dk, dk, static_cast<float>(call.score.softmax_scale));
  if constexpr (kWantsDv) write(v, call.dv, dv, 1.0f);
}

}  // namespace fa::sm80
