// The backward kernels by name; csrc/instantiations/ has one of them a file.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "csrc/sm80/backward_traits.h"
#include "csrc/sm80/family.h"

namespace fa::sm80 {

template <class Traits>
void launch_query_tiles(BackwardLaunch const& launch, cudaStream_t stream);
template <class Traits>
void launch_key_walk(BackwardLaunch const& launch, cudaStream_t stream);
template <class Traits>
void launch_key_tiles(BackwardLaunch const& launch, cudaStream_t stream);

}  // namespace fa::sm80
