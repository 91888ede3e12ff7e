// The sm80 family's face: every NVIDIA GPU from Ampere on, fp16 and bf16. Plain C++.
#pragma once

#include <cstdint>

#include "csrc/core/params.h"
#include "csrc/core/segmentation.h"
#include "csrc/cuda/score_scale.h"

struct float4;

namespace fa::sm80 {

// The head dim that the kernels of d were compiled for.
constexpr int64_t head_dim_bucket(int64_t d) {
  return d <= 64 ? 64 : d <= 96 ? 96 : d <= 128 ? 128 : d <= 192 ? 192 : 256;
}

// How a forward pass is cut. In deterministic mode nothing here can change a bit.
struct ForwardPlan {
  bool few_rows = false;     // a tile is one warp's
  int64_t tile_rows = 0;     //
  int64_t tiles = 0;         // query tiles of the longest sequence
  int64_t num_segments = 0;  // of the longest sequence
  int64_t pieces = 1;        // parts that a tile's segments are cut into to run side by side
  Segmentation segmentation;
  int64_t work = 0;    // tiles of the call, times pieces
  int section = 1;     // heads that are worked on together
  int64_t blocks = 0;  // thread blocks; with fewer than work, each takes the next when it is free
  int64_t scratch_floats = 0;
};

int64_t num_multiprocessors(int device);

ForwardPlan plan_forward(ForwardParams const&, int64_t num_multiprocessors);

// What the kernels of a forward pass are given.
struct ForwardLaunch {
  ForwardParams call;
  cuda::ScoreScale scale;
  ForwardPlan plan;
  int group;                 // query heads of a key head
  bool aligned;              // every row lies on sixteen bytes
  bool partials;             // hand closed segments on instead of folding them
  float4* folds = nullptr;   // [blocks, tile_rows * bucket / 4], null: nothing to keep
  int* next_work = nullptr;  // taken so far, beyond the first of each block; null: one each
};

// Runs on `stream` (a cudaStream_t) of the current device. When call.partials is set, the caller
// wants the partials themselves; scratch holds plan.scratch_floats.
void forward(ForwardParams const& call, ForwardPlan const& plan, float* scratch, void* stream);

// S_dmask of a forward pass that has run.
void write_dmask(ForwardParams const& call, void* stream);

// What the kernels of a backward pass are given.
struct BackwardLaunch {
  BackwardParams call;
  cuda::ScoreScale scale;
  int tiles;     // of the longest sequence: of queries, or of keys
  int section;   // heads that are worked on together
  bool aligned;  // every row lies on sixteen bytes
};

// delta, then dQ, then dK and dV, with nothing in memory beside them.
void backward(BackwardParams const& call, void* stream);

void append(AppendParams const& params, void* stream);

}  // namespace fa::sm80
