// One forward kernel on a stream.
#pragma once

#include <type_traits>

#include "csrc/gpu/faults.h"
#include "csrc/gpu/launch.cuh"
#include "csrc/sm80/forward_decode.cuh"
#include "csrc/sm80/forward_launch.h"
#include "csrc/sm80/forward_prefill.cuh"

namespace fa::gpu::sm80 {

// The forward pass.
//   Grid    plan.blocks thread blocks, each with one piece of work after the other where the launch
//           is persistent; and one more that tells of faults in index tensors.
//   Threads four warps. In a prefill each owns its rows; in a decode they share sixteen rows.
//   Shared  Traits::kSharedBytes, and of a prefill's fold what finds room (plan.fold_shared).
//   Order   blocks of keys ascend in a segment, segments in the fold (contract.h).
//   Needs   16-bit elements with d = d_v up to Traits::kD; without kFeatures aligned rows.
template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm) void forward_kernel(
    __grid_constant__ ForwardLaunch const launch) {
  using Tile = std::conditional_t<Traits::kDecode, DecodeTile<Traits>, PrefillTile<Traits>>;
  extern __shared__ __align__(128) char memory[];
  if (launch.plan.overlaps_fold) launch_dependents();
  if (blockIdx.x == launch.plan.blocks) return report_all(launch.call.layout);
  Tile(launch, memory).run();
}

template <class Traits>
void launch_forward(ForwardLaunch const& launch, void* stream) {
  int64_t const blocks = launch.plan.blocks + (has_indices(launch.call.layout) ? 1 : 0);
  int const bytes = Traits::kSharedBytes + launch.plan.fold_shared * Traits::kThreads * 16;
  launch_kernel<forward_kernel<Traits>>(launch, blocks, Traits::kThreads, bytes, stream);
}

}  // namespace fa::gpu::sm80
