// Written by generate.py.
#include "csrc/sm80/forward_launch.cuh"

namespace fa::gpu::sm80 {
using Traits = Prefill<__nv_bfloat16, 64, true>;
template void launch_forward<Traits>(ForwardLaunch const&, void*);
}  // namespace fa::gpu::sm80
