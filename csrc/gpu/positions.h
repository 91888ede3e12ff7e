// What the kernels ask of a call's positions.
#pragma once

#include <stdexcept>
#include <string>

#include "csrc/core/params.h"

namespace fa::gpu {

// Positions inside one sequence, and its rows of one key head, are 32-bit numbers in the kernels.
inline void check_positions(LayoutParams const& layout) {
  constexpr int64_t kMost = int64_t{1} << 30;
  int64_t const rows = layout.s_q * (layout.h_q / layout.h_kv);
  if (rows <= kMost && layout.s_k <= kMost) return;
  throw std::runtime_error(
      "flash_attn: a sequence is too long; received s_q * h_q / h_kv = " + std::to_string(rows) +
      " and s_k = " + std::to_string(layout.s_k) + "; rule: both are at most 2^30 on a GPU");
}

}  // namespace fa::gpu
