// A forward pass on a GPU as its kernels get it: the call, and how it is cut. Plain C++.
#pragma once

#include <cstdint>

#include "csrc/core/params.h"
#include "csrc/core/segmentation.h"
#include "csrc/gpu/multiprocessors.h"
#include "csrc/gpu/score_scale.h"
#include "csrc/gpu/scratch.h"
#include "csrc/gpu/work_order.h"

struct float4;

namespace fa::gpu {

using Segmentation = SegmentationOn<contract::GpuOrder>;

// How many thread blocks of a decode share a multiprocessor.
enum class Occupancy {
  kOne,    // one, with the next keys under way as well
  kUsual,  //
  kMost    // more, each with fewer keys at a time
};

// What becomes of a closed segment.
enum class Closed {
  kFolded,       // its thread block adds it to the fold
  kFoldedLater,  // a partial in scratch, which a second kernel folds
  kHandedOut     // a partial in the caller's memory
};

// What a kernel set says of its tiles.
struct TileShape {
  int64_t rows;           // of a tile
  int64_t blocks_per_sm;  // thread blocks that a multiprocessor holds at once
};

// How a forward pass is cut. In deterministic mode nothing here can change a bit.
struct ForwardPlan {
  bool is_decode = false;  // all rows of a key head and sequence find room in one small tile
  Occupancy occupancy = Occupancy::kUsual;
  int64_t tile_rows = 0;
  int64_t tiles = 0;         // query tiles of the longest sequence
  int64_t slots = 0;         // of a pack, where they are fewer by far (pack_tiles.h); else 0
  int64_t num_segments = 0;  // of the longest sequence
  int64_t pieces = 1;        // parts that a tile's segments are cut into to run side by side
  Segmentation segmentation;
  Closed closed = Closed::kFolded;
  int64_t work = 0;  // tiles of the call, times pieces
  WorkOrder order;
  int64_t blocks = 0;          // thread blocks; with fewer than work, each takes the next when free
  int fold_shared = 0;         // vectors a thread of a fold that lie in shared memory
  int64_t list_floats = 0;     // in scratch, of the list of a pack's work
  int64_t segment_floats = 0;  // in scratch, of folds or partials
  bool overlaps_fold = false;  // the fold is launched while the pieces run

  bool is_persistent() const { return blocks < work; }
  Scratch scratch() const { return {is_persistent() ? 1 : 0, list_floats + segment_floats}; }
};

// Tiles, segments, pieces and their order, for tiles of this shape.
ForwardPlan cut_forward(ForwardParams const& call, TileShape const& tile,
                        Multiprocessors const& multiprocessors);

// What the kernels of a forward pass are given.
struct ForwardLaunch {
  ForwardParams call;
  ScoreScale scale;
  ForwardPlan plan;
  Divisor group{}, tiles{}, pieces{};   // query heads of a key head; plan.tiles, plan.pieces
  bool aligned = false;                 // every row lies on sixteen bytes
  WorkItem const* work_list = nullptr;  // [work], where plan.slots says so; null: by plan.order
  float4* folds = nullptr;              // [blocks, vectors in scratch, threads]
  int* next_work = nullptr;  // taken so far, beyond the first of each block; null: one each

  FA_HOST_DEVICE bool hands_on_partials() const { return plan.closed != Closed::kFolded; }
};

// Launches everything that a forward pass consists of on `stream` (a cudaStream_t) of the current
// device: the list of a pack's work, `kernel`, uncovered rows, the fold. scratch: plan.scratch().
void run_forward(ForwardParams const& call, ForwardPlan const& plan, void* scratch, void* stream,
                 void (*kernel)(ForwardLaunch const&, void* stream));

// Folds the partials of every row, when all pieces have written theirs.
void launch_fold(ForwardLaunch const& launch, void* stream);

// S_dmask of a forward pass that has run.
void write_dmask(ForwardParams const& call, void* stream);

}  // namespace fa::gpu
