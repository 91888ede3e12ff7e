// The forward kernels by name; csrc/instantiations/ has one of them a file.
#pragma once

#include "csrc/gpu/forward_launch.h"
#include "csrc/sm80/traits.h"

namespace fa::gpu::sm80 {

template <class Traits>
void launch_forward(ForwardLaunch const& launch, void* stream);

}  // namespace fa::gpu::sm80
