// dQ, dK and dV in one walk: a tile of keys, and for each query head of its group in ascending
// order the blocks of queries that see it, descending. Behind a causal mask the first queries of a
// tile see no later tile: a thread block that started with them would wait for the tiles before it.
//
// P and dS go through shared memory, because every product takes them by other rows. dK and dV stay
// in registers. The parts of dQ are added in memory, tiles of keys ascending (gpu/turns.cuh).
#pragma once

#include "csrc/gpu/backward_launch.h"
#include "csrc/gpu/score_gradient.cuh"
#include "csrc/gpu/turns.cuh"
#include "csrc/sm80/backward_traits.h"
#include "csrc/sm80/product.cuh"

namespace fa::gpu::sm80 {

// Blocks of queries before a sequence's first, in the sums of dQ.
__device__ __forceinline__ int64_t first_sum_block(LayoutParams const& layout, Sequence const& s,
                                                   int64_t batch) {
  return layout.cu_seqlens_q ? s.first_query / kSumQueries + batch
                             : batch * ((layout.s_q + kSumQueries - 1) / kSumQueries);
}

// Where a thread block works, in shared memory: registers are short.
struct KeyWalkInfo {
  int ticket;
  Sequence sequence;
  char const *q, *dout;      // row 0 of the sequence and of head 0
  float const *lse, *delta;  // (head 0, query 0)
  int64_t first_sums;        // block of dQ's sums that (head 0, query 0) lies in
};

// Queries [query, query + kQueries) of one head.
struct WalkStep {
  int head, query;
};

template <class Traits>
struct KeyWalk {
  using Element = typename Traits::Element;
  static constexpr int kD = Traits::kD, kKeys = Traits::kKeys, kQueries = Traits::kQueries;
  static constexpr int kScoreKeys = Traits::kScoreKeys, kScoreGroups = kScoreKeys / 8;
  static constexpr int kScoreTiles = Traits::kScoreTiles, kScoreRows = 16 * kScoreTiles;
  static constexpr int kKeyParts = Traits::kKeyParts, kQueryParts = Traits::kQueryParts;
  static constexpr int kQueryTiles = Traits::kQueryTiles, kWarpRows = kKeys / Traits::kWarps;
  static constexpr int kWarpQueries = kQueries / Traits::kWarps;
  static constexpr int kSteps = Traits::kSteps;
  static constexpr int64_t kBytes = 2;
  // When to let the next tile add. The thread that does so waits until its additions have reached
  // the memory, and at the next barrier all threads wait for it. So it comes early where another
  // thread block fills the pause, and else at the start of the longest stretch without a barrier.
  static constexpr bool kPassesEarly = Traits::kBlocksPerSm > 1;
  using Scores = Product<kScoreTiles, kScoreGroups>;  // (16 kScoreTiles queries, kScoreKeys)
  using KeyPart = Product<2, kD / 8 / kKeyParts>;     // (32 keys, kD / kKeyParts)
  using QueryPart = Product<kQueryTiles, kD / 8 / kQueryParts>;
  static_assert(sizeof(KeyWalkInfo) <= Traits::kInfoBytes);

  BackwardLaunch const& launch;
  BackwardParams const& call;
  char* const memory;
  KeyWalkInfo& at;
  int const warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int s_q, s_k, first_key, end_head;
  int begin, end;  // queries that see a key of the tile

  __device__ KeyWalk(BackwardLaunch const& l, char* m)
      : launch(l), call(l.call), memory(m), at(*reinterpret_cast<KeyWalkInfo*>(m)) {}

