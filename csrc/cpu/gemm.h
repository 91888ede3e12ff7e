// The one matrix product of the CPU kernels: C = A B, or C = C * row_scale + A B, on fp32 scratch.
//
// Each element of A B is one chain of fused multiply-adds over ascending k from +0, added to C by
// one more; so how rows and columns are cut into register tiles is free: it cannot change a bit.
#pragma once

#include "csrc/cpu/simd.h"

namespace fa::cpu::FA_ISA {

constexpr int kTileRows = 6;

struct MatrixA {  // (m, k), element (r, k) at data[r * row_stride + k * k_stride]
  float const* data;
  int64_t row_stride;
  int64_t k_stride;  // 1, or the leading dimension of a matrix read transposed
};

// One register tile: kRows x (kVecs * 16) of C.
template <int kRows, int kVecs>
static void multiply_tile(float* c, int64_t ldc, float const* row_scale, bool overwrites, MatrixA a,
                          float const* b, int64_t ldb, int64_t k_extent) {
  Vec acc[kRows][kVecs];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVecs; ++v) acc[r][v] = broadcast(0.0f);
  for (int64_t k = 0; k < k_extent; ++k) {  // ascending
    Vec bk[kVecs];
    for (int v = 0; v < kVecs; ++v) bk[v] = load(b + k * ldb + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      Vec const ark = broadcast(a.data[r * a.row_stride + k * a.k_stride]);
      for (int v = 0; v < kVecs; ++v) acc[r][v] = multiply_add(ark, bk[v], acc[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVecs; ++v) {
      float* const at = c + r * ldc + v * kLanes;
      store(at, overwrites ? acc[r][v]
                           : multiply_add(load(at), broadcast(row_scale ? row_scale[r] : 1.0f),
                                          acc[r][v]));
    }
  }
}

// One row keeps few accumulators busy, so it takes wider tiles.
constexpr int tile_vectors(int rows) { return rows == 1 ? 4 : kTileVectors; }

template <int kRows, int kVecs>
static void multiply_columns(float* c, int64_t ldc, float const* row_scale, bool overwrites,
                             MatrixA a, float const* b, int64_t ldb, int64_t num_vecs,
                             int64_t k_extent) {
  while (num_vecs >= kVecs) {
    multiply_tile<kRows, kVecs>(c, ldc, row_scale, overwrites, a, b, ldb, k_extent);
    c += kVecs * kLanes;
    b += kVecs * kLanes;
    num_vecs -= kVecs;
  }
  if constexpr (kVecs > 1) {
    if (num_vecs > 0) {
      multiply_columns<kRows, kVecs / 2>(c, ldc, row_scale, overwrites, a, b, ldb, num_vecs,
                                         k_extent);
    }
  }
}

template <int kRows>
static void multiply_rows(int64_t rows, float* c, int64_t ldc, float const* row_scale,
                          bool overwrites, MatrixA a, float const* b, int64_t ldb, int64_t num_vecs,
                          int64_t k_extent) {
  if (rows == kRows) {
    multiply_columns<kRows, tile_vectors(kRows)>(c, ldc, row_scale, overwrites, a, b, ldb, num_vecs,
                                                 k_extent);
  } else if constexpr (kRows > 1) {
    multiply_rows<kRows - 1>(rows, c, ldc, row_scale, overwrites, a, b, ldb, num_vecs, k_extent);
  }
}

// C (rows, num_vecs * 16) from A (rows, k_extent) and B (k_extent, num_vecs * 16).
//   overwrites  C = A B; C need not be initialised
//   row_scale   (rows) factors on C, or null for 1
static void multiply(int64_t rows, float* c, int64_t ldc, float const* row_scale, bool overwrites,
                     MatrixA a, float const* b, int64_t ldb, int64_t num_vecs, int64_t k_extent) {
  for (int64_t r = 0; r < rows; r += kTileRows) {
    int64_t const tile_rows = rows - r < kTileRows ? rows - r : kTileRows;
    MatrixA const tile_a{a.data + r * a.row_stride, a.row_stride, a.k_stride};
    multiply_rows<kTileRows>(tile_rows, c + r * ldc, ldc, row_scale ? row_scale + r : nullptr,
                             overwrites, tile_a, b, ldb, num_vecs, k_extent);
  }
}

}  // namespace fa::cpu::FA_ISA
