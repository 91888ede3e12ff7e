// The shapes of the sm80 family's kernels.
//
// A warp owns kRowTiles times sixteen rows whole: their scores, their probabilities and their
// outputs never leave its registers. Two tiles of sixteen read half as much of shared memory for a
// product as one; above d = 128 the output of two does not fit into the registers.
#pragma once

#include "csrc/core/contract.h"

namespace fa::sm80 {

// Thread blocks that a multiprocessor is meant to hold; the registers are cut to fit, and a plan
// counts on them. One of a single warp is limited by shared memory, not by registers.
constexpr int blocks_a_processor(int d, bool few_rows) {
  if (few_rows) return d <= 64 ? 12 : d <= 96 ? 8 : d <= 128 ? 6 : d <= 192 ? 4 : 3;
  return d <= 64 ? 3 : 2;
}

// Rows of a tile: one warp's sixteen, or four warps'.
constexpr int tile_rows(int d, bool few_rows) { return few_rows ? 16 : d <= 128 ? 128 : 64; }

// kFeatures: softcap, ALiBi, dropout, a scale that is not positive, rows that do not lie on sixteen
// bytes. What a call does not use of it does not change its bits.
template <class Element_, int kD_, bool kFewRows_, bool kFeatures_>
struct ForwardTraits {
  using Element = Element_;
  static constexpr int kD = kD_;
  static constexpr bool kFewRows = kFewRows_, kFeatures = kFeatures_;
  static constexpr bool kAnyAddress = kFeatures, kPaged = true;
  static constexpr int kRows = tile_rows(kD, kFewRows), kWarps = kFewRows ? 1 : 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRowsAWarp = kRows / kWarps, kRowTiles = kRowsAWarp / 16;
  static constexpr int kThreadRows = 2 * kRowTiles;  // that a thread holds elements of
  static constexpr int kBlockKeys = static_cast<int>(contract::kSm80BlockKeys);
  static constexpr int kBlocksAProcessor = blocks_a_processor(kD, kFewRows);

  static constexpr int kQueryBytes = kRows * kD * 2;
  static constexpr int kBlockBytes = kBlockKeys * kD * 2;  // of keys, and of values
  static constexpr int kTileBytes = kQueryBytes + 2 * kBlockBytes;
};

}  // namespace fa::sm80
