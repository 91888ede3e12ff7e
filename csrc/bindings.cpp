// The ops of the long way: each writes into tensors that it is given. flash_attn/_native.py
// allocates them, and flash_attn/_checks.py has already refused what the descriptors cannot hold.
#include <torch/csrc/stable/library.h>

#include <string>

#include "csrc/devices.h"

namespace {

using namespace fa::torch_side;

template <void (*kRun)(ForwardCall const&)>
void forward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, OptionalTensor s_dmask,
             OptionalTensor partial_out, OptionalTensor partial_max, OptionalTensor partial_sum,
             OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor seqused_k,
             OptionalTensor leftpad_k, OptionalTensor cache_batch_idx, OptionalTensor block_table,
             OptionalTensor alibi_slopes, OptionalTensor seed, OptionalTensor rng_state,
             int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, bool causal,
             int64_t window_left, int64_t window_right, double softcap, double dropout_p,
             int64_t num_splits, bool deterministic) {
  kRun({.q = q,
        .k = k,
        .v = v,
        .out = out,
        .lse = lse,
        .s_dmask = s_dmask,
        .partial_out = partial_out,
        .partial_max = partial_max,
        .partial_sum = partial_sum,
        .cu_seqlens_q = cu_seqlens_q,
        .cu_seqlens_k = cu_seqlens_k,
        .seqused_k = seqused_k,
        .leftpad_k = leftpad_k,
        .cache_batch_idx = cache_batch_idx,
        .block_table = block_table,
        .alibi_slopes = alibi_slopes,
        .seed = seed,
        .rng_state = rng_state,
        .max_seqlen_q = max_seqlen_q,
        .max_seqlen_k = max_seqlen_k,
        .softmax_scale = softmax_scale,
        .causal = causal,
        .window_left = window_left,
        .window_right = window_right,
        .softcap = softcap,
        .dropout_p = dropout_p,
        .num_splits = num_splits,
        .deterministic = deterministic});
}

template <void (*kRun)(BackwardCall const&)>
void backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor dq,
              Tensor dk, Tensor dv, Tensor delta, OptionalTensor cu_seqlens_q,
              OptionalTensor cu_seqlens_k, OptionalTensor alibi_slopes, OptionalTensor rng_state,
              int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, bool causal,
              int64_t window_left, int64_t window_right, double softcap, double dropout_p) {
  kRun({.dout = dout,
        .q = q,
        .k = k,
        .v = v,
        .out = out,
        .lse = lse,
        .dq = dq,
        .dk = dk,
        .dv = dv,
        .delta = delta,
        .cu_seqlens_q = cu_seqlens_q,
        .cu_seqlens_k = cu_seqlens_k,
        .alibi_slopes = alibi_slopes,
        .rng_state = rng_state,
        .max_seqlen_q = max_seqlen_q,
        .max_seqlen_k = max_seqlen_k,
        .softmax_scale = softmax_scale,
        .causal = causal,
        .window_left = window_left,
        .window_right = window_right,
        .softcap = softcap,
        .dropout_p = dropout_p});
}

template <void (*kRun)(fa::AppendParams, int32_t device)>
void append(Tensor q, OptionalTensor q_rotated, Tensor k_new, Tensor v_new, Tensor k_cache,
            Tensor v_cache, Tensor cache_seqlens, OptionalTensor cache_batch_idx,
            OptionalTensor block_table, OptionalTensor rotary_cos, OptionalTensor rotary_sin,
            bool interleaved, bool rotate_by_position) {
  kRun(append_params(q, q_rotated, k_new, v_new, k_cache, v_cache, cache_seqlens, cache_batch_idx,
                     block_table, rotary_cos, rotary_sin, interleaved, rotate_by_position),
       q.get_device_index());
}

// What a plan says, in the order of flash_attn/_plan.py.
struct PlanFields {
  int64_t tile_rows, tiles, segments, pieces, split_extent, processors, block_keys;
};

