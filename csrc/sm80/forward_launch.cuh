// One forward kernel on a stream.
#pragma once

#include "csrc/cuda/errors.cuh"
#include "csrc/sm80/forward_kernel.cuh"
#include "csrc/sm80/forward_launch.h"

namespace fa::sm80 {

template <class Traits>
void launch_forward(ForwardLaunch const& launch, cudaStream_t stream) {
  auto const kernel = forward_kernel<Traits>;
  constexpr int kBytes = kForwardSharedBytes<Traits>, kDefaultBytes = 48 * 1024;
  if constexpr (kBytes > kDefaultBytes) {
    fa::cuda::check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  }
  kernel<<<static_cast<unsigned>(launch.plan.blocks), Traits::kThreads, kBytes, stream>>>(launch);
  fa::cuda::check(cudaGetLastError());
}

}  // namespace fa::sm80
