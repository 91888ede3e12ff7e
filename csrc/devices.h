// A call on the device of its tensors: which kernels, on which stream, with which scratch memory.
#pragma once

#include <utility>

#include "csrc/descriptors.h"
#include "csrc/results.h"

#if defined(FLASH_ATTN_WITH_CUDA)
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "csrc/dispatch.h"
#include "csrc/gpu/append.h"
#include "csrc/gpu/faults.h"
#include "csrc/gpu/features.h"
#endif

namespace fa::torch_side {

// The CPU kernels have one head dim.
inline void check_head_dims(fa::LayoutParams const& layout) {
  STD_TORCH_CHECK(layout.d_v == layout.d, "flash_attn: v has another head dim than q and k");
}

inline void forward_on_cpu(ForwardCall const& call) {
  fa::ForwardParams const params = call.params();
  check_head_dims(params.layout);
  fa::cpu::forward(params, torch_threads());
  if (params.rng_state) {
    for (int i = 0; i < 2; ++i) params.rng_state[i] = params.score.seed ? params.score.seed[i] : 0;
    if (call.deterministic) params.rng_state[1] |= fa::kDeterministicBit;
  }
}

inline void backward_on_cpu(BackwardCall const& call) {
  fa::BackwardParams const params = call.params();
  check_head_dims(params.layout);
  fa::cpu::backward(params, torch_threads());
}

inline void append_on_cpu(fa::AppendParams params, int32_t) {
  fa::cpu::append(params, torch_threads());
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

// Of PyTorch's allocator, so that CUDA graphs own it too; nothing where nothing is needed.
inline OptionalTensor new_scratch(fa::gpu::Scratch const& need, Tensor const& fp32) {
  if (need.bytes() == 0) return std::nullopt;
  return empty_beside<1>(fp32, {(need.bytes() + 3) / 4}, aoti_torch_dtype_float32());
}

inline void forward_on_gpu(ForwardCall const& call) {
  int32_t const device = call.q.get_device_index();
  torch::stable::accelerator::DeviceGuard const guard(device);
  if (!std::exchange(is_second_half, false)) fa::gpu::raise_fault(device);
  fa::ForwardParams params = call.params();
  params.layout.faults = fa::gpu::fault_word(device);
  fa::gpu::Multiprocessors const& sms = fa::gpu::multiprocessors_of(device);
  fa::gpu::KernelSet const& kernels =
      fa::dispatch::kernel_set(fa::gpu::kind_of(params, sms.capability));
  fa::gpu::ForwardPlan const plan = kernels.plan_forward(params, sms);
  OptionalTensor const scratch = new_scratch(plan.scratch(), call.lse);
  void* const stream = current_stream(device);
  kernels.forward(params, plan, data_or_null<void>(scratch), stream);
  if (params.s_dmask) fa::gpu::write_dmask(params, stream);
}

inline void backward_on_gpu(BackwardCall const& call) {
  int32_t const device = call.q.get_device_index();
  torch::stable::accelerator::DeviceGuard const guard(device);
  fa::gpu::raise_fault(device);
  fa::BackwardParams params = call.params();
  params.layout.faults = fa::gpu::fault_word(device);
  fa::gpu::Multiprocessors const& sms = fa::gpu::multiprocessors_of(device);
  fa::gpu::KernelSet const& kernels =
      fa::dispatch::kernel_set(fa::gpu::kind_of(params, sms.capability));
  OptionalTensor const scratch = new_scratch(kernels.backward_scratch(params, sms), call.delta);
  kernels.backward(params, sms, data_or_null<void>(scratch), current_stream(device));
}

inline void append_on_gpu(fa::AppendParams params, int32_t device) {
  torch::stable::accelerator::DeviceGuard const guard(device);
  fa::gpu::raise_fault(device);
  is_second_half = true;
  params.faults = fa::gpu::fault_word(device);
  fa::gpu::append(params, current_stream(device));
}
#endif

}  // namespace fa::torch_side
