// Written by generate.py.
#include "csrc/sm80/backward_launch.cuh"

namespace fa::gpu::sm80 {
using Traits = KeyWalkTraits<__half, 64, kWideQueries, false>;
template void launch_key_walk<Traits>(BackwardLaunch const&, void*);
}  // namespace fa::gpu::sm80
