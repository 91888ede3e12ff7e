// The second kernel of a forward pass whose segments ran side by side.
#pragma once

#include <cuda_runtime.h>

#include "csrc/sm80/family.h"

namespace fa::sm80 {

void launch_fold(ForwardLaunch const& launch, cudaStream_t stream);

}  // namespace fa::sm80
