// Rows of a tensor into fp32 scratch and back, in the two layouts that the matrix product reads.
#pragma once

#include "csrc/core/contract.h"
#include "csrc/core/sequence.h"
#include "csrc/cpu/simd.h"

namespace fa::cpu::FA_ISA {

constexpr int64_t kBlockKeys = contract::CpuOrder::kBlockKeys;

FA_INLINE int64_t round_up_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <DType kDType>
FA_INLINE Vec load_lanes(char const* row, int64_t first) {
  if constexpr (kDType == DType::kFloat32) return load(reinterpret_cast<float const*>(row) + first);
  if constexpr (kDType == DType::kFloat16)
    return load_half(reinterpret_cast<uint16_t const*>(row) + first);
  if constexpr (kDType == DType::kBFloat16)
    return load_bfloat(reinterpret_cast<uint16_t const*>(row) + first);
}

// Sixteen columns from `first` on; those at d and beyond are zero and are not read.
template <DType kDType>
FA_INLINE Vec load_columns(char const* row, int64_t first, int64_t d) {
  if (first + kLanes <= d) return load_lanes<kDType>(row, first);
  constexpr int64_t kBytes = kDType == DType::kFloat32 ? 4 : 2;
  alignas(64) char tail[kLanes * 4] = {};
  std::memcpy(tail, row + first * kBytes, static_cast<size_t>((d - first) * kBytes));
  return load_lanes<kDType>(tail, 0);
}

// dst (round_up_lanes(d)) = row * factor.
template <DType kDType>
FA_INLINE void pack_row(float* dst, char const* row, int64_t d, float factor) {
  for (int64_t c = 0; c < d; c += kLanes)
    store(dst + c, load_columns<kDType>(row, c, d) * broadcast(factor));
}

// dst (num_keys, round_up_lanes(d)) = rows [begin, begin + num_keys).
template <DType kDType>
static void pack_rows(float* dst, KeyRows const& rows, int64_t begin, int64_t num_keys, int64_t d) {
  for (int64_t j = 0; j < num_keys; ++j) {
    char const* const row = rows.row(begin + j);
    for (int64_t c = 0; c < d; c += kLanes)
      store(dst + j * round_up_lanes(d) + c, load_columns<kDType>(row, c, d));
  }
}

// Reads one byte of every cache line of a row.
FA_INLINE void touch_row(char const* row, int64_t row_bytes) {
  constexpr int64_t kCacheLine = 64;
  for (int64_t at = 0; at < row_bytes; at += kCacheLine) asm volatile("" : : "r"(row[at]));
}

// square[i] = column c + i of sixteen rows, `present` of them there; what is missing is zero and is
// not read.
template <DType kDType>
FA_INLINE void load_square(Vec (&square)[kLanes], char const* const (&row)[kLanes], int present,
                           int64_t c, int64_t d) {
  if (present == kLanes && c + kLanes <= d) {
    for (int i = 0; i < kLanes; ++i) square[i] = load_lanes<kDType>(row[i], c);
  } else {
    for (int i = 0; i < kLanes; ++i) {
      square[i] = i < present ? load_columns<kDType>(row[i], c, d) : broadcast(0.0f);
    }
  }
  transpose(square);
}

// Where sixteen rows from `begin` on lie; returns how many there are of num_rows.
FA_INLINE int sixteen_rows(char const* (&row)[kLanes], KeyRows const& rows, int64_t begin,
                           int64_t num_rows) {
  int const present = static_cast<int>(num_rows < kLanes ? num_rows : kLanes);
  for (int i = 0; i < present; ++i) row[i] = rows.row(begin + i);
  return present;
}

// dst (round_up_lanes(d), kBlockKeys) = the transpose of rows [begin, begin + num_keys). Columns
// beyond num_keys, up to the next multiple of 16, are zero: no row past the sequence is read.
template <DType kDType>
static void pack_transposed(float* dst, KeyRows const& rows, int64_t begin, int64_t num_keys,
                            int64_t d) {
  for (int64_t j = 0; j < num_keys; j += kLanes) {
    char const* row[kLanes];
    int const present = sixteen_rows(row, rows, begin + j, num_keys - j);
    for (int64_t c = 0; c < d; c += kLanes) {
      Vec square[kLanes];
      load_square<kDType>(square, row, present, c, d);
      for (int i = 0; i < kLanes; ++i) store(dst + (c + i) * kBlockKeys + j, square[i]);
    }
  }
}

// s (kRows, kBlockKeys) = q (kRows, lda) times the transpose of key rows [begin, begin + num_keys),
// without a copy of them: worth it while few queries read each key. The same chains of fused
// multiply-adds as `multiply`, over ascending columns from +0.
template <DType kDType, int kRows>
static void multiply_by_keys(float* s, float const* q, int64_t lda, KeyRows const& keys,
                             int64_t begin, int64_t num_keys, int64_t d) {
  for (int64_t j = 0; j < num_keys; j += kLanes) {
    char const* row[kLanes];
    int const present = sixteen_rows(row, keys, begin + j, num_keys - j);
    Vec acc[kRows];
    for (int r = 0; r < kRows; ++r) acc[r] = broadcast(0.0f);
    for (int64_t c = 0; c < d; c += kLanes) {
      Vec square[kLanes];
      load_square<kDType>(square, row, present, c, d);
      if (c + kLanes <= d) {
        for (int i = 0; i < kLanes; ++i)
          for (int r = 0; r < kRows; ++r)
            acc[r] = multiply_add(broadcast(q[r * lda + c + i]), square[i], acc[r]);
      } else {
        for (int i = 0; i < d - c; ++i)
          for (int r = 0; r < kRows; ++r)
            acc[r] = multiply_add(broadcast(q[r * lda + c + i]), square[i], acc[r]);
      }
    }
    for (int r = 0; r < kRows; ++r) store(s + r * kBlockKeys + j, acc[r]);
  }
}

template <DType kDType, int kRows>
static void multiply_decode_by_keys(int64_t rows, float* s, float const* q, int64_t lda,
                                    KeyRows const& keys, int64_t begin, int64_t num_keys,
                                    int64_t d) {
  if (rows == kRows) {
    multiply_by_keys<kDType, kRows>(s, q, lda, keys, begin, num_keys, d);
  } else if constexpr (kRows > 1) {
    multiply_decode_by_keys<kDType, kRows - 1>(rows, s, q, lda, keys, begin, num_keys, d);
  }
}

// row (d) = src, rounded once.
FA_INLINE void unpack_row(DType dtype, char* row, float const* src, int64_t d) {
  for (int64_t c = 0; c < d; ++c) store_scalar(dtype, row, c, src[c]);
}

}  // namespace fa::cpu::FA_ISA
