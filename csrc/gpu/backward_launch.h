// A backward pass on a GPU as its kernels get it. Plain C++.
#pragma once

#include <cstdint>

#include "csrc/core/params.h"
#include "csrc/gpu/multiprocessors.h"
#include "csrc/gpu/pack_tiles.h"
#include "csrc/gpu/score_scale.h"
#include "csrc/gpu/scratch.h"
#include "csrc/gpu/work_order.h"

struct float4;

namespace fa::gpu {

// Where the parts of dQ are added. A block is the contract's, of 64 queries; a kernel may take it
// in several steps. The elements of a step lie as the threads hold them.
struct QuerySums {
  float4* sums = nullptr;  // [h_q, blocks, steps, vectors of a step]
  int* turns = nullptr;    // [h_q, blocks, steps]: tiles of keys that have added
  int64_t blocks = 0;      // of a head, of all sequences
};

// What the kernels of a backward pass are given.
struct BackwardLaunch {
  BackwardParams call;
  ScoreScale scale;
  int tiles = 0;  // of the longest sequence: of queries, or of keys
  int slots = 0;  // of a pack, where they are fewer by far (pack_tiles.h); else 0
  WorkOrder order{};
  bool aligned = false;  // every row lies on sixteen bytes
  Multiprocessors multiprocessors;
  int delta_blocks = 0;  // of delta's kernel, which tells of faults too
  // Of the kernel that walks once.
  QuerySums sums{};
  int* next_ticket = nullptr;  // thread blocks that have started
  int stages = 1;              // steps whose queries lie in shared memory

#if defined(__CUDACC__)
  // The tile of thread block `block`; pack: the tiles of `heads` heads by tokens.
  __device__ __forceinline__ WorkItem work_of(int block, PackTiles const& pack, int heads) const {
    return slots > 0 ? pack.at(block / heads, block % heads, heads) : order.at(block);
  }
#endif
};

// Everything of a launch that no kernel set decides.
BackwardLaunch prepare_backward(BackwardParams const& call, Multiprocessors const& multiprocessors);

// The first kernel of a backward pass: delta, and dQ of queries that see nothing.
void launch_delta(BackwardLaunch const& launch, void* stream);

// How many thread blocks take the tiles of `heads` heads of each sequence, of which the longest has
// `length` rows; pack: the same tiles by tokens.
int64_t count_tiles(BackwardLaunch& launch, PackTiles const& pack, int64_t length, int64_t heads);

// The order in which those tiles start; `l2_group` heads are worked on together.
void set_order(BackwardLaunch& launch, int64_t heads, int64_t l2_group);

}  // namespace fa::gpu
