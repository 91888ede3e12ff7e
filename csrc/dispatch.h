// Which kernels take a call on a GPU: the one place that knows all kernel sets.
#pragma once

#include "csrc/gpu/kernel_set.h"

namespace fa::dispatch {

// The first set that takes the call, the fastest asked first. Throws where none does.
gpu::KernelSet const& kernel_set(gpu::CallKind const& call);

}  // namespace fa::dispatch
