// A call on the device of its tensors: which kernels, on which stream, with which scratch memory.
#pragma once

#include <string>
#include <utility>

#include "csrc/descriptors.h"

#if defined(FLASH_ATTN_WITH_CUDA)
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "csrc/sm80/family.h"
#include "csrc/sm80/faults.h"
#endif

namespace fa::torch_side {

inline void forward_on_cpu(ForwardCall const& call) {
  fa::ForwardParams const params = call.params();
  fa::cpu::forward(params, torch_threads());
  if (params.rng_state) {
    for (int i = 0; i < 2; ++i) params.rng_state[i] = params.score.seed ? params.score.seed[i] : 0;
    if (call.deterministic) params.rng_state[1] |= fa::kDeterministicBit;
  }
}

#if defined(FLASH_ATTN_WITH_CUDA)
// The current stream of the tensor's device. CPU builds of PyTorch do not have the symbol, so it is
// looked up in the library that a process with a GPU has loaded already.
inline void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static Get const get = [] {
    void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
                   : nullptr;
  }();
  STD_TORCH_CHECK(get != nullptr, "flash_attn: this PyTorch has no CUDA stream to run on");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

// A cache call appends and then attends: what its first half finds is for the next call to raise.
inline thread_local bool is_second_half = false;

inline void forward_on_gpu(ForwardCall const& call) {
  int32_t const device = call.q.get_device_index();
  torch::stable::accelerator::DeviceGuard const guard(device);
  if (!std::exchange(is_second_half, false)) fa::sm80::raise_fault(device);
  fa::ForwardParams params = call.params();
  params.layout.faults = fa::sm80::fault_word(device);
  fa::sm80::ForwardPlan const plan =
      fa::sm80::plan_forward(params, fa::sm80::processors_of(device));
  OptionalTensor scratch;  // of PyTorch's allocator, so that CUDA graphs own it too
  int64_t const floats = plan.list_floats + (params.partials.out ? 0 : plan.scratch_floats);
  if (floats > 0) scratch = torch::stable::new_empty(call.lse, {floats});
  void* const stream = current_stream(device);
  fa::sm80::forward(params, plan, data_or_null<float>(scratch), stream);
  if (params.s_dmask) fa::sm80::write_dmask(params, stream);
}
#endif

inline void backward_on_cpu(BackwardCall const& call) {
  fa::cpu::backward(call.params(), torch_threads());
}

#if defined(FLASH_ATTN_WITH_CUDA)
inline void backward_on_gpu(BackwardCall const& call) {
  int32_t const device = call.q.get_device_index();
  torch::stable::accelerator::DeviceGuard const guard(device);
  fa::sm80::raise_fault(device);
  fa::BackwardParams params = call.params();
  params.layout.faults = fa::sm80::fault_word(device);
  fa::sm80::BackwardScratch const need = fa::sm80::backward_scratch(params);
  OptionalTensor scratch, tickets;
  if (need.floats > 0) scratch = torch::stable::new_empty(call.delta, {need.floats});
  if (need.integers > 0)
    tickets = torch::stable::new_zeros(call.delta, {need.integers}, ScalarType::Int);
  fa::sm80::backward(params, data_or_null<float>(scratch), data_or_null<int>(tickets),
                     current_stream(device));
}
#endif

inline void append_on_cpu(fa::AppendParams params, int32_t) {
  fa::cpu::append(params, torch_threads());
}

#if defined(FLASH_ATTN_WITH_CUDA)
inline void append_on_gpu(fa::AppendParams params, int32_t device) {
  torch::stable::accelerator::DeviceGuard const guard(device);
  fa::sm80::raise_fault(device);
  is_second_half = true;
  params.faults = fa::sm80::fault_word(device);
  fa::sm80::append(params, current_stream(device));
}
#endif

}  // namespace fa::torch_side
