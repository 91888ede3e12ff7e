// The table of kernel sets.
//
// All sets keep one order of arithmetic (core/contract.h), so no entry here can change a bit.
#if defined(FLASH_ATTN_WITH_CUDA)
#include "csrc/dispatch.h"

#include <array>
#include <stdexcept>
#include <string>

#include "csrc/sm80/kernels.h"

namespace fa::dispatch {
namespace {

// The fastest first.
std::array<gpu::KernelSet const*, 1> const kSets{&gpu::sm80::kKernels};

std::string name_of(DType dtype) {
  return dtype == DType::kFloat32 ? "float32" : dtype == DType::kFloat16 ? "float16" : "bfloat16";
}

}  // namespace

gpu::KernelSet const& kernel_set(gpu::CallKind const& call) {
  for (gpu::KernelSet const* const set : kSets)
    if (set->takes(call)) return *set;
  throw std::runtime_error(
      "flash_attn: no kernels for this call; received dtype " + name_of(call.dtype) + ", d = " +
      std::to_string(call.d) + ", d_v = " + std::to_string(call.d_v) + " on compute capability " +
      std::to_string(call.capability / 10) + "." + std::to_string(call.capability % 10) +
      "; rule: float16 or bfloat16, d = d_v <= 256, compute capability 8.0 or later");
}

}  // namespace fa::dispatch
#endif
