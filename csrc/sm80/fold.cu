// Folds the partials of every row in ascending order and finishes it. One warp has 32 columns of a
// row, a lane each.
#include "csrc/core/segmentation.h"
#include "csrc/cuda/convert.cuh"
#include "csrc/cuda/errors.cuh"
#include "csrc/cuda/score.cuh"
#include "csrc/sm80/fold.h"

namespace fa::sm80 {
namespace {

constexpr int kWarps = 4;

template <class Element>
__global__ __launch_bounds__(32 * kWarps) void fold_kernel(
    __grid_constant__ ForwardLaunch const launch) {
  ForwardParams const& call = launch.call;
  PartialBuffers const& partials = call.partials;
  cuda::wait_for_leader();
  int const lane = threadIdx.x % 32, d = static_cast<int>(call.layout.d);
  int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  int const groups = (d + 31) / 32, column = static_cast<int>(index % groups) * 32 + lane;
  index /= groups;
  int64_t const head = index % call.layout.h_q, query = index / call.layout.h_q % call.layout.s_q;
  int64_t const batch = index / call.layout.h_q / call.layout.s_q;
  if (batch >= call.layout.b) return;
  Sequence const sequence = sequence_of(call.layout, batch);
  if (query >= sequence.s_q) return;
  int64_t const row = sequence.lse_base + head * call.layout.lse_head_stride + query;

  Segmentation const segmentation = launch.plan.segmentation;
  contract::KeyRange const seen = contract::visible_keys(
      query, sequence.s_q, sequence.s_k, call.score.window_left, call.score.window_right);
  // Segments in which the row sees nothing would leave it as it is; nobody wrote them.
  int64_t const first = seen.begin < seen.end ? segmentation.of(seen.begin) : 0;
  int64_t const end = seen.begin < seen.end ? segmentation.of(seen.end - 1) + 1 : 0;

  float o = 0.0f, l = 0.0f, m = -INFINITY;
  for (int64_t begin = first; begin < end; begin += 32) {  // whose loads are under way together
    int const count = static_cast<int>(min(end - begin, int64_t{32}));
    int64_t const mine = (begin + lane) * partials.rows + row;  // a reference and a sum a lane
    float const lane_m = lane < count ? partials.max_log2[mine] : 0.0f;
    float const lane_l = lane < count ? partials.sum[mine] : 0.0f;
    float part[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      int64_t const from = ((begin + i) * partials.rows + row) * d + column;
      part[i] = i < count && column < d ? partials.out[from] : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) {  // ascending
      if (i >= count) break;
      float const part_m = __shfl_sync(cuda::kFullWarp, lane_m, i);
      float const part_l = __shfl_sync(cuda::kFullWarp, lane_l, i);
      float const common = contract::fold_reference(m, part_m);
      float const before = contract::fold_weight(m, common);
      float const now = contract::fold_weight(part_m, common);
      o = fmaf(part[i], now, o * before);
      l = fmaf(part_l, now, l * before);
      m = common;
    }
  }

  Element* const out =
      reinterpret_cast<Element*>(query_row(call.out, sequence, query, head, sizeof(Element)));
  if (column < d) out[column] = cuda::round_to<Element>(o * contract::inverse_of_sum(l) + 0.0f);
  if (column == 0) call.lse[row] = contract::log_sum_exp(m, l);
}

}  // namespace

void launch_fold(ForwardLaunch const& launch, cudaStream_t stream) {
  LayoutParams const& layout = launch.call.layout;
  int64_t const warps = layout.b * layout.s_q * layout.h_q * ((layout.d + 31) / 32);
  bool const half = launch.call.dtype == DType::kFloat16;
  auto const kernel = half ? fold_kernel<__half> : fold_kernel<__nv_bfloat16>;
  // Its thread blocks wait on their places when the pieces end.
  cudaLaunchAttribute follows{};
  follows.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  follows.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>((warps + kWarps - 1) / kWarps);
  config.blockDim = 32 * kWarps;
  config.stream = stream;
  config.attrs = &follows;
  config.numAttrs = launch.follows ? 1 : 0;
  cuda::check(cudaLaunchKernelEx(&config, kernel, launch));
}

}  // namespace fa::sm80
