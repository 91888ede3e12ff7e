// Folds the partials of every row in ascending order and finishes it. One warp a row.
#include "csrc/core/segmentation.h"
#include "csrc/cuda/convert.cuh"
#include "csrc/cuda/errors.cuh"
#include "csrc/cuda/score.cuh"
#include "csrc/sm80/fold.h"

namespace fa::sm80 {
namespace {

constexpr int kWarps = 4;

// A lane holds kColumns columns, 32 apart.
template <class Element, int kColumns>
__global__ __launch_bounds__(32 * kWarps) void fold_kernel(
    __grid_constant__ ForwardLaunch const launch) {
  ForwardParams const& call = launch.call;
  PartialBuffers const& partials = call.partials;
  int const lane = threadIdx.x % 32, d = static_cast<int>(call.layout.d);
  int64_t const index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
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

  constexpr int kInFlight = 64 / kColumns;  // segments whose loads are under way together
  float o[kColumns] = {}, l = 0.0f, m = -INFINITY;
  for (int64_t begin = first; begin < end; begin += kInFlight) {
    float part[kInFlight][kColumns], part_m[kInFlight], part_l[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (begin + i >= end) continue;
      int64_t const index = (begin + i) * partials.rows + row;
      part_m[i] = partials.max_log2[index];
      part_l[i] = partials.sum[index];
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        int const column = j * 32 + lane;
        part[i][j] = column < d ? partials.out[index * d + column] : 0.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {  // ascending
      if (begin + i >= end) continue;
      float const common = contract::fold_reference(m, part_m[i]);
      float const w1 = contract::fold_weight(m, common);
      float const w2 = contract::fold_weight(part_m[i], common);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) o[j] = o[j] * w1 + part[i][j] * w2;
      l = l * w1 + part_l[i] * w2;
      m = common;
    }
  }

  float const inverse = contract::inverse_of_sum(l);
  Element* const out =
      reinterpret_cast<Element*>(query_row(call.out, sequence, query, head, sizeof(Element)));
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
    int const column = j * 32 + lane;
    if (column < d) out[column] = fa::cuda::round_to<Element>(o[j] * inverse + 0.0f);
  }
  if (lane == 0) call.lse[row] = contract::log_sum_exp(m, l);
}

}  // namespace

void launch_fold(ForwardLaunch const& launch, cudaStream_t stream) {
  LayoutParams const& layout = launch.call.layout;
  int64_t const rows = layout.b * layout.s_q * layout.h_q;
  bool const half = launch.call.dtype == DType::kFloat16;
  auto kernel = half ? fold_kernel<__half, 8> : fold_kernel<__nv_bfloat16, 8>;
  if (layout.d <= 128) kernel = half ? fold_kernel<__half, 4> : fold_kernel<__nv_bfloat16, 4>;
  if (layout.d <= 64) kernel = half ? fold_kernel<__half, 2> : fold_kernel<__nv_bfloat16, 2>;
  kernel<<<static_cast<unsigned>((rows + kWarps - 1) / kWarps), 32 * kWarps, 0, stream>>>(launch);
  fa::cuda::check(cudaGetLastError());
}

}  // namespace fa::sm80
