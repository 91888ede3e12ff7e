// How a forward pass is cut: tiles, segments, and the pieces that run side by side.
//
// The shape of a call and the number of multiprocessors decide here. In deterministic mode no such
// decision can change a bit: segments lie on the contract's ladder and are folded in ascending
// order.
#include <algorithm>

#include "csrc/gpu/forward_launch.h"
#include "csrc/gpu/pack_tiles.h"
#include "csrc/gpu/positions.h"

namespace fa::gpu {
namespace {

constexpr int64_t kMaxPieces = 128;
constexpr int64_t kSplitKeys = 128;  // a split is a multiple of every kernel's load of keys
constexpr int64_t kMaxPartialFloats = 8 * 1024 * 1024;  // 32 MiB; more segments run in sequence

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Parts that would fill the multiprocessors.
int64_t wanted_pieces(PlanParams const& plan, int64_t tiles, int64_t resident_blocks) {
  if (plan.num_splits > 0) return plan.num_splits;
  return tiles > 0 && tiles < resident_blocks ? ceil_div(resident_blocks, tiles) : 1;
}

// Segments and pieces. A partial has a row's d_v elements, its reference and its sum.
void cut_keys(ForwardPlan& plan, ForwardParams const& call, int64_t pieces, int capability) {
  LayoutParams const& layout = call.layout;
  // All sequences get the same extent, so that no shorter one has more segments than the longest.
  if (!call.plan.deterministic)
    plan.segmentation = Segmentation::of_splits(layout.s_k, pieces, kSplitKeys);
  plan.num_segments = plan.segmentation.count(layout.s_k);
  // Even pieces are worth more than one piece for each thread block that can run at once.
  int64_t const segments_each = plan.num_segments > pieces ? plan.num_segments / pieces : 1;
  pieces = std::min(ceil_div(plan.num_segments, segments_each), kMaxPieces);
  int64_t const partial_floats = plan.num_segments * layout.lse_rows() * (layout.d_v + 2);
  bool const is_cut = pieces > 1 && partial_floats <= kMaxPartialFloats && plan.slots == 0;
  plan.pieces = is_cut ? pieces : 1;
  plan.closed = call.partials.out ? Closed::kHandedOut
                : is_cut          ? Closed::kFoldedLater
                                  : Closed::kFolded;
  if (plan.closed != Closed::kFoldedLater) return;
  plan.segment_floats = partial_floats;
  plan.overlaps_fold = capability >= 90;  // programmatic dependent launch
}

}  // namespace

ForwardPlan cut_forward(ForwardParams const& call, TileShape const& tile,
                        Multiprocessors const& multiprocessors) {
  LayoutParams const& layout = call.layout;
  check_positions(layout);
  ForwardPlan plan;
  int64_t const group = layout.h_q / layout.h_kv, rows = layout.s_q * group;
  plan.tile_rows = tile.rows;
  plan.tiles = ceil_div(rows, tile.rows);
  PackTiles const pack = query_tiles(layout, group, tile.rows);
  if (pack.are_fewer(plan.tiles, layout.h_kv)) plan.slots = pack.count();
  int64_t const tiles = (plan.slots > 0 ? plan.slots : plan.tiles * layout.b) * layout.h_kv;
  cut_keys(plan, call, wanted_pieces(call.plan, tiles, multiprocessors.count * tile.blocks_per_sm),
           multiprocessors.capability);
  plan.work = plan.blocks = checked_blocks(tiles * plan.pieces);
  // Pieces share no keys, so all heads form one group. Late pieces are longer and go first.
  int64_t const bytes = plan.pieces > 1 ? 0 : 2 * layout.s_k * (layout.d + layout.d_v);
  plan.order = WorkOrder::of(layout.b, layout.h_kv, plan.slots > 0 ? 1 : plan.tiles * plan.pieces,
                             heads_per_l2_group(bytes, layout.h_kv * layout.b));
  static_assert(sizeof(WorkItem) == 2 * sizeof(float));
  constexpr int64_t kFloats = Scratch::kAlignment / sizeof(float);
  plan.list_floats = plan.slots > 0 ? ceil_div(2 * plan.work, kFloats) * kFloats : 0;
  return plan;
}

}  // namespace fa::gpu
