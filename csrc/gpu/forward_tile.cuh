// What the tiles of a forward pass have in common: which rows and keys a thread block has, and
// where they lie. A row of a tile is one query of one query head; the query heads of a group are
// adjacent rows of the same query.
#pragma once

#include "csrc/core/segmentation.h"
#include "csrc/gpu/forward_launch.h"
#include "csrc/gpu/score.cuh"
#include "csrc/gpu/uncovered_rows.cuh"
#include "csrc/gpu/warp.cuh"

namespace fa::gpu {

// What a tile needs rarely. It lies in shared memory, because the kernels are short of registers.
//   Keys  brings the keys, or values, of one sequence and key head:
//         set(layout, tensor, sequence, head_kv, aligned), s_k
template <class Traits, class Keys>
struct TileInfo {
  RowView rows[Traits::kRows];
  Keys keys, values;
  int tile, head_kv, batch, piece;
  int num_rows;  // of the sequence and key head: s_q * group
};

// Traits: kRows, kLoadKeys, kDecode.
template <class Traits, class Keys>
struct ForwardTile {
  static constexpr int kRows = Traits::kRows;
  static constexpr int64_t kBytes = 2;

  ForwardLaunch const& launch;
  ForwardParams const& call;
  TileInfo<Traits, Keys>& info;
  int const warp = number(threadIdx.x / 32), lane = number(threadIdx.x % 32);

  __device__ ForwardTile(ForwardLaunch const& l, TileInfo<Traits, Keys>& p)
      : launch(l), call(l.call), info(p) {}

  // A decode has registers to spare for these numbers.
  __device__ static int number(int x) { return Traits::kDecode ? kept(x) : x; }

  // Late rows see more keys and late segments are longer, so both go first.
  __device__ void find_work(int work) {
    if (threadIdx.x == 0) {
      bool const listed = launch.work_list != nullptr;
      WorkItem const found = listed ? launch.work_list[work] : launch.plan.order.at(work);
      int const head_kv = launch.plan.order.head_of(found);
      int const batch = launch.plan.order.batch_of(found);
      info.head_kv = head_kv, info.batch = batch;
      info.tile = listed ? found.rank : launch.tiles.by - 1 - launch.tiles.remainder(found.rank);
      info.piece = listed ? 0 : launch.pieces.by - 1 - launch.tiles.quotient(found.rank);
      Sequence const s = sequence_of(call.layout, batch);
      info.num_rows = static_cast<int>(s.s_q) * launch.group.by;
      info.keys.set(call.layout, call.k, s, head_kv, launch.aligned);
      info.values.set(call.layout, call.v, s, head_kv, launch.aligned);
    }
    __syncthreads();  // info is there
  }

  // Whether the tile has a row. If so, looks at all of its rows.
  __device__ bool find_rows() {
    // The tiles of the last sequence write the rows behind it, unless a kernel of its own does.
    if (!launch.work_list && info.batch == call.layout.b - 1 && info.piece == 0) {
      write_uncovered_rows(launch, info.head_kv, info.tile, launch.tiles.by);
    }
    int const first = info.tile * kRows, row = static_cast<int>(threadIdx.x);
    if (first >= info.num_rows) return false;
    if (row < kRows) {
      int const flat = first + row, query = launch.group.quotient(flat);
      int const head = info.head_kv * launch.group.by + launch.group.remainder(flat);
      info.rows[row] = flat < info.num_rows
                           ? view_row(call.score, sequence(), info.batch, query, head)
                           : RowView{};
    }
    __syncthreads();  // the rows are there
    return true;
  }

  __device__ Sequence sequence() const { return sequence_of(call.layout, info.batch); }

  // Rows of the tile that exist.
  __device__ int rows_here() const { return min(kRows, info.num_rows - info.tile * kRows); }

  __device__ int segment_begin(int segment) const {
    return static_cast<int>(launch.plan.segmentation.begin(segment));
  }
  // The keys of this piece that any row of the tile sees. Rows ascend, so the first row begins the
  // range and the last row ends it. It begins where a load begins; no segment begins inside a load.
  __device__ contract::KeyRange keys() const {
    int const num_segments = static_cast<int>(launch.plan.segmentation.count(info.keys.s_k));
    int const begin = segment_begin(launch.pieces.quotient(num_segments * info.piece));
    int const end = segment_begin(launch.pieces.quotient(num_segments * (info.piece + 1)));
    return {max(begin, info.rows[0].begin & -Traits::kLoadKeys),
            min(end, info.rows[rows_here() - 1].end)};
  }

  // A row of the tile, of the tensor t; null: there is no such row.
  __device__ char* row_address(RowTensor const& t, int row) const {
    if (row >= rows_here()) return nullptr;
    return query_row(t, sequence(), info.rows[row].query, info.rows[row].head, kBytes);
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

}  // namespace fa::gpu