  // Tiles: k, v (kKeys, kD), p, ds (kQueries, kKeys); of a stage q, dout (kQueries, kD).
  __device__ uint32_t k() const { return shared_address(memory) + Traits::kInfoBytes; }
  __device__ uint32_t v() const { return k() + Traits::kKeyBytes; }
  __device__ uint32_t p() const { return v() + Traits::kKeyBytes; }
  __device__ uint32_t ds() const { return p() + Traits::kScoreBytes; }
  __device__ uint32_t q(int stage) const {
    return ds() + Traits::kScoreBytes + stage * Traits::kStageBytes;
  }
  __device__ uint32_t dout(int stage) const { return q(stage) + Traits::kQueryBytes; }
  __device__ float* row_values(int stage) const {  // lse, then delta
    return reinterpret_cast<float*>(memory + (dout(stage) - shared_address(memory)) +
                                    Traits::kQueryBytes);
  }

  __device__ void run() {
    LayoutParams const& layout = call.layout;
    int const h_kv = static_cast<int>(layout.h_kv);
    if (threadIdx.x == 0) at.ticket = atomicAdd(launch.next_ticket, 1);  // integer
    __syncthreads();                                                     // the ticket is there
    WorkItem const work = launch.work_of(at.ticket, key_tiles(layout, kKeys), h_kv);
    int const head_kv = launch.order.head_of(work), batch = launch.order.batch_of(work);
    if (threadIdx.x == 0) {
      Sequence const s = sequence_of(layout, batch);
      at.sequence = s;
      at.q = query_row(call.q, s, 0, 0, kBytes);
      at.dout = query_row(call.dout, s, 0, 0, kBytes);
      at.lse = call.lse + s.lse_base;
      at.delta = call.delta + delta_base(call, s, batch);
      at.first_sums = first_sum_block(layout, s, batch);
    }
    __syncthreads();  // the sequence is there
    TileMask const mask(call.score, at.sequence);
    s_q = mask.s_q, s_k = mask.s_k;
    first_key = work.rank * kKeys;  // tiles ascending: each waits for those that started before it
    if (first_key >= s_k) return;
    int const group = static_cast<int>(layout.h_q) / h_kv;
    int const last_key = min(first_key + kKeys, s_k) - 1;
    begin = max(first_key - mask.highest, 0), end = min(last_key - mask.lowest + 1, s_q);
    end_head = (head_kv + 1) * group;
    WalkStep const first{begin < end ? head_kv * group : end_head, (end - 1) & -kSumQueries};
    walk(kSteps == 1 || is_seen(first) ? first : after(first), mask, head_kv, batch);
  }

  // Blocks descend, and the steps of a block ascend. Steps that see nothing of the tile are left
  // out.
  __device__ __forceinline__ WalkStep after(WalkStep step) const {
    do {
      int const block = step.query & -kSumQueries;
      if (kSteps > 1 && step.query + kQueries < block + kSumQueries) {
        step.query += kQueries;
      } else if (block > begin) {
        step.query = block - kSumQueries;
      } else {
        step = {step.head + 1, (end - 1) & -kSumQueries};
      }
    } while (kSteps > 1 && !over(step) && !is_seen(step));
    return step;
  }
  __device__ __forceinline__ bool is_seen(WalkStep step) const {
    return step.query < end && step.query + kQueries > begin;
  }
  __device__ __forceinline__ bool over(WalkStep step) const { return step.head >= end_head; }
  // Which part of dQ's sums a step adds to.
  __device__ __forceinline__ int64_t sums(WalkStep step) const {
    return (step.head * launch.sums.blocks + at.first_sums) * kSteps + step.query / kQueries;
  }
  // The keys that queries of a step see lie in tiles first, ..., last. These add in this order.
  __device__ __forceinline__ int first_tile(WalkStep step, TileMask const& mask) const {
    return max(step.query + mask.lowest, 0) / kKeys;
  }
  __device__ __forceinline__ int last_tile(WalkStep step, TileMask const& mask) const {
    return min(min(step.query + kQueries, s_q) - 1 + mask.highest, s_k - 1) / kKeys;
  }

