// Where one sequence of a batch lies: the only place that knows dense, packed, paged and cached
// layouts.
#pragma once

#include <cstdint>

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

static inline Sequence sequence_of(LayoutParams const& layout, int64_t batch) {
  Sequence s;
  s.query_batch = batch;
  s.key_batch = layout.cache_batch_idx ? layout.cache_batch_idx[batch] : batch;
  if (layout.cu_seqlens_q) {
    s.first_query = layout.cu_seqlens_q[batch];
    s.s_q = layout.cu_seqlens_q[batch + 1] - s.first_query;
    s.lse_base = s.first_query;
  } else {
    s.s_q = layout.s_q;
    s.lse_base = batch * layout.lse_batch_stride;
  }
  bool const packed_keys = layout.cu_seqlens_k && !layout.block_table;
  if (packed_keys) s.first_key = layout.cu_seqlens_k[batch];
  if (layout.seqused_k) {
    s.s_k = layout.seqused_k[batch];
  } else if (layout.cu_seqlens_k) {
    s.s_k = layout.cu_seqlens_k[batch + 1] - layout.cu_seqlens_k[batch];
  } else {
    s.s_k = layout.s_k;
  }
  if (layout.leftpad_k) {
    s.first_key += layout.leftpad_k[batch];
    s.s_k -= layout.leftpad_k[batch];
  }
  if (s.s_k < 0) s.s_k = 0;
  return s;
}

static inline int64_t element_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Address of (sequence, query, head) in a tensor laid out as q.
static inline char* query_row(RowTensor const& t, Sequence const& s, int64_t query, int64_t head,
                              int64_t bytes) {
  int64_t const row = s.first_query + query;
  return static_cast<char*>(t.data) +
         (s.query_batch * t.batch_stride + row * t.row_stride + head * t.head_stride) * bytes;
}

// The keys (or values) of one sequence and one head, whatever holds them.
struct KeyRows {
  char* base = nullptr;  // head's column of the batch row, or of page 0
  int64_t row_bytes = 0;
  int64_t first_key = 0;
  int32_t const* pages = nullptr;  // this sequence's row of the block table, null: not paged
  int64_t page_size = 1, page_bytes = 0;

  char* row(int64_t key) const {
    int64_t const position = first_key + key;
    if (!pages) return base + position * row_bytes;
    return base + pages[position / page_size] * page_bytes + (position % page_size) * row_bytes;
  }
  // Whether rows [begin, end) lie row_bytes apart.
  bool evenly_spaced(int64_t begin, int64_t end) const {
    return !pages || end <= begin ||
           (first_key + begin) / page_size == (first_key + end - 1) / page_size;
  }
};

static inline KeyRows key_rows(RowTensor const& t, LayoutParams const& layout, Sequence const& s,
                               int64_t head_kv, int64_t bytes) {
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
