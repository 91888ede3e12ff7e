// Where one sequence of a batch lies: the only place that knows dense, packed, paged and cached
// layouts.
#pragma once

#include <cstdint>

#include "csrc/core/host_device.h"
#include "csrc/core/params.h"

namespace fa {

struct Sequence {
  int64_t s_q = 0, s_k = 0;  // this sequence's own lengths, left padding not counted
  int64_t first_query = 0;   // row of q, out
  int64_t first_key = 0;     // row of k, v (0 for paged; left padding skipped)
  int64_t query_batch = 0;   // multiplies q's batch stride
  int64_t key_batch = 0;     // multiplies k's batch stride, or row of the block table
  int64_t lse_base = 0;      // index of (head 0, query 0) in lse
};

// x, or the nearer end of [0, end].
FA_HOST_DEVICE static inline int64_t clamped(int64_t x, int64_t end) {
  return x < 0 ? 0 : x < end ? x : end;
}

// Index tensors may lie on a GPU, where nobody has checked them: whatever they say, the sequence
// lies inside the tensors and is no longer than the call's largest.
FA_HOST_DEVICE static inline Sequence sequence_of(LayoutParams const& layout, int64_t batch) {
  Sequence s;
  s.query_batch = batch;
  s.key_batch = layout.cache_batch_idx ? layout.cache_batch_idx[batch] : batch;
  s.s_q = layout.s_q;
  s.lse_base = batch * layout.lse_batch_stride;
  if (layout.cu_seqlens_q) {
    s.first_query = clamped(layout.cu_seqlens_q[batch], layout.total_q);
    s.s_q = clamped(layout.cu_seqlens_q[batch + 1] - s.first_query, layout.total_q - s.first_query);
    if (s.s_q > layout.s_q) s.s_q = layout.s_q;
    s.lse_base = s.first_query;
  }
  int64_t begin = 0, length = layout.s_k;
  if (layout.cu_seqlens_k) {
    if (!layout.block_table) begin = layout.cu_seqlens_k[batch];
    length = layout.cu_seqlens_k[batch + 1] - layout.cu_seqlens_k[batch];
  }
  if (layout.seqused_k) length = layout.seqused_k[batch] + layout.new_keys;
  if (layout.leftpad_k) {
    int64_t const padding = clamped(layout.leftpad_k[batch], length);
    begin += padding, length -= padding;
  }
  s.first_key = clamped(begin, layout.total_k);
  s.s_k = clamped(length, layout.total_k - s.first_key);
  if (s.s_k > layout.s_k) s.s_k = layout.s_k;
  bool const no_such_row = s.key_batch < 0 || (s.key_batch >= layout.cache_rows &&
                                               !layout.cu_seqlens_k && !layout.block_table);
  if (no_such_row) s.key_batch = 0, s.s_k = 0;
  return s;
}

FA_HOST_DEVICE static inline int64_t element_bytes(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 2;
}

// Address of (sequence, query, head) in a tensor laid out as q.
FA_HOST_DEVICE static inline char* query_row(RowTensor const& t, Sequence const& s, int64_t query,
                                             int64_t head, int64_t bytes) {
  int64_t const row = s.first_query + query;
  return static_cast<char*>(t.data) +
         (s.query_batch * t.batch_stride + row * t.row_stride + head * t.head_stride) * bytes;
}

// Where position `position` of a sequence lies in a paged cache: in this page, which can be any
// number where nobody has read the table on the host, and there in this row.
template <class Int>
FA_HOST_DEVICE static inline Int page_of(int32_t const* pages, Int page_size, Int position) {
  return pages[position / page_size];
}
template <class Int>
FA_HOST_DEVICE static inline Int row_in_page(Int page_size, Int position) {
  return position % page_size;
}

// The keys (or values) of one sequence and one head, whatever holds them.
struct KeyRows {
  char* base = nullptr;  // head's column of the batch row, or of page 0
  int64_t row_bytes = 0;
  int64_t first_key = 0;
  int32_t const* pages = nullptr;  // this sequence's row of the block table, null: not paged
  int64_t page_size = 1, page_bytes = 0;

  FA_MEMBER char* row(int64_t key) const {
    int64_t const position = first_key + key;
    if (!pages) return base + position * row_bytes;
    return base + page_of(pages, page_size, position) * page_bytes +
           row_in_page(page_size, position) * row_bytes;
  }
  // Whether rows [begin, end) lie row_bytes apart.
  FA_MEMBER bool evenly_spaced(int64_t begin, int64_t end) const {
    return !pages || end <= begin ||
           (first_key + begin) / page_size == (first_key + end - 1) / page_size;
  }
};

FA_HOST_DEVICE static inline KeyRows key_rows(RowTensor const& t, LayoutParams const& layout,
                                              Sequence const& s, int64_t head_kv, int64_t bytes) {
  KeyRows rows;
  rows.base = static_cast<char*>(t.data) + head_kv * t.head_stride * bytes;
  rows.row_bytes = t.row_stride * bytes;
  rows.first_key = s.first_key;
  if (layout.block_table) {
    rows.pages = layout.block_table + s.key_batch * layout.block_table_stride;
    rows.page_size = layout.page_size;
    rows.page_bytes = t.batch_stride * bytes;
  } else {
    rows.base += s.key_batch * t.batch_stride * bytes;
  }
  return rows;
}

}  // namespace fa
