// What a kernel set is to those who choose one: a name, what it takes, and its entry points.
//
// All sets keep the order of arithmetic of contract.h, so which one takes a call cannot reach a
// bit.
#pragma once

#include "csrc/core/params.h"
#include "csrc/gpu/forward_launch.h"
#include "csrc/gpu/multiprocessors.h"
#include "csrc/gpu/scratch.h"

namespace fa::gpu {

// What decides which set takes a call.
struct CallKind {
  int capability;  // of the device, 10 major + minor
  DType dtype;
  int64_t d, d_v;
  bool has_features;  // softcap, ALiBi, dropout, a scale that is not positive, unaligned rows
};

struct KernelSet {
  char const* name;
  char const* instructions;  // that its products are made of
  bool (*takes)(CallKind const&);
  ForwardPlan (*plan_forward)(ForwardParams const&, Multiprocessors const&);
  // On `stream` (a cudaStream_t) of the current device. scratch: plan.scratch().
  void (*forward)(ForwardParams const&, ForwardPlan const& plan, void* scratch, void* stream);
  Scratch (*backward_scratch)(BackwardParams const&, Multiprocessors const&);
  void (*backward)(BackwardParams const&, Multiprocessors const&, void* scratch, void* stream);
};

}  // namespace fa::gpu
