// The shapes of this set's backward kernels.
//   key walk     up to d = 128: all gradients in one walk over the queries of a tile of keys;
//   query tiles  beyond: dQ, in a walk over the keys of a tile of queries;
//   key tiles    and dK and dV, in a walk over the queries of a tile of keys.
// The two walks of wide heads compute scores twice: seven products instead of five.
#pragma once

#include "csrc/core/contract.h"

namespace fa::gpu::sm80 {

// Of two walks: a warp owns sixteen rows (queries, or keys) whole and takes kBlock rows of the
// other side at a time.
//   kFeatures  softcap, ALiBi, dropout, rows that do not lie on sixteen bytes
template <class Element_, int kD_, int kStages_, bool kFeatures_>
struct TwoWalksTraits {
  using Element = Element_;
  static constexpr int kD = kD_, kTiles = 1, kStages = kStages_;
  static constexpr bool kFeatures = kFeatures_, kAnyAddress = kFeatures;
  static constexpr bool kPaged = false;  // a cache has no gradient
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kTiles, kRows = kWarpRows * kWarps;
  static constexpr int kBlock = 32, kLoadKeys = kBlock, kBlocksPerSm = 2;
  static constexpr int kTileBytes = kRows * kD * 2, kBlockBytes = kBlock * kD * 2;
  static constexpr int kTensorBytes = 2 * kTileBytes + kStages * 2 * kBlockBytes;

  static constexpr contract::GradientOrder kOrder = contract::GpuOrder::gradients(kD);
  static_assert(kOrder.part_keys == 0 && kOrder.block_queries == kBlock && !kOrder.blocks_descend,
                "the contract has another order for this head dim");
};

// Stages are as many as leave two thread blocks their room.
template <class Element, int kD, bool kFeatures>
struct QueryTile : TwoWalksTraits<Element, kD, 1, kFeatures> {};

// Above d = 192 the two gradients of a key do not fit into the registers together: one is computed
// after the other.
template <class Element, int kD, bool kFeatures>
struct KeyTile : TwoWalksTraits<Element, kD, kD <= 192 ? 2 : 1, kFeatures> {
  static constexpr bool kOneAfterTheOther = kD > 192;
};

// A key walk takes queries in steps: the contract's blocks, or half of one where shared memory is
// short. The order of arithmetic is the same: a step is a part of a block's ascending sum.
constexpr int kSumQueries = static_cast<int>(contract::GpuOrder::gradients(128).block_queries);
constexpr int kWideQueries = kSumQueries, kNarrowQueries = kSumQueries / 2;

// Up to d = 128, whose gradients of 128 keys fit into the registers of eight warps; at d = 64 into
// those of four, and two thread blocks share a multiprocessor.
template <class Element_, int kD_, int kQueries_, bool kFeatures_>
struct KeyWalkTraits {
  using Element = Element_;
  static constexpr contract::GradientOrder kOrder = contract::GpuOrder::gradients(kD_);
  static constexpr int kD = kD_, kKeys = static_cast<int>(kOrder.part_keys), kQueries = kQueries_;
  static constexpr int kSteps = kSumQueries / kQueries;  // of a block of queries
  static constexpr bool kFeatures = kFeatures_, kAnyAddress = kFeatures;
  static constexpr int kWarps = kD <= 64 ? 4 : 8, kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSm = 8 / kWarps;
  static_assert(kOrder.block_queries == kSumQueries && kOrder.blocks_descend,
                "the contract has another order for this head dim");

  // Scores: eight parts of 16 kScoreTiles queries and a quarter of the keys, a warp's one after the
  // other.
  static constexpr int kScoreTiles = kQueries / 32;
  static constexpr int kScoreKeys = kKeys / 4, kScoreParts = 8 / kWarps;
  // dK, dV: 32 keys, and every kKeyParts-th sixteen of the columns.
  static constexpr int kKeyGroups = kKeys / 32, kKeyParts = kWarps / kKeyGroups;
  // dQ: 16 kQueryTiles queries, and every kQueryParts-th sixteen of the columns.
  static constexpr int kQueryTiles = kD % 64 == 0 ? 2 : 1;
  static constexpr int kQueryGroups = kQueries / (16 * kQueryTiles);
  static constexpr int kQueryParts = kWarps / kQueryGroups;
  static_assert(kD % (16 * kKeyParts) == 0 && kD % (16 * kQueryParts) == 0);
  static_assert(kQueries == 32 * kScoreTiles && kKeys == 32 * kKeyGroups);

  static constexpr int kKeyBytes = kKeys * kD * 2, kQueryBytes = kQueries * kD * 2;
  static constexpr int kScoreBytes = kQueries * kKeys * 2;
  static constexpr int kRowValues = 2 * kQueries;  // lse and delta of a step's queries
  static constexpr int kStageBytes = 2 * kQueryBytes + kRowValues * 4;
  static constexpr int kInfoBytes = 128;
  static_assert(kRowValues <= kThreads, "a thread copies one of them");
  static constexpr int shared_bytes(int stages) {
    return kInfoBytes + 2 * kKeyBytes + 2 * kScoreBytes + stages * kStageBytes;
  }
};

}  // namespace fa::gpu::sm80
