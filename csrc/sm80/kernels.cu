// What the sm80 kernel set takes.
#include "csrc/sm80/kernels.h"

#include "csrc/sm80/entry.h"

namespace fa::gpu::sm80 {
namespace {

bool takes(CallKind const& call) {
  bool const has_dtype = call.dtype == DType::kFloat16 || call.dtype == DType::kBFloat16;
  return call.capability >= 80 && has_dtype && call.d_v == call.d && call.d <= 256;
}

}  // namespace

KernelSet const kKernels{.name = "sm80",
                         .instructions = "mma.sync",
                         .takes = takes,
                         .plan_forward = plan_forward,
                         .forward = forward,
                         .backward_scratch = backward_scratch,
                         .backward = backward};

}  // namespace fa::gpu::sm80
