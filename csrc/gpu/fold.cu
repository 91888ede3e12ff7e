// Folds the partials of every row in ascending order, and finishes the row.
//
// The kernel runs for a few microseconds. Its instructions come from memory, so short code is fast,
// and so are branches of which the compiler knows that all threads take the same one.
#include "csrc/core/segmentation.h"
#include "csrc/gpu/convert.cuh"
#include "csrc/gpu/errors.cuh"
#include "csrc/gpu/forward_launch.h"
#include "csrc/gpu/softmax.cuh"

namespace fa::gpu {
namespace {

constexpr int kAtOnce = 32;  // segments whose loads are under way together
constexpr int kMaxThreads = 256 + 32;

// The second kernel of a forward pass whose segments ran side by side.
//   Grid    a thread block for each row.
//   Threads one for each column of out, and one warp more, which has the log-sum-exp.
//   Order   segments ascend (contract.h).
//   Needs   partials of every segment of which the row sees a key; d_v up to 256.
template <class Element>
__global__ __launch_bounds__(kMaxThreads) void fold_kernel(
    __grid_constant__ ForwardLaunch const launch) {
  ForwardParams const& call = launch.call;
  PartialBuffers const& partials = call.partials;
  int const lane = threadIdx.x % 32, column = static_cast<int>(threadIdx.x);
  int const d_v = static_cast<int>(call.layout.d_v), h_q = static_cast<int>(call.layout.h_q);
  int const s_q = static_cast<int>(call.layout.s_q), index = static_cast<int>(blockIdx.x);
  // Segments run side by side only where tiles are few, so 32 bits count the rows.
  int const head = index % h_q, query = index / h_q % s_q, batch = index / h_q / s_q;
  Sequence const sequence = sequence_of(call.layout, batch);
  int64_t const row = sequence.lse_base + head * call.layout.lse_head_stride + query;

  Segmentation const segmentation = launch.plan.segmentation;
  contract::KeyRange const seen = contract::visible_keys(
      query, sequence.s_q, sequence.s_k, call.score.window_left, call.score.window_right);
  // Nobody has written the segments in which the row sees nothing: they would not change it.
  bool const sees = seen.begin < seen.end;
  int const first = sees ? static_cast<int>(segmentation.of(seen.begin)) : 0;
  int const end = sees ? static_cast<int>(segmentation.of(seen.end - 1)) + 1 : 0;

  float o = 0.0f, l = 0.0f, m = -INFINITY;
  // Every thread waits, also one with nothing to fold: a grid in which nobody waits can end before
  // the first kernel does.
  wait_for_prerequisite();
  if (query >= sequence.s_q) return;
  for (int begin = first; begin < end; begin += kAtOnce) {
    int const count = min(end - begin, kAtOnce);
    int64_t const mine = (begin + lane) * partials.rows + row;  // a lane has one segment's
    // Behind the last segment there is nothing to add.
    float const lane_m = lane < count ? partials.max_log2[mine] : -INFINITY;
    float const lane_l = lane < count ? partials.sum[mine] : 0.0f;
    float part[kAtOnce];
    float const* from = partials.out + (begin * partials.rows + row) * d_v + column;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      part[i] = i < count && column < d_v ? *from : 0.0f;
      from += partials.rows * d_v;
    }
    // The fold's reference goes from segment to segment. Each lane keeps the one that its own
    // segment meets.
    float met = -INFINITY;
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      if (lane == i) met = m;
      m = contract::fold_reference(m, __shfl_sync(kFullWarp, lane_m, i));
    }
    contract::FoldWeights const own = contract::fold_weights(met, lane_m);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {  // ascending
      if (i % 8 == 0 && i >= count) break;
      contract::FoldWeights const weights{0.0f, __shfl_sync(kFullWarp, own.fold, i),
                                          __shfl_sync(kFullWarp, own.part, i)};
      o = contract::add_part(weights, o, part[i]);
      l = contract::add_part(weights, l, __shfl_sync(kFullWarp, lane_l, i));
    }
  }

  Element* const out =
      reinterpret_cast<Element*>(query_row(call.out, sequence, query, head, sizeof(Element)));
  if (column < d_v) out[column] = round_to<Element>(o * contract::inverse_of_sum(l) + 0.0f);
  if (column + 32 == blockDim.x) call.lse[row] = contract::log_sum_exp(m, l);
}

}  // namespace

void launch_fold(ForwardLaunch const& launch, void* stream) {
  LayoutParams const& layout = launch.call.layout;
  bool const half = launch.call.dtype == DType::kFloat16;
  auto const kernel = half ? fold_kernel<__half> : fold_kernel<__nv_bfloat16>;
  // Programmatic dependent launch: its thread blocks are resident already when the pieces end.
  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(layout.b * layout.s_q * layout.h_q);
  config.blockDim = static_cast<unsigned>((layout.d_v + 31) / 32 * 32 + 32);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &dependent;
  config.numAttrs = launch.plan.overlaps_fold ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, launch));
}

}  // namespace fa::gpu
