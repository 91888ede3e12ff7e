// The backward pass: delta, and which kernels a call gets.
#include "csrc/cuda/convert.cuh"
#include "csrc/cuda/errors.cuh"
#include "csrc/sm80/addresses.h"
#include "csrc/sm80/backward_launch.h"
#include "csrc/sm80/backward_scores.cuh"

namespace fa::sm80 {
namespace {

constexpr int kWarps = 4;

// delta = sum over columns of dout * out, one warp a row: lane i sums columns i, i + 32, ..., then
// the lanes' fixed tree.
template <class Element>
__global__ __launch_bounds__(32 * kWarps) void delta_kernel(
    __grid_constant__ BackwardParams const call) {
  LayoutParams const& layout = call.layout;
  int const lane = threadIdx.x % 32;
  int64_t const block = int64_t{blockIdx.y} * gridDim.x + blockIdx.x;
  int64_t const index = block * kWarps + threadIdx.x / 32;
  int64_t const head = index % layout.h_q, query = index / layout.h_q % layout.s_q;
  int64_t const batch = index / layout.h_q / layout.s_q;
  if (batch >= layout.b) return;
  Sequence const s = sequence_of(layout, batch);
  if (query >= s.s_q) return;
  auto const* const out = reinterpret_cast<Element const*>(query_row(call.out, s, query, head, 2));
  auto const* const dout =
      reinterpret_cast<Element const*>(query_row(call.dout, s, query, head, 2));
  float sum = 0.0f;
  for (int i = lane; i < layout.d; i += 32) sum = fmaf(to_float(dout[i]), to_float(out[i]), sum);
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  if (lane == 0)
    call.delta[delta_base(call, s, batch) + head * call.delta_head_stride + query] = sum;
  contract::KeyRange const seen =
      contract::visible_keys(query, s.s_q, s.s_k, call.score.window_left, call.score.window_right);
  if (seen.begin < seen.end) return;
  auto* const dq = reinterpret_cast<uint16_t*>(query_row(call.dq, s, query, head, 2));
  for (int i = lane; i < layout.d; i += 32) dq[i] = 0;  // no tile of keys comes by
}

using Launch = void (*)(BackwardLaunch const&, cudaStream_t);

template <class Element, int kD, bool kFeatures>
void run(BackwardLaunch const& launch, cudaStream_t stream) {
  if constexpr (kD <= kWalksOnce) {
    using Wide = KeyWalkTraits<Element, kD, 128, kFeatures>;
    using Narrow = KeyWalkTraits<Element, 128, 64, kFeatures>;
    bool const fits = Wide::shared_bytes(1) <= launch.processors.most_shared_bytes;
    (fits ? launch_key_walk<Wide> : launch_key_walk<Narrow>)(launch, stream);
  } else {
    launch_query_tiles<QueryTile<Element, kD, kFeatures>>(launch, stream);
    launch_key_tiles<KeyTile<Element, kD, kFeatures>>(launch, stream);
  }
}

template <class Element, int kD>
Launch with_features(bool features) {
  return features ? run<Element, kD, true> : run<Element, kD, false>;
}

template <class Element>
Launch with_head_dim(int64_t d, bool features) {
  switch (head_dim_bucket(d)) {
    case 64:
      return with_features<Element, 64>(features);
    case 96:
      return with_features<Element, 96>(features);
    case 128:
      return with_features<Element, 128>(features);
    case 192:
      return with_features<Element, 192>(features);
    default:
      return with_features<Element, 256>(features);
  }
}

}  // namespace

BackwardScratch backward_scratch(BackwardParams const& call) {
  LayoutParams const& layout = call.layout;
  int64_t const bucket = head_dim_bucket(layout.d);
  BackwardScratch scratch;
  if (bucket > kWalksOnce || layout.b == 0) return scratch;
  scratch.blocks = layout.cu_seqlens_q
                       ? layout.total_q / kWalkQueries + layout.b
                       : layout.b * ((layout.s_q + kWalkQueries - 1) / kWalkQueries);
  int64_t const columns = bucket > 64 ? 128 : 64;  // of the widest kernel that may run
  scratch.floats = layout.h_q * scratch.blocks * kWalkQueries * columns;
  scratch.integers = layout.h_q * scratch.blocks + 1;
  return scratch;
}

void backward(BackwardParams const& call, float* scratch, int* tickets, void* stream) {
  auto const on = static_cast<cudaStream_t>(stream);
  LayoutParams const& layout = call.layout;
  check_positions(layout);
  BackwardLaunch launch{call, cuda::ScoreScale::of(call.score), 0, 1, layout.d % 8 == 0};
  launch.sums = {reinterpret_cast<float4*>(scratch), tickets + 1, backward_scratch(call).blocks};
  launch.next_ticket = tickets;
  int device = 0;
  cuda::check(cudaGetDevice(&device));
  launch.processors = processors_of(device);
  for (RowTensor const* t : {&call.q, &call.k, &call.v, &call.dout, &call.dq, &call.dk, &call.dv}) {
    launch.aligned = launch.aligned && on_sixteen_bytes(*t);
  }
  bool const half = call.dtype == DType::kFloat16;
  int64_t const rows = layout.b * layout.s_q * layout.h_q;
  if (rows > 0) {
    auto const kernel = half ? delta_kernel<__half> : delta_kernel<__nv_bfloat16>;
    // b * s_q of a ragged pack is more than its tokens, and may be more than a line of blocks.
    constexpr int64_t kLine = 0x7fffffff;
    int64_t const blocks = (rows + kWarps - 1) / kWarps, lines = (blocks + kLine - 1) / kLine;
    dim3 const grid(static_cast<unsigned>((blocks + lines - 1) / lines),
                    static_cast<unsigned>(lines));
    kernel<<<grid, 32 * kWarps, 0, on>>>(call);
    cuda::check(cudaGetLastError());
  }
  bool const features = launch.scale.shaped || launch.scale.drops || !launch.aligned;
  auto const run = half ? with_head_dim<__half>(layout.d, features)
                        : with_head_dim<__nv_bfloat16>(layout.d, features);
  run(launch, on);
}

}  // namespace fa::sm80
