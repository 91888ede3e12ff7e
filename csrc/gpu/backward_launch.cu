// What the kernels of a backward pass are given, whatever set they belong to.
#include "csrc/gpu/backward_launch.h"

#include "csrc/gpu/features.h"
#include "csrc/gpu/positions.h"

namespace fa::gpu {

BackwardLaunch prepare_backward(BackwardParams const& call,
                                Multiprocessors const& multiprocessors) {
  check_positions(call.layout);
  return {.call = call,
          .scale = ScoreScale::of(call.score),
          .aligned = rows_are_aligned(call),
          .multiprocessors = multiprocessors};
}

int64_t count_tiles(BackwardLaunch& launch, PackTiles const& pack, int64_t length, int64_t heads) {
  int64_t const longest = (length + pack.tile_rows - 1) / pack.tile_rows;
  launch.tiles = static_cast<int>(longest);
  launch.slots = pack.are_fewer(longest, heads) ? static_cast<int>(pack.count()) : 0;
  return checked_blocks((launch.slots > 0 ? launch.slots : longest * pack.b) * heads);
}

void set_order(BackwardLaunch& launch, int64_t heads, int64_t l2_group) {
  launch.order =
      WorkOrder::of(launch.call.layout.b, heads, launch.slots > 0 ? 1 : launch.tiles, l2_group);
}

}  // namespace fa::gpu
