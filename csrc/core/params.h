// Plain descriptions of one call: every pointer with its shape, strides in elements, and whether it
// may be null. Letters: b batch, s_q queries, s_k keys, h_q query heads, h_kv key heads, d head
// dim, t tokens of a packed batch.
#pragma once

#include <cstdint>

#include "csrc/core/host_device.h"

namespace fa {

// In rng_state's second entry: the forward pass ran in deterministic mode. Offsets stay below it.
constexpr int64_t kDeterministicBit = int64_t{1} << 62;

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// A tensor of rows: element (batch, position, head, column); the columns are contiguous.
// Packed (varlen) tensors have batch_stride 0 and add their sequence's first token to the position.
struct RowTensor {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
};

// What the mask and the score are made of; the same for every row of a call.
struct ScoreParams {
  double softmax_scale = 1.0;
  double softcap = 0.0;            // 0: none; else score = softcap * tanh(q.k * scale / softcap)
  int64_t window_left = -1;        // keys to the left of the diagonal, negative: unlimited
  int64_t window_right = -1;       // keys to the right of it; causal is 0
  float const* alibi = nullptr;    // [h_q] or [b, h_q], fp32, may be null
  int64_t alibi_batch_stride = 0;  // 0 for [h_q]
  double dropout_p = 0.0;          // probability to drop, 0: none
  int64_t const* seed = nullptr;   // [2] the generator's seed and offset, null without dropout
};

constexpr int64_t kUnbounded = INT64_MAX;

// Which call a fault is told of (core/faults.h).
enum class Caller : int { kVarlen, kVarlenBackward, kCache };

// Where the sequences of a batch lie.
struct LayoutParams {
  int64_t b = 0, h_q = 0, h_kv = 0;
  int64_t d = 0, d_v = 0;                 // head dims of q and k, and of v and out
  int64_t s_q = 0, s_k = 0;               // dense extents, or the largest lengths of a packed batch
  int32_t const* cu_seqlens_q = nullptr;  // [b + 1], null: dense
  int32_t const* cu_seqlens_k = nullptr;  // [b + 1], null: dense or paged
  int32_t const* seqused_k = nullptr;     // [b] keys in use (left padding included), may be null
  int64_t new_keys = 0;  // of each sequence, appended by this call: seqused_k does not count them
  int32_t const* leftpad_k = nullptr;        // [b] rows to skip at the front, may be null
  int32_t const* cache_batch_idx = nullptr;  // [b] row of the cache to use, may be null
  int32_t const* block_table = nullptr;      // [b, max_pages], null: not paged
  int64_t block_table_stride = 0;
  int64_t page_size = 0;
  // What the tensors hold, so that no index can lead outside them.
  int64_t total_q = kUnbounded;     // tokens of a packed q, or s_q
  int64_t total_k = kUnbounded;     // tokens of a packed k, or rows of one sequence in the cache
  int64_t cache_rows = kUnbounded;  // batch rows of k, or pages
  uint64_t* faults = nullptr;       // where a kernel writes a Fault, null: nobody reads it
  Caller caller = Caller::kVarlen;
  int64_t lse_batch_stride = 0;  // dense: h_q * s_q; packed: 0
  int64_t lse_head_stride = 0;   // dense: s_q; packed: total queries

  // (head, query) pairs of the call: rows of lse, and of one segment's partials.
  int64_t lse_rows() const { return cu_seqlens_q ? h_q * lse_head_stride : b * lse_batch_stride; }
};

// How a call is scheduled. In deterministic mode nothing here can change a bit.
struct PlanParams {
  bool deterministic = false;
  int64_t num_splits = 0;  // 0: as the heuristic pleases
};

// Partials, one per segment and row, for a reduction outside the kernel. Row r of a segment is the
// row's lse index.
struct PartialBuffers {
  float* out = nullptr;       // [n_segments, rows, d_v], relative to max_log2 and not normalised
  float* max_log2 = nullptr;  // [n_segments, rows], log2 units, -inf: saw nothing; an integer where
                              // the row sees keys of several segments
  float* sum = nullptr;       // [n_segments, rows]
  int64_t rows = 0;           // rows of one segment
};

struct ForwardParams {
  DType dtype = DType::kFloat32;
  LayoutParams layout;
  ScoreParams score;
  PlanParams plan;
  RowTensor q;           // [b, s_q, h_q, d]
  RowTensor k, v;        // [b, s_k, h_kv, d or d_v]; paged: [pages, page_size, h_kv, d or d_v]
  RowTensor out;         // [b, s_q, h_q, d_v]
  float* lse = nullptr;  // [b, h_q, s_q] or [h_q, t], natural log
  void* s_dmask =
      nullptr;  // [b, h_q, s_dmask_rows, s_dmask_cols] in dtype, zeroed by the caller; may be null
  int64_t s_dmask_rows = 0, s_dmask_cols = 0;
  int64_t* rng_state = nullptr;  // [2] receives seed, and offset with the mode; may be null
  PartialBuffers partials;       // out null: fold inside the kernel
};

struct BackwardParams {
  DType dtype = DType::kFloat32;
  LayoutParams layout;
  ScoreParams score;
  RowTensor q, k, v, out, dout;  // as in the forward pass, dout as out
  RowTensor dq, dk, dv;          // gradients, as q, k, v
  float const* lse = nullptr;    // as in the forward pass
  float* delta = nullptr;  // row sums of dout * out: [b, h_q, s_q rounded up] or [h_q, t + 128 b]
  int64_t delta_batch_stride = 0, delta_head_stride = 0, delta_sequence_pad = 0;
};

// New keys and values for a cache, and the rotation of queries and new keys.
struct AppendParams {
  DType dtype = DType::kFloat32;
  int64_t b = 0, s_q = 0, s_new = 0, h_q = 0, h_kv = 0;
  int64_t d = 0, d_v = 0;      // as in LayoutParams
  RowTensor q, q_rotated;      // [b, s_q, h_q, d]; rotated copy only when cos is given
  RowTensor k_new, v_new;      // [b, s_new, h_kv, d or d_v]
  RowTensor k_cache, v_cache;  // [rows, capacity, h_kv, d or d_v] or [pages, page_size, h_kv, ...]
  int32_t const* cache_seqlens = nullptr;    // [b] rows in use before the append, null: `start`
  int64_t start = 0;                         // of all sequences
  int32_t const* cache_batch_idx = nullptr;  // [b], may be null
  int32_t const* block_table = nullptr;      // [b, max_pages], may be null
  int64_t block_table_stride = 0, page_size = 0;
  int64_t capacity = 0;        // positions of one sequence in the cache
  int64_t cache_rows = 0;      // rows of the cache, or pages
  int64_t rotary_rows = 0;     // s_rotary
  uint64_t* faults = nullptr;  // as in LayoutParams
  void const* cos = nullptr;   // [s_rotary, rotary_dim / 2] in dtype, may be null: no rotation
  void const* sin = nullptr;
  int64_t rotary_dim = 0;
  bool interleaved = false;         // pairs (0, 1), (2, 3) ... instead of (i, i + rotary_dim / 2)
  bool rotate_by_position = false;  // query i turns by cache_seqlens + i; else all by cache_seqlens

  FA_HOST_DEVICE int64_t start_of(int64_t b) const {
    return cache_seqlens ? cache_seqlens[b] : start;
  }
};

}  // namespace fa