  // Queries that do not exist are zeros, and their scores are masked.
  __device__ __forceinline__ void load_queries(WalkStep step, int stage) const {
    int const own = warp * kWarpQueries, first = step.query + own;
    auto const fill = [&](uint32_t tile, char const* base, RowTensor const& t) {
      fill_even_rows<kD, kWarpQueries, Traits::kAnyAddress>(
          tile, own, base + (first * t.row_stride + step.head * t.head_stride) * kBytes,
          t.row_stride * kBytes, s_q - first, static_cast<int>(call.layout.d), launch.aligned,
          lane);
    };
    fill(q(stage), at.q, call.q);
    fill(dout(stage), at.dout, call.dout);
    int const thread = static_cast<int>(threadIdx.x), query = step.query + thread % kQueries;
    if (thread < Traits::kRowValues) {
      float const* const from = thread < kQueries ? at.lse + step.head * call.layout.lse_head_stride
                                                  : at.delta + step.head * call.delta_head_stride;
      cp_async_4(shared_address(row_values(stage) + thread), from + query, query < s_q);
    }
    cp_async_commit();
  }

  __device__ void walk(WalkStep step, TileMask const& mask, int head_kv, int batch) {
    fill_keys(k(), call.k, head_kv);
    fill_keys(v(), call.v, head_kv);
    cp_async_commit();
    uint64_t dropout_key = 0;
    if (Traits::kFeatures && launch.scale.drops) dropout_key = philox_key(call.score.seed);
    KeyPart dk, dv;
    set_zero(dk);
    set_zero(dv);
    int stage = 0;
    Turns added{};  // of the block that this thread block added to last
    auto const pass_on = [&] {
      if (threadIdx.x == 0 && added.count) added.pass_on();
    };
    if (!over(step)) load_queries(step, 0);
#pragma unroll 1
    while (!over(step)) {  // heads ascending, in each blocks of queries descending
      WalkStep const next = after(step);
      cp_async_wait<0>();
      __syncthreads();  // the queries are there for all, and nobody reads those before any more
      Turns const turns{launch.sums.turns + sums(step)};
      int const tile = first_key / kKeys, turn = tile - first_tile(step, mask);
      bool const last = tile == last_tile(step, mask);
      auto const in_between = [&] {
        // In front of the copies, or it would wait for them too.
        if (kPassesEarly) pass_on();
        if (launch.stages == 2 && !over(next)) load_queries(next, stage ^ 1);
      };
      scores(step, stage, warp, mask, batch, dropout_key, in_between);
#pragma unroll
      for (int part = 1; part < Traits::kScoreParts; ++part) {
        scores(step, stage, warp + part * Traits::kWarps, mask, batch, dropout_key, [] {});
      }
      if (threadIdx.x == 0 && last) turns.wait_for(turn);
      __syncthreads();  // P and dS are there; the last tile reads sums, so they have to be
      if (!kPassesEarly) pass_on();
      added = turns;
      int const seen = lane == 0 && !last ? turns.look() : turn;
      multiply_scores(dv, p(), dout(stage));
      multiply_scores(dk, ds(), q(stage));
      QueryPart dq;
      multiply_keys(dq);
      if (last) {
        __syncthreads();  // all have read these queries: their room is the sums'
        load_sums(step, stage, turn == 0);
        cp_async_wait<0>();
        add_sums(dq, stage);
        store_queries(dq, step);
      } else {
        if (seen < turn) turns.wait_for(turn);
        __syncwarp();  // it is this tile's turn
        hand_on(dq, step, turn == 0);
      }
      if (launch.stages == 2) {
        stage ^= 1;
      } else {
        __syncthreads();  // all have read the queries
        if (!over(next)) load_queries(next, 0);
      }
      step = next;
    }
    cp_async_wait<0>();
    __syncthreads();  // all have added to dQ, and read the keys: their room is the results' now
    pass_on();
    put(k(), dk, static_cast<float>(call.score.softmax_scale));
    put(v(), dv, 1.0f);
    __syncthreads();  // the rows are complete
    store_keys(k(), call.dk, head_kv);
    store_keys(v(), call.dv, head_kv);
  }

