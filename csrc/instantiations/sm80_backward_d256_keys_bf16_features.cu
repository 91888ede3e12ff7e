// Written by generate.py.
#include "csrc/sm80/backward_launch.cuh"

namespace fa::gpu::sm80 {
using Traits = KeyTile<__nv_bfloat16, 256, true>;
template void launch_key_tiles<Traits>(BackwardLaunch const&, void*);
}  // namespace fa::gpu::sm80
