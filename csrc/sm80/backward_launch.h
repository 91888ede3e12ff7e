// The backward kernels by name; csrc/instantiations/ has one of them a file.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "csrc/sm80/backward_traits.h"
#include "csrc/sm80/family.h"
#include "csrc/sm80/pack_tiles.h"

namespace fa::sm80 {

// How many thread blocks take the tiles of `heads` heads of each sequence, of which the longest has
// `length` rows; pack: the same tiles by tokens.
inline int64_t count_tiles(BackwardLaunch& launch, PackTiles const& pack, int64_t length,
                           int64_t heads) {
  int64_t const longest = (length + pack.tile_rows - 1) / pack.tile_rows;
  launch.tiles = static_cast<int>(longest);
  launch.slots = pack.are_fewer(longest, heads) ? static_cast<int>(pack.count()) : 0;
  return checked_blocks((launch.slots > 0 ? launch.slots : longest * pack.b) * heads);
}

// The order in which those tiles start; `section` heads are worked on together.
inline void set_order(BackwardLaunch& launch, int64_t heads, int64_t section) {
  launch.order =
      WorkOrder::of(launch.call.layout.b, heads, launch.slots > 0 ? 1 : launch.tiles, section);
}

template <class Traits>
void launch_query_tiles(BackwardLaunch const& launch, cudaStream_t stream);
template <class Traits>
void launch_key_walk(BackwardLaunch const& launch, cudaStream_t stream);
template <class Traits>
void launch_key_tiles(BackwardLaunch const& launch, cudaStream_t stream);

}  // namespace fa::sm80
