// The forward kernels by name; csrc/instantiations/ has one of them a file.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "csrc/sm80/family.h"
#include "csrc/sm80/traits.h"

namespace fa::sm80 {

template <class Traits>
void launch_forward(ForwardLaunch const& launch, cudaStream_t stream);

}  // namespace fa::sm80
