// The two backward kernels on a stream.
#pragma once

#include "csrc/cuda/errors.cuh"
#include "csrc/sm80/backward_keys.cuh"
#include "csrc/sm80/backward_launch.h"
#include "csrc/sm80/backward_queries.cuh"
#include "csrc/sm80/backward_tile.cuh"
#include "csrc/sm80/traits.h"

namespace fa::sm80 {

// A tile for each kRows of `length` rows, of each of `heads` heads, which all read the same
// `read_again` rows of two tensors.
template <class Traits>
void launch_tiles(void (*kernel)(BackwardLaunch), int shared_bytes, int64_t heads, int64_t length,
                  int64_t read_again, PackTiles const& pack, BackwardLaunch launch,
                  cudaStream_t stream) {
  int64_t const blocks = count_tiles(launch, pack, length, heads);
  if (blocks == 0) return;
  set_order(launch, heads,
            heads_a_section(read_again * Traits::kD * 4, heads * launch.call.layout.b));
  constexpr int kDefaultBytes = 48 * 1024;
  if (shared_bytes > kDefaultBytes) {
    fa::cuda::check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  kernel<<<static_cast<unsigned>(blocks), Traits::kThreads, shared_bytes, stream>>>(launch);
  fa::cuda::check(cudaGetLastError());
}

// Heads that are worked on together when `slots` thread blocks run at once. Tiles of one head that
// run at the same time read the same queries, but each lags behind the one before it, whose part of
// dQ it waits for. A short walk does not make up for many lags; a long one saves reads.
inline int64_t heads_a_walk(int64_t slots, int64_t tiles, int64_t heads) {
  int64_t const at_once = tiles > 64 ? 12 : tiles > 8 ? 8 : 4;
  int64_t const wanted = (slots + at_once - 1) / at_once;
  return wanted < heads ? wanted : heads;
}

template <class Traits>
void launch_key_walk(BackwardLaunch const& given, cudaStream_t stream) {
  BackwardLaunch launch = given;
  LayoutParams const& layout = launch.call.layout;
  int64_t const heads = layout.h_kv * layout.b;
  int64_t const blocks =
      count_tiles(launch, key_tiles(layout, Traits::kKeys), layout.s_k, layout.h_kv);
  if (blocks == 0) return;
  int64_t const at_once = launch.processors.count * Traits::kBlocksAProcessor;
  set_order(launch, layout.h_kv, heads_a_walk(at_once, launch.tiles, heads));
  bool const fits = Traits::kBlocksAProcessor * (Traits::shared_bytes(2) + kReservedBytes) <=
                    launch.processors.shared_bytes;
  launch.stages = fits ? 2 : 1;
  int const bytes = Traits::shared_bytes(launch.stages);
  auto const kernel = key_walk_kernel<Traits>;
  fa::cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<static_cast<unsigned>(blocks), Traits::kThreads, bytes, stream>>>(launch);
  fa::cuda::check(cudaGetLastError());
}

template <class Traits>
void launch_query_tiles(BackwardLaunch const& launch, cudaStream_t stream) {
  constexpr int kBytes = Traits::kTensorBytes + static_cast<int>(sizeof(QueryTileShared<Traits>));
  LayoutParams const& layout = launch.call.layout;
  PackTiles const pack = query_tiles(layout, 1, Traits::kRows);
  launch_tiles<Traits>(query_tile_kernel<Traits>, kBytes, layout.h_q, layout.s_q, layout.s_k, pack,
                       launch, stream);
}

template <class Traits>
void launch_key_tiles(BackwardLaunch const& launch, cudaStream_t stream) {
  constexpr int kBytes = Traits::kTensorBytes + static_cast<int>(sizeof(KeyTileShared<Traits>));
  LayoutParams const& layout = launch.call.layout;
  auto const run = [&](auto kernel) {
    launch_tiles<Traits>(kernel, kBytes, layout.h_kv, layout.s_k,
                         layout.s_q * (layout.h_q / layout.h_kv), key_tiles(layout, Traits::kRows),
                         launch, stream);
  };
  if constexpr (Traits::kOneAfterTheOther) {
    run(key_tile_kernel<Traits, true, false>);
    run(key_tile_kernel<Traits, false, true>);
  } else {
    run(key_tile_kernel<Traits, true, true>);
  }
}

}  // namespace fa::sm80
