// Which head and which of its tiles a thread block takes: the order in which work starts.
//
// Thread blocks that run at the same time should read the same keys, so that the L2 cache serves
// all but the first of them. Tiles with much work should start first, so that no multiprocessor is
// left with a long one at the end. So heads form L2 groups: heads whose keys and values fit into
// the L2 cache together. One group comes after the other, and in a group the tiles come by rank.
#pragma once

#include <cstdint>

#include "csrc/gpu/divisor.h"

namespace fa::gpu {

// A tile.
struct WorkItem {
  int head;  // of all sequences: batch * heads + head
  int rank;  // of the tile among its head's, in the order in which they start
};

struct WorkOrder {
  int heads = 0, tiles = 0;  // of all sequences; of a head
  int l2_group = 1;          // heads of an L2 group
  Divisor l2_group_work, l2_group_heads, last_l2_group_heads;
  Divisor sequence_heads;

  static WorkOrder of(int64_t batch, int64_t heads, int64_t tiles, int64_t l2_group) {
    WorkOrder order;
    if (batch * heads * tiles == 0) return order;
    int64_t const all = batch * heads, left_over = all % l2_group;
    order.heads = static_cast<int>(all), order.tiles = static_cast<int>(tiles);
    order.l2_group = static_cast<int>(l2_group);
    order.l2_group_work = Divisor::of(l2_group * tiles);
    order.l2_group_heads = Divisor::of(l2_group);
    order.last_l2_group_heads = Divisor::of(left_over > 0 ? left_over : l2_group);
    order.sequence_heads = Divisor::of(heads);
    return order;
  }
  FA_HOST_DEVICE WorkItem at(int work) const {
    int const first = l2_group_work.quotient(work) * l2_group, rest = work - first * tiles;
    bool const is_last = heads - first < l2_group;
    Divisor const& here = is_last ? last_l2_group_heads : l2_group_heads;
    int const rank = here.quotient(rest);
    return {first + rest - rank * here.by, rank};
  }
  FA_HOST_DEVICE int batch_of(WorkItem const& work) const {
    return sequence_heads.quotient(work.head);
  }
  FA_HOST_DEVICE int head_of(WorkItem const& work) const {
    return sequence_heads.remainder(work.head);
  }
};

// Heads of an L2 group, when the tiles of each read the same `bytes`.
inline int64_t heads_per_l2_group(int64_t bytes, int64_t heads) {
  constexpr int64_t kCached = 16 * 1024 * 1024;
  int64_t const fit = bytes > 0 ? kCached / bytes : heads;
  return fit < 1 ? 1 : fit < heads ? fit : heads > 0 ? heads : 1;
}

}  // namespace fa::gpu
