// The shapes of the sm80 family's backward kernels.
//   key walk     up to d = 128: all gradients in one walk over the queries of a tile of keys;
//   query tiles  beyond: dQ of a row sums over keys in ascending order;
//   key tiles    and dK, dV of a key over query heads, in each over queries, ascending (the key
//                walk: over blocks of queries, descending).
// The two walks of wide heads compute scores twice, two products of seven.
#pragma once

#include "csrc/core/host_device.h"

namespace fa::sm80 {

// Head dims up to here walk once (sm80/backward_tile.cuh), wider ones twice.
constexpr int kWalksOnce = 128;
constexpr int kWalkQueries = 64;

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
  static constexpr int kBlock = 32, kLoadKeys = kBlock, kBlocksAProcessor = 2;
  static constexpr int kTileBytes = kRows * kD * 2, kBlockBytes = kBlock * kD * 2;
  static constexpr int kTensorBytes = 2 * kTileBytes + kStages * 2 * kBlockBytes;
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

// 128 keys, or 64 where shared memory is short. Up to d = 128, whose gradients of 128 keys fit into
// the registers of eight warps; at d = 64 into those of four, and two thread blocks share a
// multiprocessor.
template <class Element_, int kD_, int kKeys_, bool kFeatures_>
struct KeyWalkTraits {
  using Element = Element_;
  static constexpr int kD = kD_, kKeys = kKeys_, kQueries = kWalkQueries;
  static constexpr bool kFeatures = kFeatures_, kAnyAddress = kFeatures;
  static constexpr int kWarps = kD <= 64 ? 4 : 8, kThreads = 32 * kWarps;
  static constexpr int kBlocksAProcessor = 8 / kWarps;

  // Scores: eight parts of 32 queries and a quarter of the keys, a warp's one after the other.
  static constexpr int kScoreKeys = kKeys / 4, kScoreParts = 8 / kWarps;
  // dK, dV: 32 keys, and every kKeyParts-th sixteen of the columns.
  static constexpr int kKeyGroups = kKeys / 32, kKeyParts = kWarps / kKeyGroups;
  // dQ: 16 kQueryTiles queries, and every kQueryParts-th sixteen of the columns.
  static constexpr int kQueryTiles = kD % 64 == 0 ? 2 : 1;
  static constexpr int kQueryGroups = kQueries / (16 * kQueryTiles);
  static constexpr int kQueryParts = kWarps / kQueryGroups;
  static_assert(kD % (16 * kKeyParts) == 0 && kD % (16 * kQueryParts) == 0);

  static constexpr int kKeyBytes = kKeys * kD * 2, kQueryBytes = kQueries * kD * 2;
  static constexpr int kScoreBytes = kQueries * kKeys * 2;
  static constexpr int kRowValues = 2 * kQueries;  // lse and delta of a block of queries
  static constexpr int kStageBytes = 2 * kQueryBytes + kRowValues * 4;
  static constexpr int kPlaceBytes = 128;
  static constexpr int shared_bytes(int stages) {
    return kPlaceBytes + 2 * kKeyBytes + 2 * kScoreBytes + stages * kStageBytes;
  }
};

}  // namespace fa::sm80
