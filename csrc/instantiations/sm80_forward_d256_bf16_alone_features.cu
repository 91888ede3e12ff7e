// Written by generate.py.
#include "csrc/sm80/forward_launch.cuh"

namespace fa::sm80 {
using Traits = FewRows<__nv_bfloat16, 256, true, Company::kAlone>;
template void launch_forward<Traits>(ForwardLaunch const&, cudaStream_t);
}  // namespace fa::sm80
