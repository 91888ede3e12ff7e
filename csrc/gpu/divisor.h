// Quotients by numbers that the host knows before a launch. A division takes a hundred cycles on a
// GPU, and a thread block needs six of them before it can load its first row.
#pragma once

#include <cstdint>

#include "csrc/core/host_device.h"

namespace fa::gpu {

// x / by = (high word of x factor + x) >> shift for 0 <= x < 2^31, with shift = ceil(log2 by) and
// factor = floor(2^32 (2^shift - by) / by) + 1 (Granlund and Montgomery, "Division by Invariant
// Integers using Multiplication", 1994).
struct Divisor {
  int by = 1;
  uint32_t factor = 1, shift = 0;

  static Divisor of(int64_t by) {  // 1 to 2^31 - 1
    Divisor divisor;
    divisor.by = static_cast<int>(by);
    while ((int64_t{1} << divisor.shift) < by) ++divisor.shift;
    uint64_t const excess = (uint64_t{1} << divisor.shift) - static_cast<uint64_t>(by);
    divisor.factor = static_cast<uint32_t>((excess << 32) / static_cast<uint64_t>(by) + 1);
    return divisor;
  }
  FA_HOST_DEVICE int quotient(int x) const {
    auto const number = static_cast<uint32_t>(x);
    auto const high = static_cast<uint32_t>((uint64_t{number} * factor) >> 32);
    return static_cast<int>((high + number) >> shift);
  }
  FA_HOST_DEVICE int remainder(int x) const { return x - quotient(x) * by; }
};

}  // namespace fa::gpu
