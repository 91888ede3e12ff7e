// Written by generate.py.
#include "csrc/sm80/backward_launch.cuh"

namespace fa::gpu::sm80 {
using Traits = KeyTile<__half, 256, false>;
template void launch_key_tiles<Traits>(BackwardLaunch const&, void*);
}  // namespace fa::gpu::sm80
