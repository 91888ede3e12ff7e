// A forward call in one step: accept, allocate, run. What it does not accept it hands back
// untouched, as an empty list; the op of the same name in flash_attn/_forward_ops.py then says why,
// or runs it the long way.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "csrc/acceptance.h"
#include "csrc/devices.h"
#include "csrc/results.h"

namespace {

using namespace fa::torch_side;

// Tokens behind the last sequence of a pack see nothing. On a GPU the kernels say so.
void define_uncovered_rows(Tensor const& out, Tensor const& lse, Tensor const& cu_seqlens_q) {
  int64_t const covered = entries(cu_seqlens_q)[cu_seqlens_q.size(0) - 1], total = out.size(0);
  int64_t const row_bytes =
      out.size(1) * out.size(2) * (out.scalar_type() == ScalarType::Float ? 4 : 2);
  std::memset(static_cast<char*>(out.data_ptr()) + covered * row_bytes, 0,
              static_cast<size_t>((total - covered) * row_bytes));
  auto* const values = static_cast<float*>(lse.data_ptr());
  for (int64_t head = 0; head < lse.size(0); ++head)
    std::fill(values + head * total + covered, values + (head + 1) * total,
              std::numeric_limits<float>::infinity());
}

template <void (*kRun)(ForwardCall const&)>
std::vector<Tensor> attend(Tensor q, Tensor k, Tensor v, OptionalTensor cu_seqlens_q,
                           OptionalTensor cu_seqlens_k, int64_t max_seqlen_q, int64_t max_seqlen_k,
                           std::optional<double> softmax_scale, bool causal, int64_t window_left,
                           int64_t window_right, double softcap, OptionalTensor alibi_slopes,
                           OptionalTensor block_table, bool deterministic) {
  bool const packed = cu_seqlens_q.has_value();
  if (packed != cu_seqlens_k.has_value() || (!packed && block_table)) return {};
  if (packed ? !takes_packed(q, k, v, *cu_seqlens_q, *cu_seqlens_k, max_seqlen_q, max_seqlen_k,
                             block_table)
             : !takes_dense(q, k, v))
    return {};
  int64_t const b = packed ? cu_seqlens_q->size(0) - 1 : q.size(0);
  if (!takes_scores(softmax_scale, softcap) || !takes_alibi(alibi_slopes, q, b)) return {};
  if (packed && wants_contents_read(q)) return {};
  ForwardCall call{.q = q, .k = k, .v = v, .out = empty_like_q(q), .lse = empty_lse(q)};
  call.cu_seqlens_q = cu_seqlens_q, call.cu_seqlens_k = cu_seqlens_k;
  call.block_table = block_table, call.alibi_slopes = alibi_slopes;
  call.max_seqlen_q = packed ? max_seqlen_q : q.size(1);
  call.max_seqlen_k = packed ? max_seqlen_k : k.size(1);
  call.softmax_scale = scale_of(softmax_scale, q), call.softcap = softcap;
  call.causal = causal, call.window_left = window_left, call.window_right = window_right;
  call.deterministic = deterministic;
  kRun(call);
  if (packed && q.is_cpu()) define_uncovered_rows(call.out, call.lse, *cu_seqlens_q);
  return {call.out, call.lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flash_attn_native, m) {
  m.def(
      "attend(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
      "int max_seqlen_q, int max_seqlen_k, float? softmax_scale, bool causal, int window_left, "
      "int window_right, float softcap, Tensor? alibi_slopes, Tensor? block_table, "
      "bool deterministic) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_native, CPU, m) {
  m.impl("attend", TORCH_BOX(&attend<forward_on_cpu>));
}

#if defined(FLASH_ATTN_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(flash_attn_native, CUDA, m) {
  m.impl("attend", TORCH_BOX(&attend<forward_on_gpu>));
}
#endif