PlanFields plan_on_cpu(fa::ForwardParams const& params) {
  int64_t const threads = torch_threads().num_threads;
  fa::cpu::ForwardPlan const plan = fa::cpu::plan_forward(params, threads);
  return {.tile_rows = plan.tile_rows,
          .tiles = plan.num_tiles,
          .segments = plan.num_segments,
          .pieces = plan.pieces,
          .split_extent = plan.segmentation.extent,
          .processors = threads,
          .block_keys = fa::contract::CpuOrder::kBlockKeys};
}

#if defined(FLASH_ATTN_WITH_CUDA)
PlanFields plan_on_gpu(fa::ForwardParams const& params, fa::gpu::KernelSet const& kernels,
                       fa::gpu::Multiprocessors const& multiprocessors) {
  fa::gpu::ForwardPlan const plan = kernels.plan_forward(params, multiprocessors);
  return {.tile_rows = plan.tile_rows,
          .tiles = plan.work / plan.pieces,
          .segments = plan.num_segments,
          .pieces = plan.pieces,
          .split_extent = plan.segmentation.extent,
          .processors = multiprocessors.count,
          .block_keys = fa::contract::GpuOrder::kBlockKeys};
}
#endif

// fields (7) = the schedule that forward() would choose for a call on GPU `device`, or below zero
// on this CPU; returns the kernels that it would run. The tensors may be meta tensors.
std::string plan(Tensor fields, Tensor q, Tensor k, Tensor v, Tensor lse,
                 OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor seqused_k,
                 OptionalTensor leftpad_k, OptionalTensor cache_batch_idx,
                 OptionalTensor block_table, OptionalTensor alibi_slopes, int64_t max_seqlen_q,
                 int64_t max_seqlen_k, double softmax_scale, double softcap, double dropout_p,
                 int64_t num_splits, bool deterministic, int64_t device) {
  static_assert(sizeof(PlanFields) == 7 * sizeof(int64_t));
  STD_TORCH_CHECK(fields.is_cpu() && fields.scalar_type() == ScalarType::Long &&
                      fields.dim() == 1 && fields.size(0) == 7,
                  "flash_attn: a plan is written to seven int64 on the CPU");
  ForwardCall call{.q = q, .k = k, .v = v, .out = q, .lse = lse};
  call.cu_seqlens_q = cu_seqlens_q, call.cu_seqlens_k = cu_seqlens_k;
  call.seqused_k = seqused_k, call.leftpad_k = leftpad_k;
  call.cache_batch_idx = cache_batch_idx, call.block_table = block_table;
  call.alibi_slopes = alibi_slopes;
  call.max_seqlen_q = max_seqlen_q, call.max_seqlen_k = max_seqlen_k;
  call.softmax_scale = softmax_scale, call.softcap = softcap, call.dropout_p = dropout_p;
  call.num_splits = num_splits, call.deterministic = deterministic;
  fa::ForwardParams const params = call.params();
  auto* const written = static_cast<PlanFields*>(fields.data_ptr());
  if (device < 0) {
    *written = plan_on_cpu(params);
    return fa::cpu::selected_kernels().isa;
  }
#if defined(FLASH_ATTN_WITH_CUDA)
  fa::gpu::Multiprocessors const& multiprocessors =
      fa::gpu::multiprocessors_of(static_cast<int>(device));
  fa::gpu::KernelSet const& kernels =
      fa::dispatch::kernel_set(fa::gpu::kind_of(params, multiprocessors.capability));
  *written = plan_on_gpu(params, kernels, multiprocessors);
  return std::string(kernels.name) + " (" + kernels.instructions + ")";
#else
  STD_TORCH_CHECK(false, "flash_attn: built without NVIDIA kernels");
#endif
}

// Raises the fault that earlier calls on a GPU have left, if any; does not wait for it.
void check_device(int64_t device) {
#if defined(FLASH_ATTN_WITH_CUDA)
  fa::gpu::raise_fault(static_cast<int>(device));
#else
  static_cast<void>(device);
#endif
}

