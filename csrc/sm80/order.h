// Which head and which of its tiles a thread block takes: the order in which work starts.
//
// Thread blocks that run at the same time should read the same keys, or each of them fetches its
// own from far away; and among those, long ones should start first, so that none is left alone at
// the end. So heads are worked on in sections whose keys and values fit into the second-level cache
// together, and a section's tiles one rank after the other.
#pragma once

#include <cstdint>

#include "csrc/cuda/divisor.h"

namespace fa::sm80 {

struct Place {
  int head;  // of all sequences: batch * heads + head
  int rank;  // of the tile among its head's, in the order in which they start
};

struct WorkOrder {
  int heads = 0, tiles = 0;  // of all sequences; of a head
  int section = 1;           // heads that are worked on together
  cuda::Divisor section_work, section_heads, last_section_heads;
  cuda::Divisor sequence_heads;

  static WorkOrder of(int64_t batch, int64_t heads, int64_t tiles, int64_t section) {
    WorkOrder order;
    if (batch * heads * tiles == 0) return order;
    int64_t const all = batch * heads, left_over = all % section;
    order.heads = static_cast<int>(all), order.tiles = static_cast<int>(tiles);
    order.section = static_cast<int>(section);
    order.section_work = cuda::Divisor::of(section * tiles);
    order.section_heads = cuda::Divisor::of(section);
    order.last_section_heads = cuda::Divisor::of(left_over > 0 ? left_over : section);
    order.sequence_heads = cuda::Divisor::of(heads);
    return order;
  }
  FA_HOST_DEVICE Place at(int work) const {
    int const first = section_work.quotient(work) * section, rest = work - first * tiles;
    bool const is_last = heads - first < section;
    cuda::Divisor const& here = is_last ? last_section_heads : section_heads;
    int const rank = here.quotient(rest);
    return {first + rest - rank * here.by, rank};
  }
  FA_HOST_DEVICE int batch_of(Place const& place) const {
    return sequence_heads.quotient(place.head);
  }
  FA_HOST_DEVICE int head_of(Place const& place) const {
    return sequence_heads.remainder(place.head);
  }
};

// Heads of a section when each reads `bytes` again and again.
inline int64_t heads_a_section(int64_t bytes, int64_t heads) {
  constexpr int64_t kCached = 16 * 1024 * 1024;
  int64_t const fit = bytes > 0 ? kCached / bytes : heads;
  return fit < 1 ? 1 : fit < heads ? fit : heads > 0 ? heads : 1;
}

}  // namespace fa::sm80
