// One forward kernel on a stream.
#pragma once

#include <type_traits>

#include "csrc/cuda/errors.cuh"
#include "csrc/sm80/faults.h"
#include "csrc/sm80/forward_few.cuh"
#include "csrc/sm80/forward_launch.h"
#include "csrc/sm80/forward_many.cuh"

namespace fa::sm80 {

template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kBlocksAProcessor) void forward_kernel(
    __grid_constant__ ForwardLaunch const launch) {
  using Tile = std::conditional_t<Traits::kFewRows, FewRowsTile<Traits>, ManyRowsTile<Traits>>;
  extern __shared__ __align__(128) char memory[];
  if (launch.follows) let_follower_start();
  if (blockIdx.x == launch.plan.blocks) return report_all(launch.call.layout);
  Tile(launch, memory).run();
}

template <class Traits>
void launch_forward(ForwardLaunch const& launch, cudaStream_t stream) {
  auto const kernel = forward_kernel<Traits>;
  constexpr int kDefaultBytes = 48 * 1024;
  int const bytes = Traits::kSharedBytes + launch.plan.fold_shared * Traits::kThreads * 16;
  if (bytes > kDefaultBytes) {
    fa::cuda::check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  }
  auto const blocks = launch.plan.blocks + (has_indices(launch.call.layout) ? 1 : 0);
  kernel<<<static_cast<unsigned>(blocks), Traits::kThreads, bytes, stream>>>(launch);
  fa::cuda::check(cudaGetLastError());
}

}  // namespace fa::sm80
