// The entry points of this set (gpu/kernel_set.h). Plain C++.
#pragma once

#include "csrc/gpu/kernel_set.h"

namespace fa::gpu::sm80 {

ForwardPlan plan_forward(ForwardParams const& call, Multiprocessors const& multiprocessors);
void forward(ForwardParams const& call, ForwardPlan const& plan, void* scratch, void* stream);

Scratch backward_scratch(BackwardParams const& call, Multiprocessors const& multiprocessors);
void backward(BackwardParams const& call, Multiprocessors const& multiprocessors, void* scratch,
              void* stream);

}  // namespace fa::gpu::sm80
