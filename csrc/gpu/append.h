// The append of a cache call: new keys (rotated) and values into the cache, and rotated queries.
#pragma once

#include "csrc/core/params.h"

namespace fa::gpu {

// On `stream` (a cudaStream_t) of the current device.
void append(AppendParams const& params, void* stream);

}  // namespace fa::gpu
