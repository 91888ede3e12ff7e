// A call against a cache in one step: accept, append, allocate, attend. As in fast_path.cpp, what
// it does not accept it hands back untouched.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <vector>

#include "csrc/acceptance.h"
#include "csrc/devices.h"
#include "csrc/results.h"

namespace {

using namespace fa::torch_side;

constexpr int64_t kMaxNumSplits = 128;

// The arguments of flash_attn_with_kvcache, as the op gets them.
struct CacheCall {
  Tensor q, k_cache, v_cache;
  OptionalTensor k{}, v{}, rotary_cos{}, rotary_sin{};
  OptionalTensor cache_seqlens;  // [b]
  int64_t cache_length;          // of all sequences, where there is no tensor; below zero: all rows
  OptionalTensor cache_batch_idx, cache_leftpad, block_table;
  std::optional<double> softmax_scale;
  bool causal;
  int64_t window_left, window_right;
  double softcap;
  bool rotary_interleaved = false;
  OptionalTensor alibi_slopes;
  int64_t num_splits;
  bool deterministic;

  int64_t b() const { return q.size(0); }
  int64_t s_new() const { return k ? k->size(1) : 0; }
  int64_t capacity() const {
    return block_table ? block_table->size(1) * k_cache.size(1) : k_cache.size(1);
  }
  // Rows in use before the append.
  int64_t start(int64_t i) const {
    return cache_seqlens      ? entries(*cache_seqlens)[i]
           : cache_length < 0 ? capacity()
                              : cache_length;
  }
  // Queries turn by their own positions under a causal or windowed mask, else all alike.
  bool rotates_by_position() const {
    auto const is_side = [&](int64_t side) { return side >= 0 && side < capacity(); };
    return causal || is_side(window_left) || is_side(window_right);
  }
};

// [begin, end) of the bytes that a tensor's elements lie in.
struct Span {
  char const *begin, *end;
  bool meets(Span const& other) const { return begin < other.end && other.begin < end; }
};
Span span_of(Tensor const& x) {
  int64_t last = 0;
  for (int64_t i = 0; i < x.dim(); ++i) last += (x.size(i) - 1) * x.stride(i);
  auto const* const begin = static_cast<char const*>(x.data_ptr());
  return {begin, begin + (last + 1) * (x.scalar_type() == ScalarType::Float ? 4 : 2)};
}

bool takes_new_keys(CacheCall const& c) {
  if (c.k.has_value() != c.v.has_value()) return false;
  if (!c.k) return true;
  bool const has_start = c.cache_seqlens || c.cache_length >= 0;
  if (!has_start || c.q.size(1) > c.capacity()) return false;
  std::array<int64_t, 4> const sizes{c.b(), c.k->size(1), c.k_cache.size(2), c.q.size(3)};
  for (Tensor const& x : {*c.k, *c.v}) {
    if (!like(x, c.q) || x.dim() != 4 || !is_in_columns(x)) return false;
    for (int64_t i = 0; i < 4; ++i)
      if (x.size(i) != sizes[static_cast<size_t>(i)]) return false;
  }
  // What is written shares no byte with itself or with what is read. Views that interlock are for
  // the rules in Python.
  if (!c.k_cache.is_contiguous() || !c.v_cache.is_contiguous()) return false;
  Span const k_cache = span_of(c.k_cache), v_cache = span_of(c.v_cache);
  if (k_cache.meets(v_cache)) return false;
  for (Tensor const& x : {c.q, *c.k, *c.v})
    if (k_cache.meets(span_of(x)) || v_cache.meets(span_of(x))) return false;
  return true;
}

bool takes_rotary(CacheCall const& c) {
  if (!c.rotary_cos && !c.rotary_sin) return true;
  if (!c.rotary_cos || !c.rotary_sin || !c.k) return false;
  for (Tensor const& table : {*c.rotary_cos, *c.rotary_sin})
    if (!like(table, c.q) || table.dim() != 2 || !table.is_contiguous()) return false;
  int64_t const rows = c.rotary_cos->size(0), dim = 2 * c.rotary_cos->size(1);
  return c.rotary_sin->size(0) == rows && 2 * c.rotary_sin->size(1) == dim && dim > 0 &&
         dim <= c.q.size(3) && dim % 16 == 0 && rows >= c.capacity();
}

// What the index tensors of a call on the CPU hold.
bool takes_contents(CacheCall const& c) {
  int64_t const capacity = c.capacity(), page_size = c.k_cache.size(1);
  // Two sequences may not append to one place: that takes a search.
  if (c.k && c.deterministic && (c.cache_batch_idx || c.block_table)) return false;
  int64_t longest = 0;
  for (int64_t i = 0; i < c.b(); ++i) {
    int64_t const start = c.start(i), keys = start + c.s_new();
    if (start < 0 || keys > capacity) return false;
    if (c.cache_batch_idx) {
      int32_t const row = entries(*c.cache_batch_idx)[i];
      if (row < 0 || row >= c.k_cache.size(0)) return false;
    }
    if (c.cache_leftpad) {
      int32_t const padding = entries(*c.cache_leftpad)[i];
      if (padding < 0 || padding > keys) return false;
    }
    if (c.block_table) {
      int32_t const* const row = entries(*c.block_table) + i * c.block_table->stride(0);
      if (!takes_pages(row, keys, page_size, c.k_cache.size(0))) return false;
    }
    longest = std::max(longest, start);
  }
  if (!c.rotary_cos) return true;
  int64_t const rotated = c.rotates_by_position() ? c.q.size(1) : 1;
  return longest + rotated - 1 < c.rotary_cos->size(0);
}

bool takes(CacheCall const& c) {
  if (!takes_qkv(c.q, c.k_cache, c.v_cache, 4, 4)) return false;
  if (!takes_scores(c.softmax_scale, c.softcap) || !takes_alibi(c.alibi_slopes, c.q, c.b()))
    return false;
  if (c.block_table) {
    if (!is_index(*c.block_table, c.q, 2) || c.block_table->size(0) != c.b()) return false;
    if (c.cache_leftpad || c.cache_batch_idx || !takes_page(c.k_cache.size(1), c.q)) return false;
  } else if (!c.cache_batch_idx && c.k_cache.size(0) < c.b()) {
    return false;
  }
  if (c.num_splits < 0 || c.num_splits > kMaxNumSplits || c.cache_length > c.capacity())
    return false;
  for (OptionalTensor const* const x : {&c.cache_seqlens, &c.cache_batch_idx, &c.cache_leftpad})
    if (*x && (!is_index(**x, c.q, 1) || (*x)->size(0) != c.b())) return false;
  if (!takes_new_keys(c) || !takes_rotary(c)) return false;
  return c.q.is_cpu() ? takes_contents(c) : !wants_contents_read(c.q);
}

template <void (*kAppend)(fa::AppendParams, int32_t device), void (*kAttend)(ForwardCall const&)>
std::vector<Tensor> run(CacheCall const& c) {
  if (!takes(c)) return {};
  Tensor q = c.q;
  if (c.k) {
    OptionalTensor rotated;
    if (c.rotary_cos) rotated = empty_like_q(q);
    fa::AppendParams append = append_params(
        q, rotated, *c.k, *c.v, c.k_cache, c.v_cache, c.cache_seqlens, c.cache_batch_idx,
        c.block_table, c.rotary_cos, c.rotary_sin, c.rotary_interleaved, c.rotates_by_position());
    append.start = c.cache_length;
    kAppend(append, q.get_device_index());
    if (rotated) q = *rotated;
  }
  ForwardCall call{
      .q = q, .k = c.k_cache, .v = c.v_cache, .out = empty_like_q(q), .lse = empty_lse(q)};
  call.seqused_k = c.cache_seqlens, call.new_keys = c.cache_seqlens ? c.s_new() : 0;
  call.leftpad_k = c.cache_leftpad;
  call.cache_batch_idx = c.cache_batch_idx, call.block_table = c.block_table;
  call.max_seqlen_q = q.size(1);
  call.max_seqlen_k = c.cache_seqlens ? c.capacity() : c.start(0) + c.s_new();
  call.softmax_scale = scale_of(c.softmax_scale, q), call.softcap = c.softcap;
  call.causal = c.causal, call.window_left = c.window_left, call.window_right = c.window_right;
  call.alibi_slopes = c.alibi_slopes;
  call.num_splits = c.num_splits, call.deterministic = c.deterministic;
  kAttend(call);
  return {call.out, call.lse};
}

template <void (*kAppend)(fa::AppendParams, int32_t device), void (*kAttend)(ForwardCall const&)>
std::vector<Tensor> attend_cache(Tensor q, Tensor k_cache, Tensor v_cache,
                                 OptionalTensor cache_seqlens, int64_t cache_length,
                                 OptionalTensor cache_batch_idx, OptionalTensor cache_leftpad,
                                 OptionalTensor block_table, std::optional<double> softmax_scale,
                                 bool causal, int64_t window_left, int64_t window_right,
                                 double softcap, OptionalTensor alibi_slopes, int64_t num_splits,
                                 bool deterministic) {
  return run<kAppend, kAttend>({.q = q,
                                .k_cache = k_cache,
                                .v_cache = v_cache,
                                .cache_seqlens = cache_seqlens,
                                .cache_length = cache_length,
                                .cache_batch_idx = cache_batch_idx,
                                .cache_leftpad = cache_leftpad,
                                .block_table = block_table,
                                .softmax_scale = softmax_scale,
                                .causal = causal,
                                .window_left = window_left,
                                .window_right = window_right,
                                .softcap = softcap,
                                .alibi_slopes = alibi_slopes,
                                .num_splits = num_splits,
                                .deterministic = deterministic});
}

template <void (*kAppend)(fa::AppendParams, int32_t device), void (*kAttend)(ForwardCall const&)>
std::vector<Tensor> append_and_attend_cache(
    Tensor q, Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, OptionalTensor rotary_cos,
    OptionalTensor rotary_sin, OptionalTensor cache_seqlens, int64_t cache_length,
    OptionalTensor cache_batch_idx, OptionalTensor cache_leftpad, OptionalTensor block_table,
    std::optional<double> softmax_scale, bool causal, int64_t window_left, int64_t window_right,
    double softcap, bool rotary_interleaved, OptionalTensor alibi_slopes, int64_t num_splits,
    bool deterministic) {
  return run<kAppend, kAttend>({.q = q,
                                .k_cache = k_cache,
                                .v_cache = v_cache,
                                .k = k,
                                .v = v,
                                .rotary_cos = rotary_cos,
                                .rotary_sin = rotary_sin,
                                .cache_seqlens = cache_seqlens,
                                .cache_length = cache_length,
                                .cache_batch_idx = cache_batch_idx,
                                .cache_leftpad = cache_leftpad,
                                .block_table = block_table,
                                .softmax_scale = softmax_scale,
                                .causal = causal,
                                .window_left = window_left,
                                .window_right = window_right,
                                .softcap = softcap,
                                .rotary_interleaved = rotary_interleaved,
                                .alibi_slopes = alibi_slopes,
                                .num_splits = num_splits,
                                .deterministic = deterministic});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(flash_attn_native, m) {
  m.def(
      "attend_cache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? cache_seqlens, "
      "int cache_length, Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? block_table, "
      "float? softmax_scale, bool causal, int window_left, int window_right, float softcap, "
      "Tensor? alibi_slopes, int num_splits, bool deterministic) -> Tensor[]");
  m.def(
      "append_and_attend_cache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, "
      "Tensor v, Tensor? rotary_cos, Tensor? rotary_sin, Tensor? cache_seqlens, int cache_length, "
      "Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? block_table, float? softmax_scale, "
      "bool causal, int window_left, int window_right, float softcap, bool rotary_interleaved, "
      "Tensor? alibi_slopes, int num_splits, bool deterministic) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(flash_attn_native, CPU, m) {
  m.impl("attend_cache", TORCH_BOX((&attend_cache<append_on_cpu, forward_on_cpu>)));
  m.impl("append_and_attend_cache",
         TORCH_BOX((&append_and_attend_cache<append_on_cpu, forward_on_cpu>)));
}

#if defined(FLASH_ATTN_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(flash_attn_native, CUDA, m) {
  m.impl("attend_cache", TORCH_BOX((&attend_cache<append_on_gpu, forward_on_gpu>)));
  m.impl("append_and_attend_cache",
         TORCH_BOX((&append_and_attend_cache<append_on_gpu, forward_on_gpu>)));
}
#endif
