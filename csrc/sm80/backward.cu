// Which backward kernels of this set a call gets.
#include "csrc/gpu/backward_launch.h"
#include "csrc/gpu/features.h"
#include "csrc/gpu/launch.cuh"
#include "csrc/sm80/backward_launch.h"
#include "csrc/sm80/entry.h"
#include "csrc/sm80/select.h"

namespace fa::gpu::sm80 {
namespace {

using Launch = void (*)(BackwardLaunch const&, void* stream);

// Whether all gradients come from one walk over the queries.
constexpr bool walks_once(int d) { return contract::GpuOrder::gradients(d).part_keys > 0; }

template <class Element, int kD, bool kFeatures>
void run(BackwardLaunch const& launch, void* stream) {
  if constexpr (walks_once(kD)) {
    using Wide = KeyWalkTraits<Element, kD, kWideQueries, kFeatures>;
    using Narrow = KeyWalkTraits<Element, 128, kNarrowQueries, kFeatures>;
    bool const fits = Wide::shared_bytes(1) <= launch.multiprocessors.max_shared_bytes_per_block;
    (fits ? launch_key_walk<Wide> : launch_key_walk<Narrow>)(launch, stream);
  } else {
    launch_query_tiles<QueryTile<Element, kD, kFeatures>>(launch, stream);
    launch_key_tiles<KeyTile<Element, kD, kFeatures>>(launch, stream);
  }
}

Launch kernels_of(BackwardLaunch const& launch) {
  BackwardParams const& call = launch.call;
  bool const features = has_features(launch.scale, launch.aligned);
  return select_types(call.dtype, call.layout.d, [&]<class Element, int kD>() -> Launch {
    return features ? run<Element, kD, true> : run<Element, kD, false>;
  });
}

// Blocks of queries in the sums of dQ.
int64_t sum_blocks(LayoutParams const& layout) {
  return layout.cu_seqlens_q ? layout.total_q / kSumQueries + layout.b
                             : layout.b * ((layout.s_q + kSumQueries - 1) / kSumQueries);
}

}  // namespace

Scratch backward_scratch(BackwardParams const& call, Multiprocessors const&) {
  LayoutParams const& layout = call.layout;
  int const d = head_dim_bucket(layout.d);
  if (!walks_once(d) || layout.b == 0) return {};
  int64_t const blocks = layout.h_q * sum_blocks(layout);
  // Of the kernel that needs most: a counter for each step, and its columns.
  int const steps = kSumQueries / kNarrowQueries, columns = d > 64 ? 128 : 64;
  return {.counters = blocks * steps + 1, .floats = blocks * kSumQueries * columns};
}

void backward(BackwardParams const& call, Multiprocessors const& multiprocessors, void* scratch,
              void* stream) {
  BackwardLaunch launch = prepare_backward(call, multiprocessors);
  Scratch const need = backward_scratch(call, multiprocessors);
  zero_counters(need, scratch, stream);
  if (need.counters > 0) {
    launch.next_ticket = need.counters_in(scratch);
    launch.sums = {reinterpret_cast<float4*>(need.floats_in(scratch)), launch.next_ticket + 1,
                   sum_blocks(call.layout)};
  }
  launch_delta(launch, stream);
  kernels_of(launch)(launch, stream);
}

}  // namespace fa::gpu::sm80
