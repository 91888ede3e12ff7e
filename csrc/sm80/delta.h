// The first kernel of a backward pass.
#pragma once

#include <cuda_runtime.h>

#include "csrc/sm80/family.h"

namespace fa::sm80 {

void launch_delta(BackwardLaunch launch, cudaStream_t stream);

}  // namespace fa::sm80
