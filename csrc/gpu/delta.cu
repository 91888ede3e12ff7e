// delta = sum over columns of dout * out, of each row: what the softmax takes off dP
// (gpu/score_gradient.cuh).
//
// Memory bounds the kernel, so a thread loads the chunks of several heads before it computes.
#include "csrc/gpu/backward_launch.h"
#include "csrc/gpu/chunk.cuh"
#include "csrc/gpu/convert.cuh"
#include "csrc/gpu/faults.h"
#include "csrc/gpu/launch.cuh"
#include "csrc/gpu/score_gradient.cuh"

namespace fa::gpu {
namespace {

constexpr int kLanes = 8, kThreads = 128, kQueries = kThreads / kLanes, kHeadsAtOnce = 4;

// Eight columns, from `column` on, of a row of d; what lies beyond is zero.
__device__ __forceinline__ uint4 load_columns(char const* row, int column, int d, bool aligned) {
  auto const* const from = reinterpret_cast<uint16_t const*>(row) + column;
  return aligned ? *reinterpret_cast<uint4 const*>(from) : chunk_by_elements(from, d - column);
}

template <class Element>
__device__ __forceinline__ float add_products(float sum, uint4 const& x, uint4 const& y) {
  auto const* const left = reinterpret_cast<Element const*>(&x);
  auto const* const right = reinterpret_cast<Element const*>(&y);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) sum = fmaf(to_float(left[i]), to_float(right[i]), sum);
  return sum;
}

// Blocks of kQueries queries, in a pack by its tokens.
FA_HOST_DEVICE PackTiles query_blocks(LayoutParams const& layout) {
  return query_tiles(layout, 1, kQueries);
}

// delta of all rows, and dQ = 0 of the rows that see nothing: no tile of keys comes by for them.
//   Grid    a thread block for each kQueries queries of a sequence, all heads; one more, which
//           tells of faults in index tensors.
//   Threads eight lanes share a row.
//   Order   lane i sums the chunks i, i + 8, ... of eight columns, ascending; the sums of the lanes
//           meet in a fixed tree.
template <class Element>
__global__ __launch_bounds__(kThreads) void delta_kernel(
    __grid_constant__ BackwardLaunch const launch) {
  BackwardParams const& call = launch.call;
  LayoutParams const& layout = call.layout;
  int const block = static_cast<int>(blockIdx.x);
  if (block == launch.delta_blocks) return report_all(layout);
  // Tiles of one sequence: WorkItem::head counts sequences.
  WorkItem const work = launch.slots > 0 ? query_blocks(layout).at(block, 0, 1)
                                         : WorkItem{block / launch.tiles, block % launch.tiles};
  int64_t const batch = work.head;
  Sequence const s = sequence_of(layout, batch);
  int const lane = threadIdx.x % kLanes;
  int const d = static_cast<int>(layout.d), d_v = static_cast<int>(layout.d_v);
  int64_t const query = int64_t{work.rank} * kQueries + threadIdx.x / kLanes;
  unsigned const row_lanes = 0xffu << (threadIdx.x % 32 / kLanes * kLanes);
  if (query >= s.s_q) return;
  contract::KeyRange const seen =
      contract::visible_keys(query, s.s_q, s.s_k, call.score.window_left, call.score.window_right);
  bool const sees_nothing = seen.begin >= seen.end;
  char const* const out = query_row(call.out, s, query, 0, 2);
  char const* const dout = query_row(call.dout, s, query, 0, 2);
  float* const delta = call.delta + delta_base(call, s, batch) + query;
  int const num_heads = static_cast<int>(layout.h_q);
  for (int first = 0; first < num_heads; first += kHeadsAtOnce) {
    float sum[kHeadsAtOnce] = {};
    for (int column = lane * kChunk; column < d_v; column += kLanes * kChunk) {
      uint4 x[kHeadsAtOnce], y[kHeadsAtOnce];
#pragma unroll
      for (int i = 0; i < kHeadsAtOnce; ++i) {
        int64_t const head = min(first + i, num_heads - 1);
        x[i] = load_columns(out + head * call.out.head_stride * 2, column, d_v, launch.aligned);
        y[i] = load_columns(dout + head * call.dout.head_stride * 2, column, d_v, launch.aligned);
      }
#pragma unroll
      for (int i = 0; i < kHeadsAtOnce; ++i) sum[i] = add_products<Element>(sum[i], x[i], y[i]);
    }
#pragma unroll
    for (int i = 0; i < kHeadsAtOnce; ++i) {
      for (int step = kLanes / 2; step > 0; step /= 2)
        sum[i] += __shfl_xor_sync(row_lanes, sum[i], step);
      if (lane == 0 && first + i < num_heads) delta[(first + i) * call.delta_head_stride] = sum[i];
    }
  }
  if (!sees_nothing) return;
  for (int head = 0; head < num_heads; ++head) {
    auto* const dq = reinterpret_cast<uint16_t*>(query_row(call.dq, s, query, head, 2));
    for (int i = lane; i < d; i += kLanes) dq[i] = 0;
  }
}

}  // namespace

void launch_delta(BackwardLaunch const& given, void* stream) {
  BackwardLaunch launch = given;
  LayoutParams const& layout = launch.call.layout;
  int64_t const blocks = count_tiles(launch, query_blocks(layout), layout.s_q, 1);
  if (blocks == 0 || layout.h_q == 0) return;
  launch.delta_blocks = static_cast<int>(blocks);
  int64_t const all = blocks + (has_indices(layout) ? 1 : 0);
  if (launch.call.dtype == DType::kFloat16) {
    launch_kernel<delta_kernel<__half>>(launch, all, kThreads, 0, stream);
  } else {
    launch_kernel<delta_kernel<__nv_bfloat16>>(launch, all, kThreads, 0, stream);
  }
}

}  // namespace fa::gpu
