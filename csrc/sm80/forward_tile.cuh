// What the tiles of a forward pass have in common: which rows and keys a thread block has, and
// where they lie.
#pragma once

#include "csrc/core/segmentation.h"
#include "csrc/cuda/score.cuh"
#include "csrc/sm80/family.h"
#include "csrc/sm80/key_tiles.cuh"
#include "csrc/sm80/order.h"
#include "csrc/sm80/rest.cuh"
#include "csrc/sm80/traits.h"

namespace fa::sm80 {

using namespace fa::cuda;

// In shared memory: what is needed rarely, for registers are what the kernels are short of.
template <class Traits>
struct TilePlace {
  RowView rows[Traits::kRows];
  KeyTiles<Traits> keys, values;
  int tile, head_kv, batch, piece;
  int num_rows;  // of the sequence and key head: s_q * group
};

template <class Traits>
struct ForwardTile {
  static constexpr int kRows = Traits::kRows;
  static constexpr int64_t kBytes = 2;

  ForwardLaunch const& launch;
  ForwardParams const& call;
  TilePlace<Traits>& place;
  int const warp = number(threadIdx.x / 32), lane = number(threadIdx.x % 32);

  __device__ ForwardTile(ForwardLaunch const& l, TilePlace<Traits>& p)
      : launch(l), call(l.call), place(p) {}

  // Tiles of few rows have registers to keep them in.
  __device__ static int number(int x) { return Traits::kFewRows ? kept(x) : x; }

  // Late rows see more keys and late segments are longer, so both go first.
  __device__ void find_place(int work) {
    if (threadIdx.x == 0) {
      bool const listed = launch.places != nullptr;
      Place const found = listed ? launch.places[work] : launch.plan.order.at(work);
      int const head_kv = launch.plan.order.head_of(found);
      int const batch = launch.plan.order.batch_of(found);
      place.head_kv = head_kv, place.batch = batch;
      place.tile = listed ? found.rank : launch.tiles.by - 1 - launch.tiles.remainder(found.rank);
      place.piece = listed ? 0 : launch.pieces.by - 1 - launch.tiles.quotient(found.rank);
      Sequence const s = sequence_of(call.layout, batch);
      place.num_rows = static_cast<int>(s.s_q) * launch.group.by;
      place.keys.set(call.layout, call.k, s, head_kv, launch.aligned);
      place.values.set(call.layout, call.v, s, head_kv, launch.aligned);
    }
    __syncthreads();  // the place is there
  }

  // Whether there is a row in this tile; then their views.
  __device__ bool find_rows() {
    // The last sequence of a pack: what lies behind it is its tiles' to write, if nobody else does.
    if (!launch.places && place.batch == call.layout.b - 1 && place.piece == 0) {
      write_the_rest(launch, place.head_kv, place.tile, launch.tiles.by);
    }
    int const first = place.tile * kRows, row = static_cast<int>(threadIdx.x);
    if (first >= place.num_rows) return false;
    if (row < kRows) {  // the query heads of a group are adjacent rows of the same query
      int const flat = first + row, query = launch.group.quotient(flat);
      int const head = place.head_kv * launch.group.by + launch.group.remainder(flat);
      place.rows[row] = flat < place.num_rows
                            ? view_row(call.score, sequence(), place.batch, query, head)
                            : RowView{};
    }
    __syncthreads();  // the rows are there
    return true;
  }

  __device__ Sequence sequence() const { return sequence_of(call.layout, place.batch); }

  // Rows of the tile that exist.
  __device__ int rows_here() const { return min(kRows, place.num_rows - place.tile * kRows); }

  __device__ int segment_begin(int segment) const {
    return static_cast<int>(launch.plan.segmentation.begin(segment));
  }
  // The keys of this piece that any row of the tile sees: rows ascend, so the first begins and the
  // last ends. From the begin of a load on, which no segment's begin cuts.
  __device__ contract::KeyRange keys() const {
    int const num_segments = static_cast<int>(launch.plan.segmentation.count(place.keys.s_k));
    int const begin = segment_begin(launch.pieces.quotient(num_segments * place.piece));
    int const end = segment_begin(launch.pieces.quotient(num_segments * (place.piece + 1)));
    return {max(begin, place.rows[0].begin & -Traits::kLoadKeys),
            min(end, place.rows[rows_here() - 1].end)};
  }

  // A row of the tile, of the tensor t; null: there is no such row.
  __device__ char* row_address(RowTensor const& t, int row) const {
    if (row >= rows_here()) return nullptr;
    return query_row(t, sequence(), place.rows[row].query, place.rows[row].head, kBytes);
  }

  __device__ int64_t lse_index(Sequence const& s, RowView const& row) const {
    return s.lse_base + row.head * call.layout.lse_head_stride + row.query;
  }

  // Two columns of a row of a closed segment's partial, from column `column` on.
  __device__ static void emit_pair(float* out, int column, int d, float x, float y) {
    if (d % 2 == 0 && column < d) {
      *reinterpret_cast<float2*>(out + column) = make_float2(x, y);
    } else {
      if (column < d) out[column] = x;
      if (column + 1 < d) out[column + 1] = y;
    }
  }
};

}  // namespace fa::sm80
