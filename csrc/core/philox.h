// Which probabilities dropout keeps: a counter-based generator keyed on seed, offset, batch index,
// head, query, key. The same mask in all kernels, on CPUs and GPUs.
//
// Philox 4x32 with ten rounds (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1,
// 2, 3", SC 2011). One draw serves eight consecutive keys of one row with sixteen bits each, so the
// probability to keep is exact to 2^-16 and the mask does not depend on how rows and keys are cut
// into tiles.
#pragma once

#include <cstdint>

#include "csrc/core/host_device.h"
#include "csrc/core/params.h"

namespace fa {

static constexpr int kKeysPerDraw = 8;

// word i holds the draws of keys 2i (low half) and 2i + 1 of the eight.
FA_HOST_DEVICE static inline void philox(uint32_t const (&counter)[4], uint64_t key,
                                         uint32_t (&word)[4]) {
  for (int i = 0; i < 4; ++i) word[i] = counter[i];
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    uint64_t const product0 = uint64_t{0xD2511F53u} * word[0];
    uint64_t const product1 = uint64_t{0xCD9E8D57u} * word[2];
    uint32_t const y0 = static_cast<uint32_t>(product1 >> 32) ^ word[1] ^ k0;
    uint32_t const y2 = static_cast<uint32_t>(product0 >> 32) ^ word[3] ^ k1;
    word[0] = y0, word[1] = static_cast<uint32_t>(product1);
    word[2] = y2, word[3] = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
}

// Spreads the offset over the key, so that neighbouring offsets share nothing (Stafford's mix 13, a
// bijection).
FA_HOST_DEVICE static inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// The generator's key: seed[0] is a seed, seed[1] an offset in which a mode may be marked.
FA_HOST_DEVICE static inline uint64_t philox_key(int64_t const* seed) {
  return static_cast<uint64_t>(seed[0]) ^ mix(static_cast<uint64_t>(seed[1] & ~kDeterministicBit));
}

// What is kept: draws below `below` of 65536, times `scale`.
struct Keep {
  uint32_t below;
  float scale;  // 1 / (1 - p)

  FA_MEMBER static Keep of(double dropout_p) {
    double const kept = 1.0 - dropout_p;
    return {static_cast<uint32_t>(kept * 65536.0 + 0.5), static_cast<float>(1.0 / kept)};
  }
};

}  // namespace fa
