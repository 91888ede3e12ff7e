// Rows of a tensor into fp32 scratch and back, in the two layouts that the matrix product reads.
#pragma once

#include "csrc/core/contract.h"
#include "csrc/core/sequence.h"
#include "csrc/cpu/simd.h"

namespace fa::cpu::FA_ISA {

constexpr int64_t kBlockKeys = contract::kCpuBlockKeys;

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

// dst (round_up_lanes(d), kBlockKeys) = the transpose of rows [begin, begin + num_keys). Columns
// beyond num_keys, up to the next multiple of 16, are zero: no row past the sequence is read.
template <DType kDType>
static void pack_transposed(float* dst, KeyRows const& rows, int64_t begin, int64_t num_keys,
                            int64_t d) {
  for (int64_t j = 0; j < num_keys; j += kLanes) {
    char const* row[kLanes];
    int const present = static_cast<int>(num_keys - j < kLanes ? num_keys - j : kLanes);
    for (int i = 0; i < present; ++i) row[i] = rows.row(begin + j + i);
    for (int64_t c = 0; c < d; c += kLanes) {
      Vec square[kLanes];
      if (present == kLanes && c + kLanes <= d) {
        for (int i = 0; i < kLanes; ++i) square[i] = load_lanes<kDType>(row[i], c);
      } else {
        for (int i = 0; i < kLanes; ++i) {
          square[i] = i < present ? load_columns<kDType>(row[i], c, d) : broadcast(0.0f);
        }
      }
      transpose(square);
      for (int i = 0; i < kLanes; ++i) store(dst + (c + i) * kBlockKeys + j, square[i]);
    }
  }
}

// row (d) = src, rounded once.
FA_INLINE void unpack_row(DType dtype, char* row, float const* src, int64_t d) {
  for (int64_t c = 0; c < d; ++c) store_scalar(dtype, row, c, src[c]);
}

}  // namespace fa::cpu::FA_ISA
