// The kernels of a forward pass in their order on a stream.
#include "csrc/gpu/errors.cuh"
#include "csrc/gpu/features.h"
#include "csrc/gpu/forward_launch.h"
#include "csrc/gpu/launch.cuh"
#include "csrc/gpu/pack_tiles.h"
#include "csrc/gpu/uncovered_rows.cuh"

namespace fa::gpu {
namespace {

constexpr int kThreads = 128, kUncoveredParts = 32;

// The list of a pack's work, [slots, h_kv].
//   Grid    a thread for each entry.
//   Order   late slots first; which thread block takes a tile cannot reach a bit.
__global__ __launch_bounds__(kThreads) void list_work_kernel(PackTiles const pack, int64_t slots,
                                                             int h_kv, WorkItem* list) {
  int64_t const work = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (work < slots * h_kv)
    list[work] = pack.at(slots - 1 - work / h_kv, static_cast<int>(work % h_kv), h_kv);
}

// What no tile writes, for a call without a tile or with a list.
//   Grid    kUncoveredParts thread blocks for each key head.
//   Order   none: zeros and infinities are stored.
__global__ __launch_bounds__(kThreads) void uncovered_rows_kernel(
    __grid_constant__ ForwardLaunch const launch) {
  int const h_kv = static_cast<int>(launch.call.layout.h_kv), block = static_cast<int>(blockIdx.x);
  write_uncovered_rows(launch, block % h_kv, block / h_kv, kUncoveredParts);
}

void list_work(ForwardLaunch& launch, WorkItem* list, cudaStream_t stream) {
  ForwardPlan const& plan = launch.plan;
  LayoutParams const& layout = launch.call.layout;
  auto const blocks = static_cast<unsigned>((plan.work + kThreads - 1) / kThreads);
  list_work_kernel<<<blocks, kThreads, 0, stream>>>(
      query_tiles(layout, launch.group.by, plan.tile_rows), plan.slots,
      static_cast<int>(layout.h_kv), list);
  check(cudaGetLastError());
  launch.work_list = list;
}

// Where partials lie that a second kernel folds.
PartialBuffers partials_in(float* scratch, ForwardPlan const& plan, LayoutParams const& layout) {
  PartialBuffers partials;
  partials.rows = layout.lse_rows();
  partials.out = scratch;
  partials.max_log2 = scratch + plan.num_segments * partials.rows * layout.d_v;
  partials.sum = partials.max_log2 + plan.num_segments * partials.rows;
  return partials;
}

}  // namespace

void run_forward(ForwardParams const& call, ForwardPlan const& plan, void* scratch, void* stream,
                 void (*kernel)(ForwardLaunch const&, void* stream)) {
  auto const on = static_cast<cudaStream_t>(stream);
  Scratch const need = plan.scratch();
  float* const list = need.floats_in(scratch);
  float* const of_segments = list + plan.list_floats;
  ForwardLaunch launch{.call = call,
                       .scale = ScoreScale::of(call.score),
                       .plan = plan,
                       .group = Divisor::of(call.layout.h_q / call.layout.h_kv),
                       .pieces = Divisor::of(plan.pieces),
                       .aligned = rows_are_aligned(call)};
  if (plan.slots > 0) {
    list_work(launch, reinterpret_cast<WorkItem*>(list), on);
  } else if (plan.tiles > 0) {
    launch.tiles = Divisor::of(plan.tiles);
  }
  if (plan.closed == Closed::kHandedOut) launch.call.lse = nullptr;  // nothing else is written
  if (plan.work == 0 || launch.work_list) {
    auto const blocks = static_cast<unsigned>(call.layout.h_kv * kUncoveredParts);
    uncovered_rows_kernel<<<blocks, kThreads, 0, on>>>(launch);
    check(cudaGetLastError());
  }
  if (plan.work == 0) return;
  if (plan.closed == Closed::kFoldedLater) {
    launch.call.partials = partials_in(of_segments, plan, call.layout);
  } else if (plan.closed == Closed::kFolded) {
    launch.folds = reinterpret_cast<float4*>(of_segments);
  }
  launch.next_work = need.counters_in(scratch);
  zero_counters(need, scratch, stream);
  kernel(launch, stream);
  if (plan.closed == Closed::kFoldedLater) launch_fold(launch, on);
}

}  // namespace fa::gpu
