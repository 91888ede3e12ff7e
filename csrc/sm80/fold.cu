// Folds the partials of every row in ascending order and finishes it. A thread block has a row: a
// thread each column, and a warp more that has the log-sum-exp.
//
// The kernel runs for a few microseconds, in which every instruction comes from memory: short code
// is fast, and so are branches that the compiler knows to be the same for all threads.
#include "csrc/core/segmentation.h"
#include "csrc/cuda/convert.cuh"
#include "csrc/cuda/errors.cuh"
#include "csrc/sm80/fold.h"
#include "csrc/sm80/forward_scores.cuh"

namespace fa::sm80 {
namespace {

constexpr int kAtOnce = 32;  // segments whose loads are under way together
constexpr int kMaxThreads = 256 + 32;

template <class Element>
__global__ __launch_bounds__(kMaxThreads) void fold_kernel(
    __grid_constant__ ForwardLaunch const launch) {
  ForwardParams const& call = launch.call;
  PartialBuffers const& partials = call.partials;
  int const lane = threadIdx.x % 32, column = static_cast<int>(threadIdx.x);
  int const d = static_cast<int>(call.layout.d), h_q = static_cast<int>(call.layout.h_q);
  int const s_q = static_cast<int>(call.layout.s_q), index = static_cast<int>(blockIdx.x);
  // Pieces run side by side where tiles are few: 32 bits count their rows.
  int const head = index % h_q, query = index / h_q % s_q, batch = index / h_q / s_q;
  Sequence const sequence = sequence_of(call.layout, batch);
  int64_t const row = sequence.lse_base + head * call.layout.lse_head_stride + query;

  Segmentation const segmentation = launch.plan.segmentation;
  contract::KeyRange const seen = contract::visible_keys(
      query, sequence.s_q, sequence.s_k, call.score.window_left, call.score.window_right);
  // Segments in which the row sees nothing would leave it as it is; nobody wrote them.
  bool const sees = seen.begin < seen.end;
  int const first = sees ? static_cast<int>(segmentation.of(seen.begin)) : 0;
  int const end = sees ? static_cast<int>(segmentation.of(seen.end - 1)) + 1 : 0;

  float o = 0.0f, l = 0.0f, m = -INFINITY;
  // Also where there is nothing to fold: a grid in which nobody waits may end before the pieces do.
  wait_for_leader();
  if (query >= sequence.s_q) return;
  for (int begin = first; begin < end; begin += kAtOnce) {
    int const count = min(end - begin, kAtOnce);
    int64_t const mine = (begin + lane) * partials.rows + row;  // a reference and a sum a lane
    // What lies behind the last segment adds nothing.
    float const lane_m = lane < count ? partials.max_log2[mine] : -INFINITY;
    float const lane_l = lane < count ? partials.sum[mine] : 0.0f;
    float part[kAtOnce];
    float const* from = partials.out + (begin * partials.rows + row) * d + column;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      part[i] = i < count && column < d ? *from : 0.0f;
      from += partials.rows * d;
    }
    // The references ascend one after the other; a lane keeps what its own segment meets.
    float met = -INFINITY;
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      if (lane == i) met = m;
      m = contract::fold_reference(m, __shfl_sync(kFullWarp, lane_m, i));
    }
    FoldedRow const own = FoldedRow::of(met, 0.0f, lane_m, 0.0f);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {  // ascending
      if (i % 8 == 0 && i >= count) break;
      FoldedRow const folded{0.0f, 0.0f, __shfl_sync(kFullWarp, own.before, i),
                             __shfl_sync(kFullWarp, own.now, i)};
      o = folded(o, part[i]);
      l = folded(l, __shfl_sync(kFullWarp, lane_l, i));
    }
  }

  Element* const out =
      reinterpret_cast<Element*>(query_row(call.out, sequence, query, head, sizeof(Element)));
  if (column < d) out[column] = round_to<Element>(o * contract::inverse_of_sum(l) + 0.0f);
  if (column + 32 == blockDim.x) call.lse[row] = contract::log_sum_exp(m, l);
}

}  // namespace

void launch_fold(ForwardLaunch const& launch, cudaStream_t stream) {
  LayoutParams const& layout = launch.call.layout;
  bool const half = launch.call.dtype == DType::kFloat16;
  auto const kernel = half ? fold_kernel<__half> : fold_kernel<__nv_bfloat16>;
  // Its thread blocks wait on their places when the pieces end.
  cudaLaunchAttribute follows{};
  follows.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  follows.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(layout.b * layout.s_q * layout.h_q);
  config.blockDim = static_cast<unsigned>((layout.d + 31) / 32 * 32 + 32);
  config.stream = stream;
  config.attrs = &follows;
  config.numAttrs = launch.follows ? 1 : 0;
  cuda::check(cudaLaunchKernelEx(&config, kernel, launch));
}

}  // namespace fa::sm80
