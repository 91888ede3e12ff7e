// S_dmask = exp(score - the row's maximum), negative where dropped; for debugging only. A warp
// walks twice over the keys of its row, with plain products. It repeats the mask of the forward
// pass, and not its rounding.
#include "csrc/gpu/convert.cuh"
#include "csrc/gpu/errors.cuh"
#include "csrc/gpu/forward_launch.h"
#include "csrc/gpu/pack_tiles.h"
#include "csrc/gpu/score.cuh"

namespace fa::gpu {
namespace {

constexpr int kWarps = 4;

template <class Element>
__device__ float score_of(Element const* q, Element const* k, int d, ScoreScale const& scale,
                          RowView const& row, int key) {
  float product = 0.0f;
  for (int i = 0; i < d; ++i) product = fmaf(to_float(q[i]), to_float(k[i]), product);
  float tanh;
  return scale.shaped ? shape_score(product, scale, row, key, &tanh)
                      : product * scale.exponent_scale;
}

//   Grid    a warp for each row of the largest sequence, of each sequence and head.
//   Order   of no consequence: the result is for people who debug.
template <class Element>
__global__ __launch_bounds__(32 * kWarps) void dmask_kernel(
    __grid_constant__ ForwardParams const call, ScoreScale const scale) {
  LayoutParams const& layout = call.layout;
  int const lane = threadIdx.x % 32, d = static_cast<int>(layout.d);
  int64_t const index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  int const head = static_cast<int>(index % layout.h_q);
  int const query = static_cast<int>(index / layout.h_q % layout.s_q);
  int64_t const batch = index / layout.h_q / layout.s_q;
  if (batch >= layout.b) return;
  Sequence const s = sequence_of(layout, batch);
  if (query >= s.s_q) return;
  int const group = static_cast<int>(layout.h_q / layout.h_kv);
  RowView const row = view_row(call.score, s, static_cast<int>(batch), query, head);
  auto const* const q = reinterpret_cast<Element const*>(query_row(call.q, s, query, head, 2));
  KeyRows const keys = key_rows(call.k, layout, s, head / group, 2);
  auto const score = [&](int key) {
    if (keys.pages) {
      int64_t const page = page_of<int64_t>(keys.pages, keys.page_size, key);
      if (page < 0 || page >= layout.cache_rows) return 0.0f;
    }
    return score_of(q, reinterpret_cast<Element const*>(keys.row(key)), d, scale, row, key);
  };
  float top = -INFINITY;
  for (int key = row.begin + lane; key < row.end; key += 32) top = fmaxf(top, score(key));
  for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, step));
  uint64_t const dropout_key = philox_key(call.score.seed);
  Element* const out =
      static_cast<Element*>(call.s_dmask) +
      ((batch * layout.h_q + head) * call.s_dmask_rows + query) * call.s_dmask_cols;
  for (int key = row.begin + lane; key < row.end; key += 32) {
    float const p = exp2_of(score(key) - top);
    float2 const factor = dropout_factors(scale.keep, dropout_key, row, batch, key & ~1);
    bool const kept = (key % 2 == 0 ? factor.x : factor.y) != 0.0f;
    out[key] = round_to<Element>(kept ? p : -p);
  }
}

}  // namespace

void write_dmask(ForwardParams const& call, void* stream) {
  int64_t const rows = call.layout.b * call.layout.s_q * call.layout.h_q;
  if (rows == 0) return;
  auto const kernel =
      call.dtype == DType::kFloat16 ? dmask_kernel<__half> : dmask_kernel<__nv_bfloat16>;
  kernel<<<static_cast<unsigned>(checked_blocks((rows + kWarps - 1) / kWarps)), 32 * kWarps, 0,
           static_cast<cudaStream_t>(stream)>>>(call, ScoreScale::of(call.score));
  check(cudaGetLastError());
}

}  // namespace fa::gpu
