// The constants of a call's scores, derived once on the host.
#pragma once

#include "csrc/core/philox.h"

namespace fa::gpu {

// p = exp2((x - max) * exponent_scale): x is q.k, or a shaped score in log2 units, and then
// exponent_scale is 1.
struct ScoreScale {
  float exponent_scale;
  float raw_scale;  // shaped only: multiplies q.k; scale * log2 e, or scale / softcap
  float cap;        // softcap * log2 e, 0: none
  bool shaped;      // softcap, ALiBi or a scale that is not positive
  bool drops;
  Keep keep;

  static ScoreScale of(ScoreParams const& p) {
    constexpr double kLog2E = 1.44269504088896340736;
    double const scale = p.softmax_scale, cap = p.softcap;
    bool const shaped = cap > 0.0 || p.alibi || !(scale > 0.0);
    return {shaped ? 1.0f : static_cast<float>(scale * kLog2E),
            static_cast<float>(cap > 0.0 ? scale / cap : scale * kLog2E),
            static_cast<float>(cap * kLog2E),
            shaped,
            p.dropout_p > 0.0,
            Keep::of(p.dropout_p)};
  }
};

}  // namespace fa::gpu
