// The backward pass: which kernels a call gets.
#include "csrc/cuda/errors.cuh"
#include "csrc/sm80/addresses.h"
#include "csrc/sm80/backward_launch.h"
#include "csrc/sm80/delta.h"

namespace fa::sm80 {
namespace {

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
  BackwardLaunch launch;
  launch.call = call;
  launch.scale = cuda::ScoreScale::of(call.score);
  launch.aligned = layout.d % 8 == 0;
  launch.sums = {reinterpret_cast<float4*>(scratch), tickets + 1, backward_scratch(call).blocks};
  launch.next_ticket = tickets;
  int device = 0;
  cuda::check(cudaGetDevice(&device));
  launch.processors = processors_of(device);
  for (RowTensor const* t :
       {&call.q, &call.k, &call.v, &call.out, &call.dout, &call.dq, &call.dk, &call.dv}) {
    launch.aligned = launch.aligned && on_sixteen_bytes(*t);
  }
  launch_delta(launch, on);
  bool const half = call.dtype == DType::kFloat16;
  bool const features = launch.scale.shaped || launch.scale.drops || !launch.aligned;
  auto const run = half ? with_head_dim<__half>(layout.d, features)
                        : with_head_dim<__nv_bfloat16>(layout.d, features);
  run(launch, on);
}

}  // namespace fa::sm80
