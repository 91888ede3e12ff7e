// New keys (rotated) and values into a cache, and the rotation of queries.
//
// Nobody has read the index tensors on the host, so their entries are checked here: a row outside
// the cache is not written, and the fault is told.
#include "csrc/gpu/append.h"
#include "csrc/gpu/convert.cuh"
#include "csrc/gpu/errors.cuh"
#include "csrc/gpu/faults.h"

namespace fa::gpu {
namespace {

constexpr int kWarps = 4;

template <class Element>
__device__ Element* row_address(RowTensor const& t, int64_t batch, int64_t row, int64_t head) {
  return static_cast<Element*>(t.data) + batch * t.batch_stride + row * t.row_stride +
         head * t.head_stride;
}

// to (d) = from, turned by `position` in its first rotary_dim columns: (x cos - y sin, x sin + y
// cos), each product and each sum rounded to fp32, the result once more.
template <class Element>
__device__ void rotate_row(AppendParams const& p, Element* to, Element const* from,
                           int64_t position, int lane) {
  int64_t const half = p.rotary_dim / 2;
  Element const* const cos = static_cast<Element const*>(p.cos) + position * half;
  Element const* const sin = static_cast<Element const*>(p.sin) + position * half;
  for (int64_t i = lane; i < half; i += 32) {
    int64_t const first = p.interleaved ? 2 * i : i, second = p.interleaved ? 2 * i + 1 : i + half;
    float const c = to_float(cos[i]), s = to_float(sin[i]);
    float const x = to_float(from[first]), y = to_float(from[second]);
    to[first] = round_to<Element>(x * c - y * s);
    to[second] = round_to<Element>(x * s + y * c);
  }
  for (int64_t i = p.rotary_dim + lane; i < p.d; i += 32) to[i] = from[i];
}

template <class Element>
__device__ void append_row(AppendParams const& p, int64_t index, int lane) {
  int64_t const head = index % p.h_kv, i = index / p.h_kv % p.s_new, b = index / p.h_kv / p.s_new;
  int64_t const position = p.start_of(b) + i;
  auto const fault = [&](Faulty what, int64_t entry, int64_t value) {
    if (lane == 0) report(p.faults, {what, Caller::kCache, entry, value});
  };
  if (position < 0 || position >= p.capacity) return fault(Faulty::kAppend, b, position);
  int64_t cache_batch = p.cache_batch_idx ? p.cache_batch_idx[b] : b, cache_row = position;
  int64_t entry = b;  // of the index tensor that says where
  if (p.block_table) {
    entry = b * p.block_table_stride + position / p.page_size;
    cache_batch = page_of(p.block_table + b * p.block_table_stride, p.page_size, position);
    cache_row = row_in_page(p.page_size, position);
  }
  if (cache_batch < 0 || cache_batch >= p.cache_rows)
    return fault(p.block_table ? Faulty::kBlockTable : Faulty::kCacheBatchIdx, entry, cache_batch);
  Element* const k = row_address<Element>(p.k_cache, cache_batch, cache_row, head);
  Element* const v = row_address<Element>(p.v_cache, cache_batch, cache_row, head);
  Element const* const k_new = row_address<Element>(p.k_new, b, i, head);
  Element const* const v_new = row_address<Element>(p.v_new, b, i, head);
  if (p.cos) {
    rotate_row(p, k, k_new, position, lane);
  } else {
    for (int64_t c = lane; c < p.d; c += 32) k[c] = k_new[c];
  }
  for (int64_t c = lane; c < p.d_v; c += 32) v[c] = v_new[c];
}

template <class Element>
__device__ void rotate_query(AppendParams const& p, int64_t index, int lane) {
  int64_t const head = index % p.h_q, i = index / p.h_q % p.s_q, b = index / p.h_q / p.s_q;
  int64_t position = p.start_of(b) + (p.rotate_by_position ? i : 0);
  if (position < 0 || position >= p.rotary_rows) {
    if (lane == 0) report(p.faults, {Faulty::kRotary, Caller::kCache, b, position});
    position = position < 0 ? 0 : p.rotary_rows - 1;
  }
  rotate_row(p, row_address<Element>(p.q_rotated, b, i, head),
             row_address<Element>(p.q, b, i, head), position, lane);
}

//   Grid    a warp for each new row of a key head; with a rotation also one for each query row.
//   Order   none: each row is copied, or rotated, by itself.
//   Needs   16-bit elements. Index tensors may hold anything.
template <class Element>
__global__ __launch_bounds__(32 * kWarps) void append_kernel(
    __grid_constant__ AppendParams const p) {
  int const lane = threadIdx.x % 32;
  int64_t const row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  int64_t const num_new = p.b * p.s_new * p.h_kv, num_queries = p.cos ? p.b * p.s_q * p.h_q : 0;
  if (row < num_new) {
    append_row<Element>(p, row, lane);
  } else if (row < num_new + num_queries) {
    rotate_query<Element>(p, row - num_new, lane);
  }
}

}  // namespace

void append(AppendParams const& p, void* stream) {
  int64_t const rows = p.b * p.s_new * p.h_kv + (p.cos ? p.b * p.s_q * p.h_q : 0);
  if (rows == 0) return;
  auto const kernel =
      p.dtype == DType::kFloat16 ? append_kernel<__half> : append_kernel<__nv_bfloat16>;
  kernel<<<static_cast<unsigned>((rows + kWarps - 1) / kWarps), 32 * kWarps, 0,
           static_cast<cudaStream_t>(stream)>>>(p);
  check(cudaGetLastError());
}

}  // namespace fa::gpu
