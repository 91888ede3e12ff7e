// A chunk: the sixteen bytes that a thread moves at a time.
#pragma once

#include <cstdint>

namespace fa::gpu {

constexpr int kChunk = 8;  // elements in sixteen bytes

// One chunk, by elements, of which `present` are read and the others zero: for rows that do not lie
// on sixteen bytes or whose d ends inside it.
__device__ __forceinline__ uint4 chunk_by_elements(uint16_t const* from, int present) {
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t const low = 2 * i < present ? from[2 * i] : 0;
    uint32_t const high = 2 * i + 1 < present ? from[2 * i + 1] : 0;
    word[i] = low | high << 16;
  }
  return make_uint4(word[0], word[1], word[2], word[3]);
}
}  // namespace fa::gpu
