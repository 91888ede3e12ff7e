// The only file that knows PyTorch: tensors in, plain descriptors out, through the stable ABI
// alone.
//
// Every op writes into tensors that it is given; flash_attn/_ops.py allocates them and
// flash_attn/_checks.py has already refused what the descriptors cannot hold.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(FLASH_ATTN_WITH_CUDA)
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "csrc/sm80/family.h"
#include "csrc/sm80/faults.h"
#endif

#include <initializer_list>
#include <optional>
#include <string>
#include <utility>

#include "csrc/core/sequence.h"
#include "csrc/cpu/family.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

fa::DType dtype_of(Tensor const& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return fa::DType::kFloat32;
    case ScalarType::Half:
      return fa::DType::kFloat16;
    case ScalarType::BFloat16:
      return fa::DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "flash_attn: the kernels take float32, float16 and bfloat16");
  }
}

// Tensors are read where the call runs: one elsewhere has an address that means nothing there.
void check_device_of(Tensor const& q, std::initializer_list<OptionalTensor const*> others) {
  for (OptionalTensor const* const t : others) {
    bool const is_there =
        !t->has_value() || ((*t)->is_cuda() == q.is_cuda() && (*t)->is_cpu() == q.is_cpu() &&
                            (*t)->get_device_index() == q.get_device_index());
    STD_TORCH_CHECK(is_there, "flash_attn: a tensor is not on the device of q");
  }
}

// (b, s, h, d), or (t, h, d) of a packed batch.
fa::RowTensor row_tensor(Tensor const& t) {
  bool const packed = t.dim() == 3;
  int64_t const first = packed ? 0 : 1;
  return {t.data_ptr(), packed ? 0 : t.stride(0), t.stride(first), t.stride(first + 1)};
}

template <class T>
T* data_or_null(OptionalTensor const& t) {
  return t.has_value() ? static_cast<T*>(t->data_ptr()) : nullptr;
}

fa::LayoutParams layout_of(Tensor const& q, Tensor const& k, Tensor const& lse,
                           OptionalTensor const& cu_seqlens_q, OptionalTensor const& cu_seqlens_k,
                           OptionalTensor const& seqused_k, OptionalTensor const& leftpad_k,
                           OptionalTensor const& cache_batch_idx, OptionalTensor const& block_table,
                           int64_t max_seqlen_q, int64_t max_seqlen_k) {
  check_device_of(
      q, {&cu_seqlens_q, &cu_seqlens_k, &seqused_k, &leftpad_k, &cache_batch_idx, &block_table});
  fa::LayoutParams layout;
  layout.cu_seqlens_q = data_or_null<int32_t>(cu_seqlens_q);
  layout.cu_seqlens_k = data_or_null<int32_t>(cu_seqlens_k);
  layout.seqused_k = data_or_null<int32_t>(seqused_k);
  layout.leftpad_k = data_or_null<int32_t>(leftpad_k);
  layout.cache_batch_idx = data_or_null<int32_t>(cache_batch_idx);
  layout.block_table = data_or_null<int32_t>(block_table);
  layout.b = cu_seqlens_q ? cu_seqlens_q->size(0) - 1 : q.size(0);
  layout.h_q = q.size(q.dim() - 2);
  layout.h_kv = k.size(k.dim() - 2);
  layout.d = q.size(q.dim() - 1);
  layout.total_q = cu_seqlens_q ? q.size(0) : q.size(1);
  layout.total_k = block_table ? block_table->size(1) * k.size(1) : k.size(k.dim() - 3);
  // The largest lengths are bounds of a caller's, which may be any number.
  layout.s_q = fa::clamped(max_seqlen_q, layout.total_q);
  layout.s_k = fa::clamped(max_seqlen_k, layout.total_k);
  layout.cache_rows = k.size(0);
  if (!cu_seqlens_q) layout.caller = fa::Caller::kCache;
  if (block_table) {
    layout.block_table_stride = block_table->stride(0);
    layout.page_size = k.size(1);
  }
  layout.lse_batch_stride = cu_seqlens_q ? 0 : lse.stride(0);
  layout.lse_head_stride = lse.stride(lse.dim() - 2);
  return layout;
}

