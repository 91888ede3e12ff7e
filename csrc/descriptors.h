// PyTorch's tensors as the plain descriptors that kernels take, through the stable ABI alone.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>

#include "csrc/core/sequence.h"
#include "csrc/cpu/family.h"

namespace fa::torch_side {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kRowPadding = 128;  // rows of delta, as callers of the low-level ops expect

inline fa::DType dtype_of(Tensor const& t) {
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
inline void check_device_of(Tensor const& q, std::initializer_list<OptionalTensor const*> others) {
  for (OptionalTensor const* const t : others) {
    bool const is_there =
        !t->has_value() || ((*t)->is_cuda() == q.is_cuda() && (*t)->is_cpu() == q.is_cpu() &&
                            (*t)->get_device_index() == q.get_device_index());
    STD_TORCH_CHECK(is_there, "flash_attn: a tensor is not on the device of q");
  }
}

// (b, s, h, d), or (t, h, d) of a packed batch.
inline fa::RowTensor row_tensor(Tensor const& t) {
  bool const packed = t.dim() == 3;
  int64_t const first = packed ? 0 : 1;
  return {t.data_ptr(), packed ? 0 : t.stride(0), t.stride(first), t.stride(first + 1)};
}

template <class T>
T* data_or_null(OptionalTensor const& t) {
  return t.has_value() ? static_cast<T*>(t->data_ptr()) : nullptr;
}

inline fa::LayoutParams layout_of(Tensor const& q, Tensor const& k, Tensor const& v,
                                  Tensor const& lse, OptionalTensor const& cu_seqlens_q,
                                  OptionalTensor const& cu_seqlens_k,
                                  OptionalTensor const& seqused_k, OptionalTensor const& leftpad_k,
                                  OptionalTensor const& cache_batch_idx,
                                  OptionalTensor const& block_table, int64_t max_seqlen_q,
                                  int64_t max_seqlen_k) {
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
  layout.d_v = v.size(v.dim() - 1);
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

inline fa::ScoreParams score_of(OptionalTensor const& alibi_slopes, OptionalTensor const& seed,
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

inline fa::cpu::Machine torch_threads() {
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
  OptionalTensor s_dmask{}, partial_out{}, partial_max{}, partial_sum{};
  OptionalTensor cu_seqlens_q{}, cu_seqlens_k{}, seqused_k{}, leftpad_k{};
  OptionalTensor cache_batch_idx{}, block_table{}, alibi_slopes{}, seed{}, rng_state{};
  int64_t max_seqlen_q = 0, max_seqlen_k = 0;
  double softmax_scale = 0.0;
  bool causal = false;
  int64_t window_left = -1, window_right = -1;
  double softcap = 0.0, dropout_p = 0.0;
  int64_t num_splits = 0;
  bool deterministic = false;
  int64_t new_keys = 0;  // that seqused_k does not count

  fa::ForwardParams params() const {
    fa::ForwardParams p;
    p.dtype = dtype_of(q);
    p.layout = layout_of(q, k, v, lse, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k,
                         cache_batch_idx, block_table, max_seqlen_q, max_seqlen_k);
    p.score = score_of(alibi_slopes, seed, softmax_scale, causal, window_left, window_right,
                       softcap, dropout_p);
    p.layout.new_keys = new_keys;
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

// The same of a backward call.
struct BackwardCall {
  Tensor dout, q, k, v, out, lse, dq, dk, dv;
  Tensor delta;  // [b, h_q, s_q rounded up to 128], or [h_q, t + 128 b]
  OptionalTensor cu_seqlens_q{}, cu_seqlens_k{}, alibi_slopes{}, rng_state{};
  int64_t max_seqlen_q = 0, max_seqlen_k = 0;
  double softmax_scale = 0.0;
  bool causal = false;
  int64_t window_left = -1, window_right = -1;
  double softcap = 0.0, dropout_p = 0.0;

  fa::BackwardParams params() const {
    fa::BackwardParams p;
    p.dtype = dtype_of(q);
    p.layout = layout_of(q, k, v, lse, cu_seqlens_q, cu_seqlens_k, std::nullopt, std::nullopt,
                         std::nullopt, std::nullopt, max_seqlen_q, max_seqlen_k);
    p.layout.caller = fa::Caller::kVarlenBackward;
    p.score = score_of(alibi_slopes, rng_state, softmax_scale, causal, window_left, window_right,
                       softcap, dropout_p);
    p.q = row_tensor(q), p.k = row_tensor(k), p.v = row_tensor(v), p.out = row_tensor(out);
    p.dout = row_tensor(dout), p.dq = row_tensor(dq), p.dk = row_tensor(dk), p.dv = row_tensor(dv);
    p.lse = static_cast<float const*>(lse.data_ptr());
    p.delta = static_cast<float*>(delta.data_ptr());
    p.delta_head_stride = delta.stride(delta.dim() - 2);
    p.delta_batch_stride = cu_seqlens_q ? 0 : delta.stride(0);
    p.delta_sequence_pad = kRowPadding;
    return p;
  }
};

inline fa::AppendParams append_params(
    Tensor const& q, OptionalTensor const& q_rotated, Tensor const& k_new, Tensor const& v_new,
    Tensor const& k_cache, Tensor const& v_cache, OptionalTensor const& cache_seqlens,
    OptionalTensor const& cache_batch_idx, OptionalTensor const& block_table,
    OptionalTensor const& rotary_cos, OptionalTensor const& rotary_sin, bool interleaved,
    bool rotate_by_position) {
  fa::AppendParams params;
  params.dtype = dtype_of(q);
  params.b = q.size(0);
  params.s_q = q.size(1);
  params.s_new = k_new.size(1);
  params.h_q = q.size(2);
  params.h_kv = k_new.size(2);
  params.d = q.size(3);
  params.d_v = v_new.size(3);
  params.q = row_tensor(q);
  params.k_new = row_tensor(k_new);
  params.v_new = row_tensor(v_new);
  params.k_cache = row_tensor(k_cache);
  params.v_cache = row_tensor(v_cache);
  params.cache_rows = k_cache.size(0);
  params.capacity = block_table ? block_table->size(1) * k_cache.size(1) : k_cache.size(1);
  params.cache_seqlens = data_or_null<int32_t>(cache_seqlens);
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

}  // namespace fa::torch_side
