// Whether a call is as the kernels take it: the rules of flash_attn/_check_rules.py and
// _check_contents.py as one answer without words. They hold the words.
//
// Stricter in places, never looser: what has no elements, lies in strides that would be copied, or
// needs a search is left to the rules in Python as well.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "csrc/descriptors.h"

namespace fa::torch_side {

constexpr int64_t kMaxHeadDim = 256;

inline bool on_device_of(Tensor const& x, Tensor const& q) {
  return x.is_cpu() == q.is_cpu() && x.is_cuda() == q.is_cuda() &&
         x.get_device_index() == q.get_device_index();
}

inline bool like(Tensor const& x, Tensor const& q) {
  return x.scalar_type() == q.scalar_type() && on_device_of(x, q);
}

// Whether the elements of the last dimension lie one behind the other, and there are some.
inline bool is_in_columns(Tensor const& x) { return x.numel() > 0 && x.stride(x.dim() - 1) == 1; }

// The index tensors of a call may be read here: they lie on the CPU. On a GPU the kernels bound
// what they read; FLASH_ATTN_CHECK=1, which waits for it, is for the rules in Python.
inline bool wants_contents_read(Tensor const& q) {
  char const* const asked = std::getenv("FLASH_ATTN_CHECK");
  return !q.is_cpu() && asked && std::strcmp(asked, "1") == 0;
}

// q (.., h_q, d), k and v (.., h_kv, d) of a forward pass, of so many dimensions.
inline bool takes_qkv(Tensor const& q, Tensor const& k, Tensor const& v, int64_t q_dim,
                      int64_t k_dim) {
  if (q.dim() != q_dim || k.dim() != k_dim || v.dim() != k_dim) return false;
  ScalarType const dtype = q.scalar_type();
  bool const half = dtype == ScalarType::Half || dtype == ScalarType::BFloat16;
  if (!half && !(dtype == ScalarType::Float && q.is_cpu())) return false;
  if (!like(k, q) || !like(v, q)) return false;
  if (!is_in_columns(q) || !is_in_columns(k) || !is_in_columns(v)) return false;
  for (int64_t i = 0; i < k_dim; ++i)
    if (k.size(i) != v.size(i)) return false;
  int64_t const h_q = q.size(q_dim - 2), h_kv = k.size(k_dim - 2), d = q.size(q_dim - 1);
  return d == k.size(k_dim - 1) && d <= kMaxHeadDim && h_q % h_kv == 0;
}

inline bool takes_scores(std::optional<double> softmax_scale, double softcap) {
  bool const scale_is_finite = !softmax_scale || std::isfinite(*softmax_scale);
  return scale_is_finite && softcap >= 0.0 && std::isfinite(softcap);
}

// (h_q), or (b, h_q).
inline bool takes_alibi(OptionalTensor const& slopes, Tensor const& q, int64_t b) {
  if (!slopes) return true;
  int64_t const dim = slopes->dim();
  if (slopes->scalar_type() != ScalarType::Float || !on_device_of(*slopes, q)) return false;
  if ((dim != 1 && dim != 2) || !is_in_columns(*slopes)) return false;
  return slopes->size(dim - 1) == q.size(q.dim() - 2) && (dim == 1 || slopes->size(0) == b);
}

// int32, one entry after the other.
inline bool is_index(Tensor const& x, Tensor const& q, int64_t dim) {
  return x.scalar_type() == ScalarType::Int && x.dim() == dim && on_device_of(x, q) &&
         is_in_columns(x);
}

inline bool takes_page(int64_t page_size, Tensor const& q) {
  return page_size % (q.is_cpu() ? 1 : 16) == 0;
}

inline int32_t const* entries(Tensor const& x) { return static_cast<int32_t const*>(x.data_ptr()); }

// Offsets of b sequences of at most `longest` rows; into a pack of `total` rows unless that is
// below zero.
inline bool takes_offsets(int32_t const* offsets, int64_t b, int64_t total, int64_t longest) {
  for (int64_t i = 0; i < b; ++i) {
    int64_t const length = int64_t{offsets[i + 1]} - offsets[i];
    if (length < 0 || length > longest) return false;
  }
  return total < 0 || (offsets[0] == 0 && offsets[b] <= total);
}

// The pages of `keys` keys exist.
inline bool takes_pages(int32_t const* row, int64_t keys, int64_t page_size, int64_t num_pages) {
  for (int64_t i = 0; i < (keys + page_size - 1) / page_size; ++i)
    if (row[i] < 0 || row[i] >= num_pages) return false;
  return true;
}

inline bool takes_dense(Tensor const& q, Tensor const& k, Tensor const& v) {
  return takes_qkv(q, k, v, 4, 4) && k.size(0) == q.size(0);
}

inline bool takes_packed(Tensor const& q, Tensor const& k, Tensor const& v,
                         Tensor const& cu_seqlens_q, Tensor const& cu_seqlens_k,
                         int64_t max_seqlen_q, int64_t max_seqlen_k,
                         OptionalTensor const& block_table) {
  if (!takes_qkv(q, k, v, 3, block_table ? 4 : 3) || max_seqlen_q < 0 || max_seqlen_k < 0)
    return false;
  if (!is_index(cu_seqlens_q, q, 1) || !is_index(cu_seqlens_k, q, 1)) return false;
  int64_t const b = cu_seqlens_q.size(0) - 1;
  if (b < 1 || cu_seqlens_k.size(0) != b + 1) return false;
  if (block_table &&
      (!is_index(*block_table, q, 2) || block_table->size(0) != b || !takes_page(k.size(1), q)))
    return false;
  if (!q.is_cpu()) return true;
  int32_t const *const queries = entries(cu_seqlens_q), *const keys = entries(cu_seqlens_k);
  if (!takes_offsets(queries, b, q.size(0), max_seqlen_q)) return false;
  if (!takes_offsets(keys, b, block_table ? -1 : k.size(0), max_seqlen_k)) return false;
  if (!block_table) return true;
  for (int64_t i = 0; i < b; ++i) {
    int64_t const length = int64_t{keys[i + 1]} - keys[i];
    int32_t const* const row = entries(*block_table) + i * block_table->stride(0);
    if (length > block_table->size(1) * k.size(1)) return false;
    if (!takes_pages(row, length, k.size(1), k.size(0))) return false;
  }
  return true;
}

}  // namespace fa::torch_side
