// The sm80 family's face: every NVIDIA GPU from Ampere on, fp16 and bf16. Plain C++.
#pragma once

#include <cstdint>

#include "csrc/core/params.h"
#include "csrc/core/segmentation.h"
#include "csrc/cuda/score_scale.h"
#include "csrc/sm80/order.h"

struct float4;

namespace fa::sm80 {

using Segmentation = SegmentationOn<contract::Sm80Ladder>;

// The head dim that the kernels of d were compiled for.
constexpr int64_t head_dim_bucket(int64_t d) {
  return d <= 64 ? 64 : d <= 96 ? 96 : d <= 128 ? 128 : d <= 192 ? 192 : 256;
}

// How many thread blocks of few rows share a multiprocessor.
enum class Company { kAlone, kSome, kCrowd };

// How a forward pass is cut. In deterministic mode nothing here can change a bit.
struct ForwardPlan {
  bool few_rows = false;  // a tile has at most sixteen
  Company company = Company::kSome;
  int64_t tile_rows = 0;     //
  int64_t tiles = 0;         // query tiles of the longest sequence
  int64_t slots = 0;         // of a pack, where they are fewer by far (pack_tiles.h); else 0
  int64_t num_segments = 0;  // of the longest sequence
  int64_t pieces = 1;        // parts that a tile's segments are cut into to run side by side
  Segmentation segmentation;
  int64_t work = 0;  // tiles of the call, times pieces
  WorkOrder order;
  int64_t blocks = 0;   // thread blocks; with fewer than work, each takes the next when it is free
  int fold_shared = 0;  // vectors a thread of a fold that lie in shared memory, not in scratch
  int64_t scratch_floats = 0, list_floats = 0;  // of folds or partials; of a pack's tiles
};

// What a plan has to know of a GPU.
struct Processors {
  int64_t count = 0;              // multiprocessors
  int64_t shared_bytes = 0;       // that each has for its thread blocks
  int64_t most_shared_bytes = 0;  // that one thread block can have
};
Processors processors_of(int device);

ForwardPlan plan_forward(ForwardParams const&, Processors const&);

// What the kernels of a forward pass are given.
struct ForwardLaunch {
  ForwardParams call;
  cuda::ScoreScale scale;
  ForwardPlan plan;
  cuda::Divisor group, tiles, pieces;  // query heads of a key head; plan.tiles, plan.pieces
  bool aligned;                        // every row lies on sixteen bytes
  bool partials;                       // hand closed segments on instead of folding them
  bool follows = false;                // the fold may be launched while the pieces run
  Place const* places = nullptr;       // [work], where plan.slots says so; null: by plan.order
  float4* folds = nullptr;             // [blocks, fold_vectors - plan.fold_shared, threads]
  int* next_work = nullptr;  // taken so far, beyond the first of each block; null: one each
};

// Runs on `stream` (a cudaStream_t) of the current device. When call.partials is set, the caller
// wants the partials themselves; scratch holds plan.list_floats, and plan.scratch_floats behind.
void forward(ForwardParams const& call, ForwardPlan const& plan, float* scratch, void* stream);

// S_dmask of a forward pass that has run.
void write_dmask(ForwardParams const& call, void* stream);

// Where the parts of dQ are summed: blocks of queries, which lie as the threads hold them.
struct QuerySums {
  float4* sums = nullptr;  // [h_q, blocks, vectors of a block]
  int* turns = nullptr;    // [h_q, blocks]: tiles of keys that have added to it
  int64_t blocks = 0;      // of a head, of all sequences
};

// Memory beside the gradients: floats that need no value, and integers that must be zero.
struct BackwardScratch {
  int64_t blocks = 0;  // QuerySums::blocks
  int64_t floats = 0, integers = 0;
};
BackwardScratch backward_scratch(BackwardParams const&);

// What the kernels of a backward pass are given.
struct BackwardLaunch {
  BackwardParams call;
  cuda::ScoreScale scale;
  int tiles = 0;  // of the longest sequence: of queries, or of keys
  int slots = 0;  // of a pack, where they are fewer by far (pack_tiles.h); else 0
  WorkOrder order;
  bool aligned = false;  // every row lies on sixteen bytes
  // Of the kernel that walks once.
  QuerySums sums;
  int* next_ticket = nullptr;  // thread blocks that have started
  Processors processors;
  int stages = 1;        // blocks of queries in shared memory
  int delta_blocks = 0;  // of delta's kernel, which tells of faults too
};

// delta, then dQ, dK and dV. scratch and tickets: what backward_scratch asks for.
void backward(BackwardParams const& call, float* scratch, int* tickets, void* stream);

void append(AppendParams const& params, void* stream);

}  // namespace fa::sm80
