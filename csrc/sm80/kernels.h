// The sm80 kernel set: mma.sync, for every NVIDIA GPU from Ampere on; fp16 and bf16. Plain C++.
#pragma once

#include "csrc/gpu/kernel_set.h"

namespace fa::gpu::sm80 {

extern KernelSet const kKernels;

}  // namespace fa::gpu::sm80
