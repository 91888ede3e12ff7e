// The backward kernels by name; csrc/instantiations/ has one of them a file.
#pragma once

#include "csrc/gpu/backward_launch.h"
#include "csrc/sm80/backward_traits.h"

namespace fa::gpu::sm80 {

template <class Traits>
void launch_query_tiles(BackwardLaunch const& launch, void* stream);
template <class Traits>
void launch_key_walk(BackwardLaunch const& launch, void* stream);
template <class Traits>
void launch_key_tiles(BackwardLaunch const& launch, void* stream);

}  // namespace fa::gpu::sm80
