// The CPU kernels' face to the scheduler: one table of kernels per instruction set, all with the
// same bits.
#pragma once

#include <cstdint>

#include "csrc/core/params.h"
#include "csrc/core/segmentation.h"

namespace fa::cpu {

using Segmentation = SegmentationOn<contract::CpuOrder>;

// Rows [row_begin, row_begin + num_rows) of one sequence, for each of num_heads key heads. The
// query heads of a group are adjacent rows: row r of key head h is query r / group of query head h
// * group + r % group.
struct QueryTile {
  int64_t batch, row_begin, num_rows, head_kv, num_heads;
};

// Keys [key_begin, key_begin + num_keys) of one sequence and one key head.
struct KeyTile {
  int64_t batch, head_kv, key_begin, num_keys;
};

struct KernelTable {
  char const* isa;
  int64_t (*forward_floats)(int64_t num_rows, int64_t num_heads, int64_t d);  // scratch of a task
  int64_t (*backward_floats)(int64_t num_rows, int64_t d);
  // Segments [segment_begin, segment_end) of a tile. With `partials` every closed segment is handed
  // on, else they are folded in ascending order and the rows are finished (then all segments must
  // be asked for).
  void (*forward)(ForwardParams const&, QueryTile const&, Segmentation const&,
                  int64_t segment_begin, int64_t segment_end, PartialBuffers const* partials,
                  float* workspace);
  // Folds num_segments partials of a tile in ascending order and finishes its rows.
  void (*fold)(ForwardParams const&, QueryTile const&, PartialBuffers const&, int64_t num_segments,
               float* workspace);
  void (*backward_delta)(BackwardParams const&, QueryTile const&);
  void (*backward_query)(BackwardParams const&, QueryTile const&, float* workspace);
  void (*backward_key)(BackwardParams const&, KeyTile const&, float* workspace);
};

namespace generic {
KernelTable const& kernels();
}
namespace avx2 {
KernelTable const& kernels();
}
namespace avx512 {
KernelTable const& kernels();
}

// How a forward pass is cut, as explain() shows it.
struct ForwardPlan {
  int64_t tile_rows = 0;  // rows a query tile
  int64_t num_tiles = 0;
  int64_t num_heads = 1;     // key heads that a task takes along, block by block
  int64_t longest_keys = 0;  // of any sequence
  int64_t num_segments = 0;  // of the longest sequence
  int64_t pieces = 1;        // parts that a tile's segments are cut into to run side by side
  Segmentation segmentation;
};

// Runs fn(context, task) for tasks 0 .. num_workers - 1, possibly at the same time.
using RunWorkers = void (*)(int64_t num_workers, void (*fn)(void* context), void* context);

struct Machine {
  RunWorkers run;
  int64_t num_threads;
};

KernelTable const& selected_kernels();
ForwardPlan plan_forward(ForwardParams const&, int64_t num_threads);
void forward(ForwardParams const&, Machine const&);
void backward(BackwardParams const&, Machine const&);
void append(AppendParams const&, Machine const&);

}  // namespace fa::cpu
