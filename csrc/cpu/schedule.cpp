// Who computes what, and when: tiles of queries, segments side by side or one after another, on how
// many threads.
//
// In deterministic mode every choice made here is free of consequences for the bits (segments lie
// on the contract's ladder and are folded in ascending order). In standard mode the number of
// splits adapts to the batch and to the threads, as it does upstream, and so does their extent.
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "csrc/core/sequence.h"
#include "csrc/cpu/family.h"
#include "csrc/cpu/tasks.h"

namespace fa::cpu {
namespace {

constexpr int64_t kMaxTileRows =
    192;  // 192 x 128 fp32 of q, o and the fold: 300 KB, within an L2 cache
constexpr int64_t kMinTileRows = 48;    // below this, packing keys costs more than idle threads do
constexpr int64_t kMaxHeads = 8;        // 8 x 128 fp32 lie in one page
constexpr int64_t kTasksPerThread = 2;  // enough tasks for threads to even out
constexpr int64_t kMaxPartialFloats =
    16 * 1024 * 1024;  // 64 MiB of partials; more segments run in sequence instead
constexpr int64_t kMaxSplits = 128;
constexpr int64_t kBlockKeys = contract::CpuOrder::kBlockKeys;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The best instruction set that the machine has, or the one that FLASH_ATTN_CPU_ISA names.
KernelTable const& choose_kernels() {
  char const* const asked = std::getenv("FLASH_ATTN_CPU_ISA");
  std::string const name = asked ? asked : "";
  auto const takes = [&](char const* isa) { return name.empty() || name == isa; };
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool const has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  bool const has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && takes("avx512")) return avx512::kernels();
  if (has_avx2 && takes("avx2")) return avx2::kernels();
#endif
  if (takes("generic")) return generic::kernels();
  throw std::runtime_error(
      "flash_attn: this machine cannot run the kernels asked for; received FLASH_ATTN_CPU_ISA=" +
      name + "; rule: avx512, avx2 or generic, as the processor allows");
}

std::vector<QueryTile> query_tiles(LayoutParams const& layout, int64_t tile_rows,
                                   int64_t num_heads) {
  std::vector<QueryTile> tiles;
  int64_t const group = layout.h_q / layout.h_kv;
  for (int64_t b = 0; b < layout.b; ++b) {
    int64_t const rows = sequence_of(layout, b).s_q * group;
    // Late queries see more keys under a causal mask: they go first, so that no long task is left
    // for the end.
    for (int64_t begin = (ceil_div(rows, tile_rows) - 1) * tile_rows; begin >= 0;
         begin -= tile_rows) {
      for (int64_t h = 0; h < layout.h_kv; h += num_heads) {
        tiles.push_back({b, begin, begin + tile_rows < rows ? tile_rows : rows - begin, h,
                         h + num_heads < layout.h_kv ? num_heads : layout.h_kv - h});
      }
    }
  }
  return tiles;
}

// Query tiles of one head.
int64_t count_row_tiles(LayoutParams const& layout, int64_t tile_rows) {
  int64_t tiles = 0;
  for (int64_t b = 0; b < layout.b; ++b) {
    tiles += ceil_div(sequence_of(layout, b).s_q * (layout.h_q / layout.h_kv), tile_rows);
  }
  return tiles;
}

int64_t longest_rows(LayoutParams const& layout) {
  int64_t longest = 0;
  for (int64_t b = 0; b < layout.b; ++b) {
    int64_t const rows = sequence_of(layout, b).s_q * (layout.h_q / layout.h_kv);
    longest = rows > longest ? rows : longest;
  }
  return longest;
}

int64_t longest_keys(LayoutParams const& layout) {
  int64_t longest = 0;
  for (int64_t b = 0; b < layout.b; ++b) {
    int64_t const s_k = sequence_of(layout, b).s_k;
    longest = s_k > longest ? s_k : longest;
  }
  return longest;
}

int64_t fitting_tile_rows(LayoutParams const& layout, int64_t num_threads) {
  int64_t tile_rows = kMaxTileRows;
  while (tile_rows > kMinTileRows &&
         count_row_tiles(layout, tile_rows) * layout.h_kv < kTasksPerThread * num_threads) {
    tile_rows /= 2;
  }
  return tile_rows;
}

}  // namespace

KernelTable const& selected_kernels() {
  static KernelTable const& kernels = choose_kernels();
  return kernels;
}

