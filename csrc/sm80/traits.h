// The shapes of this set's forward kernels.
//
// Prefill: a warp owns kRowTiles times sixteen rows whole: their scores, their probabilities and
// their outputs never leave its registers. Two tiles of sixteen read half as much of shared memory
// for a product as one; above d = 128 the output of two does not fit into the registers.
// Decode: sixteen rows, and four warps that share a span of keys.
#pragma once

#include "csrc/gpu/forward_launch.h"
#include "csrc/gpu/softmax_state.cuh"

namespace fa::gpu::sm80 {

constexpr int kBlockKeys = static_cast<int>(contract::GpuOrder::kBlockKeys);
constexpr int kWarpsPerBlock = 4, kThreadsPerBlock = 32 * kWarpsPerBlock;
constexpr int kDecodeRows = 16;

// Keys that a decode takes at a time: whole blocks. A span of keys and one of values fit into 99 KB
// of shared memory. Where more thread blocks are to share a multiprocessor, spans are smaller.
constexpr int span_keys(int d, Occupancy occupancy) {
  return d <= 64 || (d <= 128 && occupancy != Occupancy::kMost) ? 128 : 64;
}
// Spans in shared memory: with two, the next one is under way while this one is worked on.
constexpr int span_stages(Occupancy occupancy) { return occupancy == Occupancy::kOne ? 2 : 1; }
// Smaller spans gain at one head dim only; the others are small already, or slow.
constexpr bool has_most_occupancy(int d) { return d == 128; }

constexpr int tile_rows(int d, bool is_decode) {
  return is_decode ? kDecodeRows : d <= 128 ? 128 : 64;
}

// Thread blocks that a multiprocessor is meant to hold; the registers are cut to fit, and a plan
// counts on them.
constexpr int blocks_per_sm(int d, bool is_decode, Occupancy occupancy = Occupancy::kUsual) {
  if (!is_decode) return 2;
  if (occupancy == Occupancy::kOne) return 1;
  return d * span_keys(d, occupancy) <= 8192 ? 4 : d <= 192 ? 3 : 2;
}

// Shared memory of a decode's thread block: queries, spans of keys and of values, probabilities;
// and what is needed once a span or a tile.
constexpr int decode_tile_bytes(int d, Occupancy occupancy) {
  int const span = span_keys(d, occupancy);
  return (kDecodeRows * d + 2 * span_stages(occupancy) * span * d + kDecodeRows * span) * 2;
}
constexpr int decode_shared_bytes(int d, Occupancy occupancy) {
  return decode_tile_bytes(d, occupancy) + 3072;
}

// Blocks of keys and values in a prefill's shared memory: with two, the next one is under way while
// this one is worked on.
constexpr int key_stages(int d) { return d <= 96 ? 2 : 1; }

// Shared memory of a prefill's thread block: queries, blocks of keys and of values; the rows'
// views, and what is needed once a tile.
constexpr int prefill_tile_bytes(int d) {
  return (tile_rows(d, false) + kBlockKeys * 2 * key_stages(d)) * d * 2;
}
constexpr int prefill_shared_bytes(int d) {
  return prefill_tile_bytes(d) + tile_rows(d, false) * 32 + 256;
}

// The fold of a prefill's tile, in vectors of four floats a thread.
constexpr int fold_vectors(int d) { return tile_rows(d, false) * d / 4 / kThreadsPerBlock; }
// How many of them find room in shared memory when a multiprocessor has `bytes` for its blocks.
constexpr int fold_vectors_in_shared(int d, int64_t bytes) {
  int64_t const rest = bytes / blocks_per_sm(d, false) - kReservedBytes - prefill_shared_bytes(d);
  int64_t const fit = rest / (kThreadsPerBlock * 16) / kFoldStep * kFoldStep;
  int64_t const all = fold_vectors(d);
  return static_cast<int>(fit < 0 ? 0 : fit < all ? fit : all);
}

// kFeatures: softcap, ALiBi, dropout, a scale that is not positive, rows that do not lie on sixteen
// bytes. What a call does not use of it does not change its bits.
template <class Element_, int kD_, bool kFeatures_>
struct ForwardTraits {
  using Element = Element_;
  static constexpr int kD = kD_;
  static constexpr bool kFeatures = kFeatures_, kAnyAddress = kFeatures, kPaged = true;
  static constexpr int kWarps = kWarpsPerBlock, kThreads = kThreadsPerBlock;
  static_assert(sizeof(Element) == 2 && kD % 32 == 0);
};

template <class Element, int kD, bool kFeatures>
struct Prefill : ForwardTraits<Element, kD, kFeatures> {
  static constexpr bool kDecode = false;
  static constexpr int kRows = tile_rows(kD, false), kRowsPerWarp = kRows / kWarpsPerBlock;
  static constexpr int kRowTiles = kRowsPerWarp / 16;
  static constexpr int kThreadRows = 2 * kRowTiles;  // that a thread holds elements of
  static constexpr int kLoadKeys = kBlockKeys, kStages = key_stages(kD);
  static constexpr int kBlocksPerSm = blocks_per_sm(kD, false);

  static constexpr int kQueryBytes = kRows * kD * 2;
  static constexpr int kLoadBytes = kLoadKeys * kD * 2;  // of keys, and of values
  static constexpr int kTileBytes = prefill_tile_bytes(kD);
  static constexpr int kSharedBytes = prefill_shared_bytes(kD);
  static_assert(kRowsPerWarp == 16 * kRowTiles && kRows <= kThreadsPerBlock,
                "a warp owns whole tiles of sixteen rows, and a thread views one row");
  static_assert(fold_vectors(kD) == kRowTiles * kD / 8,
                "a thread folds the elements of the output that it holds");
};

template <class Element, int kD, bool kFeatures, Occupancy kOccupancy>
struct Decode : ForwardTraits<Element, kD, kFeatures> {
  static constexpr bool kDecode = true;
  static constexpr int kRows = kDecodeRows, kRowsPerWarp = kRows;  // every warp computes for all
  static constexpr int kLoadKeys = span_keys(kD, kOccupancy);
  static constexpr int kWarpKeys = kLoadKeys / kWarpsPerBlock;
  static constexpr int kBlocks = kLoadKeys / kBlockKeys, kStages = span_stages(kOccupancy);
  static constexpr int kBlocksPerSm = blocks_per_sm(kD, true, kOccupancy);

  static constexpr int kQueryBytes = kRows * kD * 2;
  static constexpr int kLoadBytes = kLoadKeys * kD * 2;
  static constexpr int kTileBytes = decode_tile_bytes(kD, kOccupancy);
  static constexpr int kSharedBytes = decode_shared_bytes(kD, kOccupancy);
  static_assert(kBlocksPerSm * (kSharedBytes + kReservedBytes) <= 228 * 1024,
                "fewer thread blocks than a plan counts on, where shared memory is largest");
  static_assert(kD % (16 * kWarpsPerBlock) == 0, "a warp has whole sixteens of the columns");
  static_assert(kBlocks * kBlockKeys == kLoadKeys, "a span is whole blocks");
};

}  // namespace fa::gpu::sm80
