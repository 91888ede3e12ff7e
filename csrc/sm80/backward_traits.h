// The shapes of the sm80 family's backward kernels: two walks, as in the CPU family.
//   query tiles  dQ of a row sums over keys in ascending order;
//   key tiles    dK, dV of a key sum over query heads, in each over queries, ascending.
// Scores are computed in both, two products of seven, and in return no result depends on which
// thread block came first.
#pragma once

namespace fa::sm80 {

// A warp owns kTiles sixteens of rows (queries, or keys) whole and takes kBlock rows of the other
// side at a time.
//   kFeatures  softcap, ALiBi, dropout, rows that do not lie on sixteen bytes
template <class Element_, int kD_, int kTiles_, int kStages_, bool kFeatures_>
struct BackwardTraits {
  using Element = Element_;
  static constexpr int kD = kD_, kTiles = kTiles_, kStages = kStages_;
  static constexpr bool kFeatures = kFeatures_, kAnyAddress = kFeatures;
  static constexpr bool kPaged = false;  // a cache has no gradient
  static constexpr int kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kTiles, kRows = kWarpRows * kWarps;
  static constexpr int kBlock = 32, kBlockKeys = kBlock;
  static constexpr int kTileBytes = kRows * kD * 2, kBlockBytes = kBlock * kD * 2;
  static constexpr int kTensorBytes = 2 * kTileBytes + kStages * 2 * kBlockBytes;
};

// Stages are as many as leave two thread blocks their room.
template <class Element, int kD, bool kFeatures>
struct QueryTile : BackwardTraits<Element, kD, kD <= 128 ? 2 : 1, kD <= 128 ? 2 : 1, kFeatures> {
  static constexpr int kBlocksAProcessor = kD <= 64 ? 3 : 2;
};

// Above d = 192 the two gradients of a key do not fit into the registers together: one is computed
// after the other.
template <class Element, int kD, bool kFeatures>
struct KeyTile : BackwardTraits<Element, kD, kD <= 64 ? 2 : 1, kD <= 192 ? 2 : 1, kFeatures> {
  static constexpr int kBlocksAProcessor = 2;
  static constexpr bool kOneAfterTheOther = kD > 192;
};

}  // namespace fa::sm80