ForwardPlan plan_forward(ForwardParams const& params, int64_t num_threads) {
  LayoutParams const& layout = params.layout;
  ForwardPlan plan;
  plan.tile_rows = fitting_tile_rows(layout, num_threads);
  int64_t const row_tiles = count_row_tiles(layout, plan.tile_rows), s_k = longest_keys(layout);
  int64_t const rows = longest_rows(layout);
  // A decode reads every key once: a task takes several heads along, so that it reads keys in the
  // order in which they lie in memory.
  if (rows > 0 && rows <= kMinTileRows) {
    plan.num_heads = layout.h_kv < kMaxHeads ? layout.h_kv : kMaxHeads;
    if (plan.num_heads > kMaxTileRows / rows) plan.num_heads = kMaxTileRows / rows;
  }
  auto const num_tiles = [&] { return row_tiles * ceil_div(layout.h_kv, plan.num_heads); };

  int64_t wanted = 1;  // pieces that would fill the threads
  int64_t const enough = kTasksPerThread * num_threads;
  if (num_tiles() > 0 && num_tiles() < enough) wanted = ceil_div(2 * enough, num_tiles());
  if (params.plan.num_splits > 0) wanted = params.plan.num_splits;

  if (!params.plan.deterministic) {
    int64_t const splits = wanted < kMaxSplits ? wanted : kMaxSplits;
    plan.segmentation = Segmentation::of_splits(s_k, splits, kBlockKeys);
  }
  plan.longest_keys = s_k;
  plan.num_segments = plan.segmentation.count(s_k);
  plan.pieces = wanted < plan.num_segments ? wanted : plan.num_segments;
  bool const fits = plan.num_segments * layout.lse_rows() <= kMaxPartialFloats / (layout.d + 2);
  if (plan.pieces < 1 || !fits || params.s_dmask) plan.pieces = 1;
  while (plan.num_heads > 1 && num_tiles() * plan.pieces < enough) {
    plan.num_heads = ceil_div(plan.num_heads, 2);
  }
  plan.num_tiles = num_tiles();
  return plan;
}

void forward(ForwardParams const& params, Machine const& machine) {
  KernelTable const& kernels = selected_kernels();
  ForwardPlan const plan = plan_forward(params, machine.num_threads);
  std::vector<QueryTile> const tiles = query_tiles(params.layout, plan.tile_rows, plan.num_heads);
  int64_t const num_tiles = static_cast<int64_t>(tiles.size());
  int64_t const floats = kernels.forward_floats(plan.tile_rows, plan.num_heads, params.layout.d);
  bool const hands_on = params.partials.out != nullptr;

  if (plan.pieces == 1 && !hands_on) {
    run_tasks(machine, num_tiles, floats, [&](int64_t i, float* scratch) {
      kernels.forward(params, tiles[i], plan.segmentation, 0, plan.num_segments, nullptr, scratch);
    });
    return;
  }

  PartialBuffers partials = params.partials;
  std::unique_ptr<float[]> storage;
  if (!hands_on) {
    partials.rows = params.layout.lse_rows();
    int64_t const count = plan.num_segments * partials.rows;
    storage = std::make_unique_for_overwrite<float[]>(count * (params.layout.d + 2));
    partials.out = storage.get();
    partials.max_log2 = partials.out + count * params.layout.d;
    partials.sum = partials.max_log2 + count;
  }
  // Pieces hold about the same number of keys, cut where a segment begins.
  auto const first_segment = [&](int64_t piece) {
    return piece == plan.pieces ? plan.num_segments
                                : plan.segmentation.of(plan.longest_keys * piece / plan.pieces);
  };
  run_tasks(machine, num_tiles * plan.pieces, floats, [&](int64_t i, float* scratch) {
    int64_t const piece = i / num_tiles;
    kernels.forward(params, tiles[i % num_tiles], plan.segmentation, first_segment(piece),
                    first_segment(piece + 1), &partials, scratch);
  });
  if (hands_on) return;
  run_tasks(machine, num_tiles, floats, [&](int64_t i, float* scratch) {
    kernels.fold(params, tiles[i], partials, plan.num_segments, scratch);
  });
}

void backward(BackwardParams const& params, Machine const& machine) {
  KernelTable const& kernels = selected_kernels();
  LayoutParams const& layout = params.layout;
  int64_t const tile_rows = fitting_tile_rows(layout, machine.num_threads);
  std::vector<QueryTile> const tiles = query_tiles(layout, tile_rows, /*num_heads=*/1);
  int64_t const num_query_tiles = static_cast<int64_t>(tiles.size());
  std::vector<KeyTile> key_tiles;
  for (int64_t b = 0; b < layout.b; ++b) {
    int64_t const s_k = sequence_of(layout, b).s_k;
    for (int64_t h = 0; h < layout.h_kv; ++h) {
      for (int64_t begin = 0; begin < s_k;
           begin += kBlockKeys) {  // early keys are seen by more queries
        int64_t const left = s_k - begin;
        key_tiles.push_back({b, h, begin, left < kBlockKeys ? left : kBlockKeys});
      }
    }
  }
  int64_t const num_key_tiles = static_cast<int64_t>(key_tiles.size());
  run_tasks(machine, num_query_tiles, 0,
            [&](int64_t i, float*) { kernels.backward_delta(params, tiles[i]); });
  run_tasks(machine, num_query_tiles + num_key_tiles, kernels.backward_floats(tile_rows, layout.d),
            [&](int64_t i, float* scratch) {
              if (i < num_key_tiles) {
                kernels.backward_key(params, key_tiles[i], scratch);
              } else {
                kernels.backward_query(params, tiles[i - num_key_tiles], scratch);
              }
            });
}

}  // namespace fa::cpu
