// Matrix products by one warp: of two tiles, or of a tile and a result that is still in registers.
//
// gpu/accumulator.cuh says which element of a result lies where.
#pragma once

#include "csrc/gpu/accumulator.cuh"
#include "csrc/sm80/tile.cuh"

namespace fa::gpu::sm80 {

// c (16 kTiles, 8 kGroups) += a b, kDepth columns of a and rows of b, ascending. load_a(k, t, to)
// brings columns [16 k, 16 k + 16) of sixteen rows t of a, load_b(k, n, to) those rows of sixteen
// columns n of b.
template <class Element, int kDepth, int kTiles, int kGroups, class LoadA, class LoadB>
__device__ __forceinline__ void accumulate(Product<kTiles, kGroups>& c, LoadA const& load_a,
                                           LoadB const& load_b) {
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k) {
    uint32_t left[kTiles][4];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) load_a(k, t, left[t]);
#pragma unroll
    for (int n = 0; n < kGroups / 2; ++n) {
      uint32_t right[4];
      load_b(k, n, right);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        mma_m16n8k16<Element>(c[t][2 * n], left[t], right[0], right[1]);
        mma_m16n8k16<Element>(c[t][2 * n + 1], left[t], right[2], right[3]);
      }
    }
  }
}

// c (16 kTiles, 8 kGroups) = a b^T: load_a(k, t, to) as above, b rows [b_row, ...) of a tile (rows,
// kD). Columns of a and b ascending.
template <class Element, int kD, int kTiles, int kGroups, class LoadA>
__device__ __forceinline__ void multiply_abt(Product<kTiles, kGroups>& c, LoadA const& load_a,
                                             uint32_t b, int b_row, int lane) {
  set_zero<kTiles, kGroups>(c);
  auto const b_at = cursor_b<kD>(b, b_row, lane);
  accumulate<Element, kD, kTiles, kGroups>(
      c, load_a, [&](int k, int n, uint32_t (&to)[4]) { ldmatrix_x4(to, b_at.at(n * 16, 2 * k)); });
}

// The same of rows [a_row, ...) of a tile a (rows, kD).
template <class Element, int kD, int kTiles, int kGroups>
__device__ __forceinline__ void multiply_abt(Product<kTiles, kGroups>& c, uint32_t a, int a_row,
                                             uint32_t b, int b_row, int lane) {
  auto const a_at = cursor_a<kD>(a, a_row, lane);
  multiply_abt<Element, kD, kTiles, kGroups>(
      c, [&](int k, int t, uint32_t (&to)[4]) { ldmatrix_x4(to, a_at.at(t * 16, 2 * k)); }, b,
      b_row, lane);
}

// c (16 kTiles, kD) += p b: p (16 kTiles, 8 kGroups) rounded to 16 bits, b rows [b_row, ...) of a
// tile (rows, kD). Rows of b ascending.
template <class Element, int kD, int kTiles, int kGroups>
__device__ __forceinline__ void add_product(Product<kTiles, kD / 8>& c,
                                            Product<kTiles, kGroups> const& p, uint32_t b,
                                            int b_row, int lane) {
  auto const b_at = cursor_b_transposed<kD>(b, b_row, lane);
  accumulate<Element, 8 * kGroups, kTiles, kD / 8>(
      c,
      [&](int k, int t, uint32_t (&to)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float const(&pair)[4] = p[t][2 * k + i / 2];
          to[i] = pack2<Element>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
        }
      },
      [&](int k, int n, uint32_t (&to)[4]) { ldmatrix_x4_trans(to, b_at.at(k * 16, 2 * n)); });
}

// Rows [row, ...) of a tile (rows, kD) = c times factor(r), rounded to 16 bits once; r counts a
// thread's rows. Adding +0 gives all zeros one sign.
template <class Element, int kD, int kTiles, class Factor>
__device__ __forceinline__ void store_product(uint32_t tile, int row,
                                              Product<kTiles, kD / 8> const& c,
                                              Factor const& factor, int lane) {
#pragma unroll
  for (int r = 0; r < 2 * kTiles; ++r) {
    int const to = row + r / 2 * 16 + r % 2 * 8 + lane / 4;
    float const f = factor(r);
#pragma unroll
    for (int n = 0; n < kD / 8; ++n) {
      float const(&x)[4] = c[r / 2][n];
      uint32_t const both =
          pack2<Element>(fmaf(x[r % 2 * 2], f, 0.0f), fmaf(x[r % 2 * 2 + 1], f, 0.0f));
      store_pair(tile + TileLayout<kD>::offset(to, n) + lane % 4 * 4, both);
    }
  }
}

}  // namespace fa::gpu::sm80
