// Which probabilities dropout keeps: a counter-based generator keyed on seed, offset, batch index,
// head, query, key.
//
// Philox 4x32 with ten rounds (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1,
// 2, 3", SC 2011). One draw serves eight consecutive keys of one row with sixteen bits each, so the
// probability to keep is exact to 2^-16 and the mask does not depend on how rows and keys are cut
// into tiles.
#pragma once

#include <cstdint>

#include "csrc/core/params.h"

namespace fa::cpu {

static constexpr int kKeysPerDraw = 8;

static inline void philox(uint32_t const (&counter)[4], uint64_t key,
                          uint16_t (&draws)[kKeysPerDraw]) {
  uint32_t x[4] = {counter[0], counter[1], counter[2], counter[3]};
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    uint64_t const product0 = uint64_t{0xD2511F53u} * x[0], product1 = uint64_t{0xCD9E8D57u} * x[2];
    uint32_t const y0 = static_cast<uint32_t>(product1 >> 32) ^ x[1] ^ k0;
    uint32_t const y2 = static_cast<uint32_t>(product0 >> 32) ^ x[3] ^ k1;
    x[0] = y0, x[1] = static_cast<uint32_t>(product1), x[2] = y2,
    x[3] = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < 4; ++i) {
    draws[2 * i] = static_cast<uint16_t>(x[i]);
    draws[2 * i + 1] = static_cast<uint16_t>(x[i] >> 16);
  }
}

// Spreads the offset over the key, so that neighbouring offsets share nothing (Stafford's mix 13, a
// bijection).
static inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

struct Dropout {
  uint64_t key;
  uint32_t keep_below;  // of 65536
  float keep_scale;     // 1 / (1 - p)

  explicit Dropout(ScoreParams const& score)
      : key(score.seed ^ mix(score.offset)),
        keep_below(static_cast<uint32_t>((1.0 - score.dropout_p) * 65536.0 + 0.5)),
        keep_scale(static_cast<float>(1.0 / (1.0 - score.dropout_p))) {}

  // factors[0 .. num_keys) = keep_scale or 0 for keys first_key ...; first_key is a multiple of
  // eight.
  void factors(int64_t batch, int64_t head, int64_t query, int64_t first_key, int64_t num_keys,
               float* factors) const {
    for (int64_t j = 0; j < num_keys; j += kKeysPerDraw) {
      uint32_t const counter[4] = {static_cast<uint32_t>((first_key + j) / kKeysPerDraw),
                                   static_cast<uint32_t>(query), static_cast<uint32_t>(head),
                                   static_cast<uint32_t>(batch)};
      uint16_t draws[kKeysPerDraw];
      philox(counter, key, draws);
      for (int i = 0; i < kKeysPerDraw; ++i)
        factors[j + i] = draws[i] < keep_below ? keep_scale : 0.0f;
    }
  }
};

}  // namespace fa::cpu
