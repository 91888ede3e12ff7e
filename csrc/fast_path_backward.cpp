// A backward call in one step: accept, allocate, run. As in fast_path.cpp, what it does not accept
// it hands back untouched.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "csrc/acceptance.h"
#include "csrc/devices.h"
#include "csrc/results.h"

namespace {

using namespace fa::torch_side;

// Memory of x's shape. A view that does not fill its memory gets strides in PyTorch's own order.
Tensor gradient_of(Tensor const& x) {
  return x.is_contiguous() ? empty_like_q(x) : torch::stable::empty_like(x);
}

// Nobody sees it, so it needs no value: the kernels write it before they read it.
Tensor empty_delta(Tensor const& q, OptionalTensor const& cu_seqlens_q) {
  int32_t const dtype = aoti_torch_dtype_float32();
  if (cu_seqlens_q) {
    int64_t const padding = kRowPadding * (cu_seqlens_q->size(0) - 1);
    return empty_beside<2>(q, {q.size(1), q.size(0) + padding}, dtype);
  }
  int64_t const rows = (q.size(1) + kRowPadding - 1) / kRowPadding * kRowPadding;
  return empty_beside<3>(q, {q.size(0), q.size(2), rows}, dtype);
}

bool has_sizes_of(Tensor const& x, Tensor const& q) {
  if (x.dim() != q.dim()) return false;
  for (int64_t i = 0; i < q.dim(); ++i)
    if (x.size(i) != q.size(i)) return false;
  return true;
}

// out and lse are what the forward pass of these tensors gave.
template <void (*kRun)(BackwardCall const&)>
std::vector<Tensor> attend_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out,
                                    Tensor lse, OptionalTensor cu_seqlens_q,
                                    OptionalTensor cu_seqlens_k, int64_t max_seqlen_q,
                                    int64_t max_seqlen_k, std::optional<double> softmax_scale,
                                    bool causal, int64_t window_left, int64_t window_right,
                                    double softcap, OptionalTensor alibi_slopes) {
  bool const packed = cu_seqlens_q.has_value();
  if (packed != cu_seqlens_k.has_value()) return {};
  if (packed ? !takes_packed(q, k, v, *cu_seqlens_q, *cu_seqlens_k, max_seqlen_q, max_seqlen_k, {})
             : !takes_dense(q, k, v))
    return {};
  int64_t const b = packed ? cu_seqlens_q->size(0) - 1 : q.size(0);
  if (!takes_scores(softmax_scale, softcap) || !takes_alibi(alibi_slopes, q, b)) return {};
  for (Tensor const& x : {dout, out})
    if (!like(x, q) || !has_sizes_of(x, q) || !is_in_columns(x)) return {};
  if (!lse.is_contiguous() || (packed && wants_contents_read(q))) return {};
  BackwardCall call{.dout = dout,
                    .q = q,
                    .k = k,
                    .v = v,
                    .out = out,
                    .lse = lse,
                    .dq = gradient_of(q),
                    .dk = gradient_of(k),
                    .dv = gradient_of(v),
                    .delta = empty_delta(q, cu_seqlens_q)};
  call.cu_seqlens_q = cu_seqlens_q, call.cu_seqlens_k = cu_seqlens_k;
  call.alibi_slopes = alibi_slopes;
  call.max_seqlen_q = packed ? max_seqlen_q : q.size(1);
  call.max_seqlen_k = packed ? max_seqlen_k : k.size(1);
  call.softmax_scale = scale_of(softmax_scale, q), call.softcap = softcap;
  call.causal = causal, call.window_left = window_left, call.window_right = window_right;
  std::vector<Tensor> gradients{call.dq, call.dk, call.dv};
  if (packed)  // tokens that no sequence covers have no gradient, and no kernel writes them
    for (Tensor& gradient : gradients) torch::stable::zero_(gradient);
  kRun(call);
  return gradients;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flash_attn_native, m) {
  m.def(
      "attend_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, "
      "float? softmax_scale, bool causal, int window_left, int window_right, float softcap, "
      "Tensor? alibi_slopes) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_native, CPU, m) {
  m.impl("attend_backward", TORCH_BOX(&attend_backward<backward_on_cpu>));
}

#if defined(FLASH_ATTN_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(flash_attn_native, CUDA, m) {
  m.impl("attend_backward", TORCH_BOX(&attend_backward<backward_on_gpu>));
}
#endif
