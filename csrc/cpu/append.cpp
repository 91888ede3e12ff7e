// New keys and values into a cache, and the rotation of queries and new keys.
//
// The rotation rounds each product and each sum to fp32 on its own, which is what PyTorch's
// elementwise arithmetic does: a key rotated here and one rotated by flash_attn.layers.rotary have
// the same bytes.
#include <cstring>

#include "csrc/core/sequence.h"
#include "csrc/cpu/convert.h"
#include "csrc/cpu/family.h"
#include "csrc/cpu/tasks.h"

namespace fa::cpu {
namespace {

// dst (d) = src (d) with its first rotary_dim columns turned by the angle of `position`.
void rotate_row(AppendParams const& p, char* dst, char const* src, int64_t position) {
  std::memcpy(dst, src, p.d * element_bytes(p.dtype));
  int64_t const half = p.rotary_dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    int64_t const first = p.interleaved ? 2 * i : i, second = p.interleaved ? 2 * i + 1 : i + half;
    float const cos = load_scalar(p.dtype, p.cos, position * half + i);
    float const sin = load_scalar(p.dtype, p.sin, position * half + i);
    float const x = load_scalar(p.dtype, src, first), y = load_scalar(p.dtype, src, second);
    float const x_cos = x * cos, y_sin = y * sin, x_sin = x * sin, y_cos = y * cos;
    store_scalar(p.dtype, dst, first, x_cos - y_sin);
    store_scalar(p.dtype, dst, second, x_sin + y_cos);
  }
}

char* row_address(RowTensor const& t, int64_t bytes, int64_t batch, int64_t row, int64_t head) {
  return static_cast<char*>(t.data) +
         (batch * t.batch_stride + row * t.row_stride + head * t.head_stride) * bytes;
}

// New position i of sequence b: its keys (rotated) and values, all heads.
void append_position(AppendParams const& p, int64_t b, int64_t i) {
  int64_t const bytes = element_bytes(p.dtype), position = p.start_of(b) + i;
  int64_t cache_batch = p.cache_batch_idx ? p.cache_batch_idx[b] : b, cache_row = position;
  if (p.block_table) {
    cache_batch = page_of(p.block_table + b * p.block_table_stride, p.page_size, position);
    cache_row = row_in_page(p.page_size, position);
  }
  for (int64_t h = 0; h < p.h_kv; ++h) {
    char* const k = row_address(p.k_cache, bytes, cache_batch, cache_row, h);
    char const* const k_new = row_address(p.k_new, bytes, b, i, h);
    if (p.cos) {
      rotate_row(p, k, k_new, position);
    } else {
      std::memcpy(k, k_new, p.d * bytes);
    }
    std::memcpy(row_address(p.v_cache, bytes, cache_batch, cache_row, h),
                row_address(p.v_new, bytes, b, i, h), p.d_v * bytes);
  }
}

void rotate_query(AppendParams const& p, int64_t b, int64_t i) {
  int64_t const bytes = element_bytes(p.dtype);
  int64_t const position = p.start_of(b) + (p.rotate_by_position ? i : 0);
  for (int64_t h = 0; h < p.h_q; ++h) {
    rotate_row(p, row_address(p.q_rotated, bytes, b, i, h), row_address(p.q, bytes, b, i, h),
               position);
  }
}

}  // namespace

void append(AppendParams const& p, Machine const& machine) {
  int64_t const num_new = p.b * p.s_new, num_queries = p.cos ? p.b * p.s_q : 0;
  run_tasks(machine, num_new + num_queries, 0, [&](int64_t i, float*) {
    if (i < num_new) {
      append_position(p, i / p.s_new, i % p.s_new);
    } else {
      rotate_query(p, (i - num_new) / p.s_q, (i - num_new) % p.s_q);
    }
  });
}

}  // namespace fa::cpu
