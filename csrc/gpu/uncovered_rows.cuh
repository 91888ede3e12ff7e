// Rows that no sequence of a pack covers: tokens after the last one. And rng_state, which belongs
// to no tile either.
#pragma once

#include "csrc/core/sequence.h"
#include "csrc/gpu/forward_launch.h"

namespace fa::gpu {

// The share of one thread block: heads of key head head_kv, tokens `part`, part + parts, ...
__device__ inline void write_uncovered_rows(ForwardLaunch const& launch, int head_kv, int part,
                                            int parts) {
  ForwardParams const& call = launch.call;
  LayoutParams const& layout = call.layout;
  if (head_kv == 0 && part == 0 && threadIdx.x < 2 && call.rng_state) {
    int64_t const drawn = call.score.seed ? call.score.seed[threadIdx.x] : 0;
    int64_t const mode = threadIdx.x == 1 && call.plan.deterministic ? kDeterministicBit : 0;
    call.rng_state[threadIdx.x] = drawn | mode;
  }
  if (!layout.cu_seqlens_q || !call.lse) return;  // null: the caller takes partials
  int64_t token = part;
  if (layout.b > 0) {
    Sequence const last = sequence_of(layout, layout.b - 1);
    token += last.first_query + last.s_q;
  }
  for (; token < layout.total_q; token += parts) {
    for (int head = head_kv * launch.group.by; head < (head_kv + 1) * launch.group.by; ++head) {
      uint16_t* const row = static_cast<uint16_t*>(call.out.data) + token * call.out.row_stride +
                            head * call.out.head_stride;
      for (int i = threadIdx.x; i < layout.d_v; i += blockDim.x) row[i] = 0;
      if (threadIdx.x == 0) call.lse[head * layout.lse_head_stride + token] = INFINITY;
    }
  }
}

}  // namespace fa::gpu
