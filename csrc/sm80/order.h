// Which head and which of its tiles a thread block takes: the order in which work starts.
//
// Thread blocks that run at the same time should read the same keys, or each of them fetches its
// own from far away; and among those, long ones should start first, so that none is left alone at
// the end. So heads are worked on in sections whose keys and values fit into the second-level cache
// together, and a section's tiles one rank after the other.
#pragma once

#include <cstdint>

#include "csrc/core/host_device.h"

namespace fa::sm80 {

struct Place {
  int head;  // of all sequences: batch * heads + head
  int rank;  // of the tile among its head's, in the order in which they start
};

// Heads of a section when each reads `bytes` again and again.
inline int heads_a_section(int64_t bytes, int64_t heads) {
  constexpr int64_t kCached = 16 * 1024 * 1024;
  int64_t const fit = bytes > 0 ? kCached / bytes : heads;
  return static_cast<int>(fit < 1 ? 1 : fit < heads ? fit : heads > 0 ? heads : 1);
}

FA_HOST_DEVICE inline Place place_of(int work, int heads, int tiles, int section) {
  int const first = work / (section * tiles) * section;
  int const here = heads - first < section ? heads - first : section;
  int const rest = work - first * tiles;
  return {first + rest % here, rest / here};
}

}  // namespace fa::sm80
