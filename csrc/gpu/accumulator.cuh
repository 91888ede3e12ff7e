// What a warp holds of a matrix product, in registers. `mma.sync` and `wgmma` leave the same
// elements in the same lanes, so masks and softmax serve both.
//
// A result c[tile][n] holds rows 16 tile + g and + 8 (g = lane / 4) of columns 8 n + 2 t and + 1 (t
// = lane % 4): elements 0 and 1 in row g, 2 and 3 in row g + 8. The four lanes of a quad share
// rows.
#pragma once

namespace fa::gpu {

template <int kTiles, int kGroups>
using Product = float[kTiles][kGroups][4];

template <int kTiles, int kGroups>
__device__ __forceinline__ void set_zero(Product<kTiles, kGroups>& c) {
#pragma unroll
  for (int t = 0; t < kTiles; ++t)
#pragma unroll
    for (int n = 0; n < kGroups; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[t][n][i] = 0.0f;
}

// The row of the warp's that thread row r is: a thread holds elements of 2 kTiles rows.
__device__ __forceinline__ int accumulator_row(int r, int lane) {
  return r / 2 * 16 + r % 2 * 8 + lane / 4;
}

}  // namespace fa::gpu
