// Which kind of kernel a call needs: what it asks for, and how its rows lie.
#pragma once

#include <initializer_list>

#include "csrc/core/params.h"
#include "csrc/gpu/kernel_set.h"
#include "csrc/gpu/score_scale.h"

namespace fa::gpu {

// Softcap, ALiBi, a scale that is not positive, dropout, or rows that are not aligned.
inline bool has_features(ScoreScale const& scale, bool aligned) {
  return scale.shaped || scale.drops || !aligned;
}

// Whether all rows can be copied sixteen bytes at a time.
inline bool rows_are_aligned(LayoutParams const& layout,
                             std::initializer_list<RowTensor const*> tensors) {
  auto const is_whole = [](int64_t elements) { return elements % 8 == 0; };
  if (!is_whole(layout.d) || !is_whole(layout.d_v)) return false;
  for (RowTensor const* const t : tensors) {
    if (reinterpret_cast<uintptr_t>(t->data) % 16 != 0) return false;
    if (!is_whole(t->batch_stride) || !is_whole(t->row_stride) || !is_whole(t->head_stride))
      return false;
  }
  return true;
}
inline bool rows_are_aligned(ForwardParams const& call) {
  return rows_are_aligned(call.layout, {&call.q, &call.k, &call.v, &call.out});
}
inline bool rows_are_aligned(BackwardParams const& call) {
  return rows_are_aligned(call.layout, {&call.q, &call.k, &call.v, &call.out, &call.dout, &call.dq,
                                        &call.dk, &call.dv});
}

// What a call is to those who choose its kernels.
template <class Params>
CallKind kind_of(Params const& call, int capability) {
  return {capability, call.dtype, call.layout.d, call.layout.d_v,
          has_features(ScoreScale::of(call.score), rows_are_aligned(call))};
}

}  // namespace fa::gpu
