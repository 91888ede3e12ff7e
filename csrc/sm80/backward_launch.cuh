// The backward kernels on a stream.
#pragma once

#include "csrc/gpu/launch.cuh"
#include "csrc/sm80/backward_key_walk.cuh"
#include "csrc/sm80/backward_keys.cuh"
#include "csrc/sm80/backward_launch.h"
#include "csrc/sm80/backward_queries.cuh"
#include "csrc/sm80/traits.h"

namespace fa::gpu::sm80 {

// The tiles of one of two walks.
struct TileGrid {
  PackTiles pack;      // the tiles by tokens
  int64_t heads;       // of a sequence
  int64_t length;      // rows of the longest sequence that are cut into tiles
  int64_t read_again;  // rows of two tensors that all tiles of a head read
};

template <class Traits, auto kKernel>
void launch_tiles(BackwardLaunch const& given, TileGrid const& grid, int shared_bytes,
                  void* stream) {
  BackwardLaunch launch = given;
  int64_t const blocks = count_tiles(launch, grid.pack, grid.length, grid.heads);
  if (blocks == 0) return;
  set_order(
      launch, grid.heads,
      heads_per_l2_group(grid.read_again * Traits::kD * 4, grid.heads * launch.call.layout.b));
  launch_kernel<kKernel>(launch, blocks, Traits::kThreads, shared_bytes, stream);
}

template <class Traits>
void launch_query_tiles(BackwardLaunch const& launch, void* stream) {
  constexpr int kBytes = Traits::kTensorBytes + static_cast<int>(sizeof(QueryTileShared<Traits>));
  LayoutParams const& layout = launch.call.layout;
  TileGrid const grid{.pack = query_tiles(layout, 1, Traits::kRows),
                      .heads = layout.h_q,
                      .length = layout.s_q,
                      .read_again = layout.s_k};
  launch_tiles<Traits, query_tile_kernel<Traits>>(launch, grid, kBytes, stream);
}

template <class Traits>
void launch_key_tiles(BackwardLaunch const& launch, void* stream) {
  constexpr int kBytes = Traits::kTensorBytes + static_cast<int>(sizeof(KeyTileShared<Traits>));
  LayoutParams const& layout = launch.call.layout;
  TileGrid const grid{.pack = key_tiles(layout, Traits::kRows),
                      .heads = layout.h_kv,
                      .length = layout.s_k,
                      .read_again = layout.s_q * (layout.h_q / layout.h_kv)};
  if constexpr (Traits::kOneAfterTheOther) {
    launch_tiles<Traits, key_tile_kernel<Traits, true, false>>(launch, grid, kBytes, stream);
    launch_tiles<Traits, key_tile_kernel<Traits, false, true>>(launch, grid, kBytes, stream);
  } else {
    launch_tiles<Traits, key_tile_kernel<Traits, true, true>>(launch, grid, kBytes, stream);
  }
}

// Heads that are worked on together when `resident` thread blocks run at once. Tiles of one head
// that run at the same time read the same queries, but each lags behind the one before it, whose
// part of dQ it waits for. A short walk does not make up for many lags; a long one saves reads.
inline int64_t heads_at_once(int64_t resident, int64_t tiles, int64_t heads) {
  int64_t const tiles_at_once = tiles > 64 ? 12 : tiles > 8 ? 8 : 4;
  int64_t const wanted = (resident + tiles_at_once - 1) / tiles_at_once;
  return wanted < heads ? wanted : heads;
}

template <class Traits>
void launch_key_walk(BackwardLaunch const& given, void* stream) {
  BackwardLaunch launch = given;
  LayoutParams const& layout = launch.call.layout;
  int64_t const blocks =
      count_tiles(launch, key_tiles(layout, Traits::kKeys), layout.s_k, layout.h_kv);
  if (blocks == 0) return;
  Multiprocessors const& sms = launch.multiprocessors;
  set_order(launch, layout.h_kv,
            heads_at_once(sms.count * Traits::kBlocksPerSm, launch.tiles, layout.h_kv * layout.b));
  int64_t const two_stages = Traits::shared_bytes(2) + kReservedBytes;
  bool const fit = Traits::kBlocksPerSm * two_stages <= sms.shared_bytes &&
                   Traits::shared_bytes(2) <= sms.max_shared_bytes_per_block;
  launch.stages = fit ? 2 : 1;
  launch_kernel<key_walk_kernel<Traits>>(launch, blocks, Traits::kThreads,
                                         Traits::shared_bytes(launch.stages), stream);
}

}  // namespace fa::gpu::sm80