fa::ScoreParams score_of(OptionalTensor const& alibi_slopes, OptionalTensor const& seed,
                         double softmax_scale, bool causal, int64_t window_left,
                         int64_t window_right, double softcap, double dropout_p) {
  fa::ScoreParams score;
  score.softmax_scale = softmax_scale;
  score.softcap = softcap;
  // Farther than any key: sums of positions and windows stay within 64 bits.
  constexpr int64_t kFar = int64_t{1} << 40;
  auto const side = [](int64_t keys) { return keys < 0 || keys > kFar ? int64_t{-1} : keys; };
  score.window_left = side(window_left);
  score.window_right = causal ? 0 : side(window_right);
  score.alibi = data_or_null<float>(alibi_slopes);
  score.alibi_batch_stride = alibi_slopes && alibi_slopes->dim() == 2 ? alibi_slopes->stride(0) : 0;
  score.dropout_p = dropout_p;
  score.seed = data_or_null<int64_t>(seed);
  return score;
}

fa::cpu::Machine torch_threads() {
  auto const run = [](int64_t num_workers, void (*fn)(void*), void* context) {
    torch::stable::parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t worker = begin; worker < end; ++worker) fn(context);
    });
  };
  return {run, static_cast<int64_t>(torch::stable::get_num_threads())};
}

// The tensors and scalars of a forward call, in the order of the op's schema.
struct ForwardCall {
  Tensor q, k, v, out, lse;
  OptionalTensor s_dmask, partial_out, partial_max, partial_sum;
  OptionalTensor cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, cache_batch_idx, block_table;
  OptionalTensor alibi_slopes, seed, rng_state;
  int64_t max_seqlen_q, max_seqlen_k;
  double softmax_scale;
  bool causal;
  int64_t window_left, window_right;
  double softcap, dropout_p;
  int64_t num_splits;
  bool deterministic;

  fa::ForwardParams params() const {
    fa::ForwardParams p;
    p.dtype = dtype_of(q);
    p.layout = layout_of(q, k, lse, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k,
                         cache_batch_idx, block_table, max_seqlen_q, max_seqlen_k);
    p.score = score_of(alibi_slopes, seed, softmax_scale, causal, window_left, window_right,
                       softcap, dropout_p);
    p.plan = {deterministic, num_splits};
    p.q = row_tensor(q), p.k = row_tensor(k), p.v = row_tensor(v), p.out = row_tensor(out);
    p.lse = static_cast<float*>(lse.data_ptr());
    if (s_dmask) {
      p.s_dmask = s_dmask->data_ptr();
      p.s_dmask_rows = s_dmask->size(2);
      p.s_dmask_cols = s_dmask->size(3);
    }
    p.rng_state = data_or_null<int64_t>(rng_state);
    if (partial_out) {
      p.partials = {data_or_null<float>(partial_out), data_or_null<float>(partial_max),
                    data_or_null<float>(partial_sum), lse.numel()};
    }
    return p;
  }
};

template <void (*kRun)(ForwardCall const&)>
void forward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, OptionalTensor s_dmask,
             OptionalTensor partial_out, OptionalTensor partial_max, OptionalTensor partial_sum,
             OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k, OptionalTensor seqused_k,
             OptionalTensor leftpad_k, OptionalTensor cache_batch_idx, OptionalTensor block_table,
             OptionalTensor alibi_slopes, OptionalTensor seed, OptionalTensor rng_state,
             int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, bool causal,
             int64_t window_left, int64_t window_right, double softcap, double dropout_p,
             int64_t num_splits, bool deterministic) {
  kRun({q,
        k,
        v,
        out,
        lse,
        s_dmask,
        partial_out,
        partial_max,
        partial_sum,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        leftpad_k,
        cache_batch_idx,
        block_table,
        alibi_slopes,
        seed,
        rng_state,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale,
        causal,
        window_left,
        window_right,
        softcap,
        dropout_p,
        num_splits,
        deterministic});
}

