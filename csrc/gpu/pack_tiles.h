// Tiles of a pack of many short sequences: as many as its tokens can need.
//
// Most of a grid of (tiles of the longest sequence) x (sequences) is empty where one long bound
// serves thousands of short sequences, and the grid may have more thread blocks than 32 bits count.
// There the tokens number the tiles: the tiles of sequence i start at slot
// floor(cu_seqlens[i] * rows_per_token / tile_rows) + i, which leaves each sequence at least as
// many slots as its rows need. Which tile a thread block takes cannot reach a bit.
#pragma once

#include <stdexcept>
#include <string>

#include "csrc/core/sequence.h"
#include "csrc/gpu/work_order.h"

namespace fa::gpu {

struct PackTiles {
  int32_t const* cu_seqlens;  // [b + 1]
  int64_t b, total;           // sequences, tokens
  int64_t rows_per_token, tile_rows;

  // Slots of one head.
  FA_HOST_DEVICE int64_t count() const { return total * rows_per_token / tile_rows + b; }
  // Whether the slots are fewer by far than `longest` tiles for each sequence and head.
  bool are_fewer(int64_t longest, int64_t heads) const {
    constexpr int64_t kMany = 1 << 16;
    return cu_seqlens && b > 0 && count() > 0 && longest > 4 * count() / b &&
           longest > kMany / heads / b;
  }
  FA_HOST_DEVICE int64_t first(int64_t sequence) const {
    return clamped(cu_seqlens[sequence], total) * rows_per_token / tile_rows + sequence;
  }
#if defined(__CUDACC__)
  // The tile in a slot: of sequence head / heads, the rank-th from its first rows on.
  __device__ __forceinline__ WorkItem at(int64_t slot, int head, int heads) const {
    int64_t low = 0, high = b - 1;
    while (low < high) {
      int64_t const middle = (low + high + 1) / 2;
      if (first(middle) <= slot) {
        low = middle;
      } else {
        high = middle - 1;
      }
    }
    int64_t const rank = slot - first(low);  // below zero only in offsets that decrease
    return {static_cast<int>(low) * heads + head, static_cast<int>(rank < 0 ? 0 : rank)};
  }
#endif
};

// Of queries, of which `heads` lie in one tile, or of keys.
FA_HOST_DEVICE inline PackTiles query_tiles(LayoutParams const& layout, int64_t heads,
                                            int64_t tile_rows) {
  return {layout.cu_seqlens_q, layout.b, layout.total_q, heads, tile_rows};
}
FA_HOST_DEVICE inline PackTiles key_tiles(LayoutParams const& layout, int64_t tile_keys) {
  return {layout.cu_seqlens_k, layout.b, layout.total_k, 1, tile_keys};
}

// Thread blocks of a grid, which 31 bits count.
inline int64_t checked_blocks(int64_t blocks) {
  constexpr int64_t kMost = 0x7fffffff;
  if (blocks >= 0 && blocks <= kMost) return blocks;
  throw std::runtime_error("flash_attn: a call has too many tiles; received " +
                           std::to_string(blocks) +
                           " of them; rule: at most 2^31 - 1 on a GPU; split the batch");
}

}  // namespace fa::gpu
