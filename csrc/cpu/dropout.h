// Dropout's factors for the keys of one row.
#pragma once

#include "csrc/core/philox.h"

namespace fa::cpu {

// factors[0 .. num_keys) = the scale of what is kept, or 0, for keys first_key ...; first_key and
// num_keys are multiples of eight.
static inline void dropout_factors(ScoreParams const& score, int64_t batch, int64_t head,
                                   int64_t query, int64_t first_key, int64_t num_keys,
                                   float* factors) {
  Keep const keep = Keep::of(score.dropout_p);
  uint64_t const key = philox_key(score.seed);
  for (int64_t j = 0; j < num_keys; j += kKeysPerDraw) {
    uint32_t const counter[4] = {static_cast<uint32_t>((first_key + j) / kKeysPerDraw),
                                 static_cast<uint32_t>(query), static_cast<uint32_t>(head),
                                 static_cast<uint32_t>(batch)};
    uint32_t word[4];
    philox(counter, key, word);
    for (int i = 0; i < kKeysPerDraw; ++i) {
      uint32_t const draw = word[i / 2] >> (i % 2 * 16) & 0xffff;
      factors[j + i] = draw < keep.below ? keep.scale : 0.0f;
    }
  }
}

}  // namespace fa::cpu
