// Written by generate.py.
#include "csrc/sm80/forward_launch.cuh"

namespace fa::gpu::sm80 {
using Traits = Decode<__half, 128, false, Occupancy::kMost>;
template void launch_forward<Traits>(ForwardLaunch const&, void*);
}  // namespace fa::gpu::sm80
