// Which forward kernel of this set a call gets, and the shape of its tiles.
//
// Dtype, head dim and features choose the kernel; the shape of the call chooses between a prefill's
// tiles and a decode's, and the occupancy of a decode. No choice can change a bit.
#include <algorithm>

#include "csrc/gpu/features.h"
#include "csrc/sm80/entry.h"
#include "csrc/sm80/forward_launch.h"
#include "csrc/sm80/select.h"

namespace fa::gpu::sm80 {
namespace {

using Launch = void (*)(ForwardLaunch const&, void* stream);

// A decode of 96 columns would not divide among four warps.
constexpr int decode_head_dim(int d) { return d == 96 ? 128 : d; }

template <class Element, int kD, bool kFeatures>
Launch decode_at(Occupancy occupancy) {
  constexpr int kDecodeD = decode_head_dim(kD);
  switch (occupancy) {
    case Occupancy::kOne:
      return launch_forward<Decode<Element, kDecodeD, kFeatures, Occupancy::kOne>>;
    case Occupancy::kMost:
      if constexpr (has_most_occupancy(kDecodeD))
        return launch_forward<Decode<Element, kDecodeD, kFeatures, Occupancy::kMost>>;
      [[fallthrough]];
    default:
      return launch_forward<Decode<Element, kDecodeD, kFeatures, Occupancy::kUsual>>;
  }
}

Launch kernel_of(ForwardLaunch const& launch) {
  ForwardParams const& call = launch.call;
  ForwardPlan const& plan = launch.plan;
  bool const features = has_features(launch.scale, launch.aligned);
  return select_types(call.dtype, call.layout.d, [&]<class Element, int kD>() -> Launch {
    if (plan.is_decode)
      return features ? decode_at<Element, kD, true>(plan.occupancy)
                      : decode_at<Element, kD, false>(plan.occupancy);
    return features ? launch_forward<Prefill<Element, kD, true>>
                    : launch_forward<Prefill<Element, kD, false>>;
  });
}

void run_kernel(ForwardLaunch const& launch, void* stream) { kernel_of(launch)(launch, stream); }

// Whether no piece has many more keys than others: segments grow with the position.
bool pieces_are_even(ForwardPlan const& plan) {
  if (plan.pieces <= 1) return true;
  Segmentation const& cut = plan.segmentation;
  int64_t const last = plan.num_segments;
  return cut.begin(last) - cut.begin(last - 1) == cut.begin(1);
}

Occupancy occupancy_of(ForwardPlan const& plan, LayoutParams const& layout, int64_t resident_blocks,
                       Multiprocessors const& multiprocessors) {
  if (plan.work > resident_blocks && pieces_are_even(plan)) return Occupancy::kMost;
  Segmentation const& cut = plan.segmentation;
  auto const begin = [&](int64_t piece) {
    return std::min(cut.begin(plan.num_segments * piece / plan.pieces), layout.s_k);
  };
  int64_t const last = plan.pieces - 1, before = last > 0 ? last - 1 : 0;
  int64_t const longest = std::max(layout.s_k - begin(last), begin(last) - begin(before));
  // One piece with more keys than a multiprocessor's share decides how long all of them take.
  int64_t const all = plan.tiles * layout.h_kv * layout.b * layout.s_k;
  bool const has_room =
      decode_shared_bytes(decode_head_dim(head_dim_bucket(layout.d)), Occupancy::kOne) <=
      multiprocessors.max_shared_bytes_per_block;
  return has_room && longest * multiprocessors.count >= all ? Occupancy::kOne : Occupancy::kUsual;
}

// Where the folds of a prefill lie between two segments: in shared memory as far as there is room,
// the rest in scratch, a part for each thread block that can run at once.
void find_room_for_folds(ForwardPlan& plan, int d, int64_t resident_blocks,
                         Multiprocessors const& multiprocessors) {
  plan.fold_shared = fold_vectors_in_shared(d, multiprocessors.shared_bytes);
  int64_t const in_scratch = fold_vectors(d) - plan.fold_shared;
  if (in_scratch == 0) return;
  plan.blocks = std::min(plan.blocks, resident_blocks);
  plan.segment_floats = plan.blocks * in_scratch * kThreadsPerBlock * 4;
}

}  // namespace

ForwardPlan plan_forward(ForwardParams const& call, Multiprocessors const& multiprocessors) {
  LayoutParams const& layout = call.layout;
  int const d = head_dim_bucket(layout.d);
  bool const is_decode = layout.s_q * (layout.h_q / layout.h_kv) <= kDecodeRows;
  TileShape const tile{tile_rows(d, is_decode), blocks_per_sm(d, is_decode)};
  int64_t const resident_blocks = multiprocessors.count * tile.blocks_per_sm;
  ForwardPlan plan = cut_forward(call, tile, multiprocessors);
  plan.is_decode = is_decode;
  if (is_decode) {  // folds in registers
    plan.occupancy = occupancy_of(plan, layout, resident_blocks, multiprocessors);
  } else if (plan.closed == Closed::kFolded && plan.num_segments > 1) {
    find_room_for_folds(plan, d, resident_blocks, multiprocessors);
  }
  return plan;
}

void forward(ForwardParams const& call, ForwardPlan const& plan, void* scratch, void* stream) {
  run_forward(call, plan, scratch, stream, run_kernel);
}

}  // namespace fa::gpu::sm80