// What FLASH_ATTN_CUDA_ARCHS was when the NVIDIA kernels were built; empty without any.
std::string cuda_archs() {
#if defined(FLASH_ATTN_WITH_CUDA)
  return FLASH_ATTN_WITH_CUDA;
#else
  return "";
#endif
}

int64_t segment_begin(int64_t segment, bool on_gpu) {
  return on_gpu ? fa::contract::segment_begin<fa::contract::GpuOrder>(segment)
                : fa::contract::segment_begin<fa::contract::CpuOrder>(segment);
}

std::string cpu_isa() { return fa::cpu::selected_kernels().isa; }

}  // namespace

STABLE_TORCH_LIBRARY(flash_attn_native, m) {
  m.def(
      "forward(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, Tensor(c!)? s_dmask, "
      "Tensor(d!)? partial_out, Tensor(e!)? partial_max, Tensor(f!)? partial_sum, Tensor? "
      "cu_seqlens_q, "
      "Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? leftpad_k, Tensor? cache_batch_idx, "
      "Tensor? block_table, "
      "Tensor? alibi_slopes, Tensor? seed, Tensor(g!)? rng_state, int max_seqlen_q, "
      "int max_seqlen_k, float softmax_scale, bool causal, "
      "int window_left, int window_right, float softcap, float dropout_p, int num_splits, bool "
      "deterministic) -> ()");
  m.def(
      "backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor(a!) dq, "
      "Tensor(b!) dk, "
      "Tensor(c!) dv, Tensor(d!) delta, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? "
      "alibi_slopes, "
      "Tensor? rng_state, int max_seqlen_q, int max_seqlen_k, float softmax_scale, bool causal, "
      "int window_left, "
      "int window_right, float softcap, float dropout_p) -> ()");
  m.def(
      "append(Tensor q, Tensor(a!)? q_rotated, Tensor k_new, Tensor v_new, Tensor(b!) k_cache, "
      "Tensor(c!) v_cache, "
      "Tensor cache_seqlens, Tensor? cache_batch_idx, Tensor? block_table, Tensor? rotary_cos, "
      "Tensor? rotary_sin, "
      "bool interleaved, bool rotate_by_position) -> ()");
  m.def(
      "plan(Tensor(a!) fields, Tensor q, Tensor k, Tensor v, Tensor lse, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, Tensor? seqused_k, Tensor? leftpad_k, Tensor? cache_batch_idx, "
      "Tensor? block_table, Tensor? alibi_slopes, int max_seqlen_q, int max_seqlen_k, "
      "float softmax_scale, float softcap, float dropout_p, int num_splits, bool deterministic, "
      "int device) -> str");
  m.def("check_device(int device) -> ()");
  m.def("cuda_archs() -> str");
  m.def("segment_begin(int segment, bool on_gpu) -> int");
  m.def("cpu_isa() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_native, CPU, m) {
  m.impl("forward", TORCH_BOX(&forward<forward_on_cpu>));
  m.impl("backward", TORCH_BOX(&backward<backward_on_cpu>));
  m.impl("append", TORCH_BOX(&append<append_on_cpu>));
}

#if defined(FLASH_ATTN_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(flash_attn_native, CUDA, m) {
  m.impl("forward", TORCH_BOX(&forward<forward_on_gpu>));
  m.impl("backward", TORCH_BOX(&backward<backward_on_gpu>));
  m.impl("append", TORCH_BOX(&append<append_on_gpu>));
}
#endif

STABLE_TORCH_LIBRARY_IMPL(flash_attn_native, CompositeExplicitAutograd, m) {
  m.impl("plan", TORCH_BOX(&plan));
  m.impl("check_device", TORCH_BOX(&check_device));
  m.impl("cuda_archs", TORCH_BOX(&cuda_archs));
  m.impl("segment_begin", TORCH_BOX(&segment_begin));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}