  __device__ void fill_keys(uint32_t tile, RowTensor const& t, int head_kv) const {
    KeyRows const rows = key_rows(t, call.layout, at.sequence, head_kv, kBytes);
    int const own = warp * kWarpRows, key = first_key + own;
    fill_even_rows<kD, kWarpRows, Traits::kAnyAddress>(tile, own, rows.row(key), rows.row_bytes,
                                                       s_k - key, static_cast<int>(call.layout.d),
                                                       launch.aligned, lane);
  }

  // P (for dV) and dS of one of eight parts, into their tiles. between() runs between the two
  // products.
  template <class Between>
  __device__ __forceinline__ void scores(WalkStep step, int stage, int part, TileMask const& mask,
                                         int batch, uint64_t dropout_key,
                                         Between const& between) const {
    int const row = part / 4 * kScoreRows, column = part % 4 * kScoreKeys;
    int const query = step.query + row, key = first_key + column;
    int const thread_row = row + lane / 4, thread_key = key + lane % 4 * 2;
    Scores s, dp;
    multiply_abt<Element, kD>(s, q(stage), row, k(), column, lane);
    between();
    multiply_abt<Element, kD>(dp, dout(stage), row, v(), column, lane);
    if (!mask.every(query, query + kScoreRows, key, key + kScoreKeys)) {
      mask_scores(s, dp, [&](int r, int n) {
        return mask.sees(step.query + thread_row + r, thread_key + n);
      });
    }
    float const alibi_slope =
        Traits::kFeatures && call.score.alibi
            ? call.score.alibi[batch * call.score.alibi_batch_stride + step.head] * kLog2E
            : 0.0f;
    float const* const values = row_values(stage) + thread_row;
#pragma unroll
    for (int r = 0; r < 2 * kScoreTiles; ++r) {
      int const below = r / 2 * 16 + r % 2 * 8;
      float const lse_log2 = values[below] * kLog2E, delta = values[kQueries + below];
      RowView view;
      view.query = step.query + thread_row + below, view.head = step.head;
      view.diagonal = view.query + mask.offset, view.alibi_slope = alibi_slope;
#pragma unroll
      for (int n = 0; n < kScoreGroups; ++n) {
        float (&x)[4] = s[r / 2][n];
        float (&y)[4] = dp[r / 2][n];
        float2 keep = make_float2(1.0f, 1.0f);
        if (Traits::kFeatures && launch.scale.drops) {
          keep = dropout_factors(launch.scale.keep, dropout_key, view, batch, thread_key + n * 8);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          gradient_of_score<Traits::kFeatures>(x[r % 2 * 2 + i], y[r % 2 * 2 + i], lse_log2, delta,
                                               launch.scale, view, thread_key + n * 8 + i,
                                               i == 0 ? keep.x : keep.y);
        }
        uint32_t const to =
            TileLayout<kKeys>::offset(thread_row + below, column / kChunk + n) + lane % 4 * 4;
        store_pair(p() + to, pack2<Element>(x[r % 2 * 2], x[r % 2 * 2 + 1]));
        store_pair(ds() + to, pack2<Element>(y[r % 2 * 2], y[r % 2 * 2 + 1]));
      }
    }
  }

  // This warp's part of a gradient of keys += x^T b, x (kQueries, kKeys), b (kQueries, kD).
  __device__ __forceinline__ void multiply_scores(KeyPart& c, uint32_t x, uint32_t b) const {
    int const group = warp % Traits::kKeyGroups, part = warp / Traits::kKeyGroups;
    auto const a_at = cursor_a_transposed<kKeys>(x, lane, group * (32 / kChunk));
    auto const b_at = cursor_b_transposed<kD>(b, 0, lane, 2 * part);
    accumulate<Element, kQueries>(
        c, [&](int i, int t, uint32_t (&to)[4]) { ldmatrix_x4_trans(to, a_at.at(i * 16, 2 * t)); },
        [&](int i, int n, uint32_t (&to)[4]) {
          ldmatrix_x4_trans(to, b_at.at(i * 16, 2 * kKeyParts * n));
        });
  }

