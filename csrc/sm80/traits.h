// The shapes of the sm80 family's forward kernels.
//
// Many rows: a warp owns kRowTiles times sixteen rows whole: their scores, their probabilities and
// their outputs never leave its registers. Two tiles of sixteen read half as much of shared memory
// for a product as one; above d = 128 the output of two does not fit into the registers.
// Few rows: sixteen, and four warps that share a span of keys.
#pragma once

#include "csrc/sm80/family.h"

namespace fa::sm80 {

constexpr int kBlockKeys = static_cast<int>(contract::kSm80BlockKeys);
constexpr int kWarpsABlock = 4, kThreadsABlock = 32 * kWarpsABlock;
constexpr int kFewRows = 16;

// Keys that few rows take at a time: whole blocks, which 99 KB of shared memory hold twice. In a
// crowd, smaller spans make more places; alone, the next span is on its way as well.
constexpr int span_keys(int d, Company company) {
  return d <= 64 || (d <= 128 && company != Company::kCrowd) ? 128 : 64;
}
constexpr int span_stages(Company company) { return company == Company::kAlone ? 2 : 1; }

constexpr int tile_rows(int d, bool few_rows) { return few_rows ? kFewRows : d <= 128 ? 128 : 64; }

// Thread blocks that a multiprocessor is meant to hold; the registers are cut to fit, and a plan
// counts on them.
constexpr int blocks_a_processor(int d, bool few_rows, Company company = Company::kSome) {
  if (!few_rows) return 2;
  if (company == Company::kAlone) return 1;
  return d * span_keys(d, company) <= 8192 ? 4 : d <= 192 ? 3 : 2;
}

// Shared memory of a thread block of few rows: queries, spans of keys and of values, probabilities;
// and what is needed once a span or a tile.
constexpr int few_tile_bytes(int d, Company company) {
  int const span = span_keys(d, company);
  return (kFewRows * d + 2 * span_stages(company) * span * d + kFewRows * span) * 2;
}
constexpr int few_shared_bytes(int d, Company company) { return few_tile_bytes(d, company) + 3072; }

// Stages of keys and values: with two, a block is on its way while the one before is worked on.
constexpr int key_stages(int d) { return d <= 96 ? 2 : 1; }

// Shared memory of a thread block of many rows: queries, blocks of keys and of values; the rows'
// views, and what is needed once a tile.
constexpr int tile_bytes(int d) {
  return (tile_rows(d, false) + kBlockKeys * 2 * key_stages(d)) * d * 2;
}
constexpr int shared_bytes(int d) { return tile_bytes(d) + tile_rows(d, false) * 32 + 256; }

// Of the system, for each thread block.
constexpr int kReservedBytes = 1024;

// The fold of a tile of many rows, in vectors of four floats a thread; kFoldStep of them lie
// together, in shared memory or in scratch.
constexpr int kFoldStep = 2;
constexpr int fold_vectors(int d) { return tile_rows(d, false) * d / 4 / kThreadsABlock; }
// How many of them find room in shared memory when a multiprocessor has `bytes` for its blocks.
constexpr int fold_vectors_in_shared(int d, int64_t bytes) {
  int64_t const rest = bytes / blocks_a_processor(d, false) - kReservedBytes - shared_bytes(d);
  int64_t const fit = rest / (kThreadsABlock * 16) / kFoldStep * kFoldStep;
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
  static constexpr int kWarps = kWarpsABlock, kThreads = kThreadsABlock;
};

template <class Element, int kD, bool kFeatures>
struct ManyRows : ForwardTraits<Element, kD, kFeatures> {
  static constexpr bool kFewRows = false;
  static constexpr int kRows = tile_rows(kD, false), kRowsAWarp = kRows / kWarpsABlock;
  static constexpr int kRowTiles = kRowsAWarp / 16;
  static constexpr int kThreadRows = 2 * kRowTiles;  // that a thread holds elements of
  static constexpr int kLoadKeys = kBlockKeys, kStages = key_stages(kD);
  static constexpr int kBlocksAProcessor = blocks_a_processor(kD, false);

  static constexpr int kQueryBytes = kRows * kD * 2;
  static constexpr int kLoadBytes = kLoadKeys * kD * 2;  // of keys, and of values
  static constexpr int kTileBytes = tile_bytes(kD), kSharedBytes = shared_bytes(kD);
};

template <class Element, int kD, bool kFeatures, Company kCompany>
struct FewRows : ForwardTraits<Element, kD, kFeatures> {
  static constexpr bool kFewRows = true;
  static constexpr int kRows = 16, kRowsAWarp = kRows;  // every warp computes for all
  static constexpr int kLoadKeys = span_keys(kD, kCompany), kWarpKeys = kLoadKeys / kWarpsABlock;
  static constexpr int kBlocks = kLoadKeys / kBlockKeys, kStages = span_stages(kCompany);
  static constexpr int kBlocksAProcessor = blocks_a_processor(kD, true, kCompany);

  static constexpr int kQueryBytes = kRows * kD * 2;
  static constexpr int kLoadBytes = kLoadKeys * kD * 2;
  static constexpr int kTileBytes = few_tile_bytes(kD, kCompany);
  static constexpr int kSharedBytes = few_shared_bytes(kD, kCompany);
  static_assert(kBlocksAProcessor * (kSharedBytes + kReservedBytes) <= 228 * 1024,
                "fewer thread blocks than a plan counts on, where shared memory is largest");
};

}  // namespace fa::sm80
