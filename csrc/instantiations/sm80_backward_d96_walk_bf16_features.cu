// Written by generate.py.
#include "csrc/sm80/backward_launch.cuh"

namespace fa::sm80 {
using Traits = KeyWalkTraits<__nv_bfloat16, 96, 128, true>;
template void launch_key_walk<Traits>(BackwardLaunch const&, cudaStream_t);
}  // namespace fa::sm80