  // dq = dS K, this warp's part.
  __device__ __forceinline__ void multiply_keys(QueryPart& dq) const {
    set_zero(dq);
    auto const a_at = cursor_a<kKeys>(ds(), first_query(), lane);
    auto const b_at = cursor_b_transposed<kD>(k(), 0, lane, 2 * query_part());
    accumulate<Element, kKeys>(
        dq, [&](int i, int t, uint32_t (&to)[4]) { ldmatrix_x4(to, a_at.at(t * 16, 2 * i)); },
        [&](int i, int n, uint32_t (&to)[4]) {
          ldmatrix_x4_trans(to, b_at.at(i * 16, 2 * kQueryParts * n));
        });
  }
  // Of this warp's part: its first query, in the block, and which columns it has.
  __device__ __forceinline__ int first_query() const {
    return warp % Traits::kQueryGroups * 16 * kQueryTiles;
  }
  __device__ __forceinline__ int query_part() const { return warp / Traits::kQueryGroups; }

  // Calls f(vector, its elements of dq) for each vector of sums that this thread has.
  template <class Function>
  __device__ __forceinline__ static void for_vectors(QueryPart& dq, Function const& f) {
    constexpr int kGroups = kD / 8 / kQueryParts;
#pragma unroll
    for (int t = 0; t < kQueryTiles; ++t)
#pragma unroll
      for (int n = 0; n < kGroups; ++n) f((t * kGroups + n) * Traits::kThreads, dq[t][n]);
  }
  __device__ __forceinline__ float4* sums_of(WalkStep step) const {
    return launch.sums.sums + sums(step) * (kQueries * kD / 4) + threadIdx.x;
  }