void forward_on_cpu(ForwardCall const& call) {
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
void* current_stream(int32_t device) {
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
thread_local bool is_second_half = false;

void forward_on_gpu(ForwardCall const& call) {
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

template <void (*kRun)(fa::BackwardParams, Tensor const& delta)>
void backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor dq,
              Tensor dk, Tensor dv, Tensor delta, OptionalTensor cu_seqlens_q,
              OptionalTensor cu_seqlens_k, OptionalTensor alibi_slopes, OptionalTensor rng_state,
              int64_t max_seqlen_q, int64_t max_seqlen_k, double softmax_scale, bool causal,
              int64_t window_left, int64_t window_right, double softcap, double dropout_p) {
  fa::BackwardParams params;
  params.dtype = dtype_of(q);
  params.layout = layout_of(q, k, lse, cu_seqlens_q, cu_seqlens_k, std::nullopt, std::nullopt,
                            std::nullopt, std::nullopt, max_seqlen_q, max_seqlen_k);
  params.layout.caller = fa::Caller::kVarlenBackward;
  params.score = score_of(alibi_slopes, rng_state, softmax_scale, causal, window_left, window_right,
                          softcap, dropout_p);
  params.q = row_tensor(q);
  params.k = row_tensor(k);
  params.v = row_tensor(v);
  params.out = row_tensor(out);
  params.dout = row_tensor(dout);
  params.dq = row_tensor(dq);
  params.dk = row_tensor(dk);
  params.dv = row_tensor(dv);
  params.lse = static_cast<float const*>(lse.data_ptr());
  params.delta = static_cast<float*>(delta.data_ptr());
  params.delta_head_stride = delta.stride(delta.dim() - 2);
  params.delta_batch_stride = cu_seqlens_q ? 0 : delta.stride(0);
  params.delta_sequence_pad = 128;
  kRun(params, delta);
}

void backward_on_cpu(fa::BackwardParams params, Tensor const&) {
  fa::cpu::backward(params, torch_threads());
}

#if defined(FLASH_ATTN_WITH_CUDA)
void backward_on_gpu(fa::BackwardParams params, Tensor const& delta) {
  int32_t const device = delta.get_device_index();
  torch::stable::accelerator::DeviceGuard const guard(device);
  fa::sm80::raise_fault(device);
  params.layout.faults = fa::sm80::fault_word(device);
  fa::sm80::BackwardScratch const need = fa::sm80::backward_scratch(params);
  OptionalTensor scratch, tickets;
  if (need.floats > 0) scratch = torch::stable::new_empty(delta, {need.floats});
  if (need.integers > 0)
    tickets = torch::stable::new_zeros(delta, {need.integers}, ScalarType::Int);
  fa::sm80::backward(params, data_or_null<float>(scratch), data_or_null<int>(tickets),
                     current_stream(device));
}
#endif

fa::AppendParams append_params(Tensor const& q, OptionalTensor const& q_rotated,
                               Tensor const& k_new, Tensor const& v_new, Tensor const& k_cache,
                               Tensor const& v_cache, Tensor const& cache_seqlens,
                               OptionalTensor const& cache_batch_idx,
                               OptionalTensor const& block_table, OptionalTensor const& rotary_cos,
                               OptionalTensor const& rotary_sin, bool interleaved,
                               bool rotate_by_position) {
  fa::AppendParams params;
  params.dtype = dtype_of(q);
  params.b = q.size(0);
  params.s_q = q.size(1);
  params.s_new = k_new.size(1);
  params.h_q = q.size(2);
  params.h_kv = k_new.size(2);
  params.d = q.size(3);
  params.q = row_tensor(q);
  params.k_new = row_tensor(k_new);
  params.v_new = row_tensor(v_new);
  params.k_cache = row_tensor(k_cache);
  params.v_cache = row_tensor(v_cache);
  params.cache_rows = k_cache.size(0);
  params.capacity = block_table ? block_table->size(1) * k_cache.size(1) : k_cache.size(1);
  params.cache_seqlens = static_cast<int32_t const*>(cache_seqlens.data_ptr());
  params.cache_batch_idx = data_or_null<int32_t>(cache_batch_idx);
  if (block_table) {
    params.block_table = data_or_null<int32_t>(block_table);
    params.block_table_stride = block_table->stride(0);
    params.page_size = k_cache.size(1);
  }
  if (rotary_cos) {
    params.q_rotated = row_tensor(*q_rotated);
    params.cos = rotary_cos->data_ptr();
    params.sin = rotary_sin->data_ptr();
    params.rotary_rows = rotary_cos->size(0);
    params.rotary_dim = 2 * rotary_cos->size(1);
    params.interleaved = interleaved;
    params.rotate_by_position = rotate_by_position;
  }
  return params;
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

void append_on_cpu(fa::AppendParams params, int32_t) { fa::cpu::append(params, torch_threads()); }

#if defined(FLASH_ATTN_WITH_CUDA)
void append_on_gpu(fa::AppendParams params, int32_t device) {
  torch::stable::accelerator::DeviceGuard const guard(device);
  fa::sm80::raise_fault(device);
  is_second_half = true;
  params.faults = fa::sm80::fault_word(device);
  fa::sm80::append(params, current_stream(device));
}
#endif

// fields (7): tile rows, tiles, segments of the longest sequence, pieces, split extent (0: the
// ladder), threads or multiprocessors, keys a block. The schedule that forward() would choose: on
// this CPU, or (num_multiprocessors > 0) on such a GPU, where index tensors are not read.
void plan(Tensor fields, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
          OptionalTensor seqused_k, OptionalTensor leftpad_k, int64_t b, int64_t s_q, int64_t s_k,
          int64_t h_q, int64_t h_kv, int64_t d, int64_t total_q, int64_t num_splits,
          bool deterministic, int64_t num_multiprocessors) {
  STD_TORCH_CHECK(fields.is_cpu() && fields.scalar_type() == ScalarType::Long &&
                      fields.dim() == 1 && fields.size(0) == 7,
                  "flash_attn: a plan is written to seven int64 on the CPU");
  if (num_multiprocessors == 0)
    check_device_of(fields, {&cu_seqlens_q, &cu_seqlens_k, &seqused_k, &leftpad_k});
  fa::ForwardParams params;
  params.layout.cu_seqlens_q = data_or_null<int32_t>(cu_seqlens_q);
  params.layout.cu_seqlens_k = data_or_null<int32_t>(cu_seqlens_k);
  params.layout.seqused_k = data_or_null<int32_t>(seqused_k);
  params.layout.leftpad_k = data_or_null<int32_t>(leftpad_k);
  params.layout.b = b;
  params.layout.s_q = s_q;
  params.layout.s_k = s_k;
  params.layout.h_q = h_q;
  params.layout.h_kv = h_kv;
  params.layout.d = d;
  params.layout.lse_batch_stride = cu_seqlens_q ? 0 : h_q * s_q;
  params.layout.lse_head_stride = cu_seqlens_q ? total_q : s_q;
  params.plan = {deterministic, num_splits};
  int64_t* const field = static_cast<int64_t*>(fields.data_ptr());
#if defined(FLASH_ATTN_WITH_CUDA)
  if (num_multiprocessors > 0) {
    fa::sm80::ForwardPlan const chosen = fa::sm80::plan_forward(params, {num_multiprocessors});
    field[0] = chosen.tile_rows;
    field[1] = chosen.tiles * h_kv * b;
    field[2] = chosen.num_segments;
    field[3] = chosen.pieces;
    field[4] = chosen.segmentation.extent;
    field[5] = num_multiprocessors;
    field[6] = fa::contract::kSm80BlockKeys;
    return;
  }
#endif
  STD_TORCH_CHECK(num_multiprocessors == 0, "flash_attn: built without NVIDIA kernels");
  int64_t const num_threads = torch_threads().num_threads;
  fa::cpu::ForwardPlan const chosen = fa::cpu::plan_forward(params, num_threads);
  field[0] = chosen.tile_rows;
  field[1] = chosen.num_tiles;
  field[2] = chosen.num_segments;
  field[3] = chosen.pieces;
  field[4] = chosen.segmentation.extent;
  field[5] = num_threads;
  field[6] = fa::contract::kCpuBlockKeys;
}

// Raises the fault that earlier calls on a GPU have left, if any; does not wait for it.
void check_device(int64_t device) {
#if defined(FLASH_ATTN_WITH_CUDA)
  fa::sm80::raise_fault(static_cast<int>(device));
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
  return on_gpu ? fa::contract::segment_begin<fa::contract::Sm80Ladder>(segment)
                : fa::contract::segment_begin<fa::contract::CpuLadder>(segment);
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
      "plan(Tensor(a!) fields, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqused_k, "
      "Tensor? leftpad_k, "
      "int b, int s_q, int s_k, int h_q, int h_kv, int d, int total_q, int num_splits, bool "
      "deterministic, int num_multiprocessors) -> ()");
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