  // Brings what earlier tiles have added to where the queries and dout of this stage were.
  __device__ __forceinline__ void load_sums(WalkStep step, int stage, bool none) const {
    float4 const* const from = sums_of(step);
    uint32_t const to = q(stage) + threadIdx.x * 16;
#pragma unroll
    for (int i = 0; i < kQueries * kD / 4; i += Traits::kThreads) {
      cp_async_16(to + i * 16, from + i, !none);
    }
    cp_async_commit();
  }
  // dq += what earlier tiles have added, rounded as an addition in memory. Which tile is the last
  // depends on other rows of the step, so it must not reach a bit.
  __device__ __forceinline__ void add_sums(QueryPart& dq, int stage) const {
    uint32_t const from = q(stage) + threadIdx.x * 16;
    for_vectors(dq, [&](int vector, float (&x)[4]) {
      uint4 const sum = load_chunk(from + vector * 16);
      x[0] = add_as_memory(__uint_as_float(sum.x), x[0]);
      x[1] = add_as_memory(__uint_as_float(sum.y), x[1]);
      x[2] = add_as_memory(__uint_as_float(sum.z), x[2]);
      x[3] = add_as_memory(__uint_as_float(sum.w), x[3]);
    });
  }
  // Adds dq to the sums in memory; the first tile stores it there.
  __device__ __forceinline__ void hand_on(QueryPart& dq, WalkStep step, bool first) const {
    float4* const to = sums_of(step);
    if (first) {
      for_vectors(dq, [&](int vector, float (&x)[4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = add_as_memory(0.0f, x[i]);
        __stcg(to + vector, make_float4(x[0], x[1], x[2], x[3]));
      });
    } else {
      for_vectors(dq, [&](int vector, float (&x)[4]) {
        add_to_memory(to + vector, make_float4(x[0], x[1], x[2], x[3]));
      });
    }
  }

  __device__ __forceinline__ void store_queries(QueryPart const& dq, WalkStep step) const {
    float const scale = static_cast<float>(call.score.softmax_scale);
    int const d = static_cast<int>(call.layout.d), first_row = first_query(), part = query_part();
#pragma unroll
    for (int r = 0; r < 2 * kQueryTiles; ++r) {
      int const query = step.query + first_row + r / 2 * 16 + r % 2 * 8 + lane / 4;
      if (query >= s_q) continue;
      uint16_t* const row =
          reinterpret_cast<uint16_t*>(query_row(call.dq, at.sequence, query, step.head, kBytes));
#pragma unroll
      for (int n = 0; n < kD / 8 / kQueryParts; ++n) {
        int const column = (n / 2 * kQueryParts + part) * 16 + n % 2 * 8 + lane % 4 * 2;
        float const(&x)[4] = dq[r / 2][n];
        // Adding +0 gives all zeros one sign.
        uint32_t const both = with_common_nan<Element>(
            pack2<Element>(fmaf(x[r % 2 * 2], scale, 0.0f), fmaf(x[r % 2 * 2 + 1], scale, 0.0f)));
        if (!Traits::kAnyAddress || launch.aligned) {
          if (column < d) *reinterpret_cast<uint32_t*>(row + column) = both;
        } else {
          if (column < d) row[column] = static_cast<uint16_t>(both);
          if (column + 1 < d) row[column + 1] = static_cast<uint16_t>(both >> 16);
        }
      }
    }
  }

  // This warp's part of a gradient of keys, times factor, into a tile (kKeys, kD).
  __device__ __forceinline__ void put(uint32_t tile, KeyPart const& c, float factor) const {
    int const group = warp % Traits::kKeyGroups, part = warp / Traits::kKeyGroups;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      int const row = group * 32 + r / 2 * 16 + r % 2 * 8 + lane / 4;
#pragma unroll
      for (int n = 0; n < kD / 8 / kKeyParts; ++n) {
        float const(&x)[4] = c[r / 2][n];
        int const chunk = (n / 2 * kKeyParts + part) * 2 + n % 2;
        store_pair(
            tile + TileLayout<kD>::offset(row, chunk) + lane % 4 * 4,
            pack2<Element>(fmaf(x[r % 2 * 2], factor, 0.0f), fmaf(x[r % 2 * 2 + 1], factor, 0.0f)));
      }
    }
  }

  __device__ void store_keys(uint32_t tile, RowTensor const& t, int head_kv) const {
    int const own = warp * kWarpRows, key = first_key + own + lane;
    KeyRows const rows = key_rows(t, call.layout, at.sequence, head_kv, kBytes);
    char* const to = lane < kWarpRows && key < s_k ? rows.row(key) : nullptr;
    store_rows<Element, kD, kWarpRows, Traits::kAnyAddress>(
        tile, to, own, static_cast<int>(call.layout.d), launch.aligned, lane);
  }
};

// All gradients of heads up to d = 128.
//   Grid    a thread block for each tile of kKeys keys of each key head and sequence. It takes the
//           next ticket when it starts, so that it waits only for those that have started.
//   Threads four warps up to d = 64, else eight.
//   Shared  the tile's keys and values, P and dS of a step, one or two steps of queries and dout.
//   Order   dK, dV: query heads ascend, blocks of queries descend, queries in a block ascend. dQ:
//           tiles of keys ascend (contract.h, GpuOrder::gradients).
//   Needs   lse, delta, zero counters; 16-bit elements with d = d_v up to kD; without kFeatures
//           aligned rows.
template <class Traits>
__global__ __launch_bounds__(Traits::kThreads, Traits::kBlocksPerSm) void key_walk_kernel(
    __grid_constant__ BackwardLaunch const launch) {
  extern __shared__ __align__(128) char memory[];
  KeyWalk<Traits>(launch, memory).run();
}

}  // namespace fa::gpu::sm80
