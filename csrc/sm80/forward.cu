// Which forward kernel a call gets, and how it is cut.
//
// The kernel is chosen from dtype, head dim and features; how many warps share a tile, and where
// segments run, from the shape: neither of the latter can change a bit.
#include <algorithm>

#include "csrc/cuda/errors.cuh"
#include "csrc/sm80/addresses.h"
#include "csrc/sm80/fold.h"
#include "csrc/sm80/forward_launch.h"
#include "csrc/sm80/order.h"
#include "csrc/sm80/pack_tiles.h"
#include "csrc/sm80/rest.cuh"

namespace fa::sm80 {
namespace {

constexpr int64_t kMaxPieces = 128;
constexpr int64_t kSplitKeys = 128;  // a split is a multiple of every kernel's load of keys
constexpr int64_t kMaxPartialFloats = 8 * 1024 * 1024;  // 32 MiB; more segments run in sequence
constexpr int kRestThreads = 128, kRestParts = 32;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

using Launch = void (*)(ForwardLaunch const&, cudaStream_t);

// Crowds gain from small spans at one head dim only.
constexpr bool has_kernels(int d, Company company) {
  return company != Company::kCrowd || d == 128;
}

template <class Element, int kD, bool kFeatures, Company kCompany>
Launch few_rows_in() {
  // Few rows of 96 columns would not divide among four warps.
  constexpr int kFewD = kD == 96 ? 128 : kD;
  constexpr Company kThere = has_kernels(kFewD, kCompany) ? kCompany : Company::kSome;
  return launch_forward<FewRows<Element, kFewD, kFeatures, kThere>>;
}

template <class Element, int kD, bool kFeatures>
Launch with_rows(ForwardPlan const& plan) {
  if (!plan.few_rows) return launch_forward<ManyRows<Element, kD, kFeatures>>;
  switch (plan.company) {
    case Company::kAlone:
      return few_rows_in<Element, kD, kFeatures, Company::kAlone>();
    case Company::kCrowd:
      return few_rows_in<Element, kD, kFeatures, Company::kCrowd>();
    default:
      return few_rows_in<Element, kD, kFeatures, Company::kSome>();
  }
}

template <class Element, int kD>
Launch with_features(ForwardPlan const& plan, bool features) {
  return features ? with_rows<Element, kD, true>(plan) : with_rows<Element, kD, false>(plan);
}

template <class Element>
Launch with_head_dim(int64_t d, ForwardPlan const& plan, bool features) {
  switch (head_dim_bucket(d)) {
    case 64:
      return with_features<Element, 64>(plan, features);
    case 96:
      return with_features<Element, 96>(plan, features);
    case 128:
      return with_features<Element, 128>(plan, features);
    case 192:
      return with_features<Element, 192>(plan, features);
    default:
      return with_features<Element, 256>(plan, features);
  }
}

// Rows of one segment of the partials.
int64_t partial_rows(LayoutParams const& layout) {
  return layout.cu_seqlens_q ? layout.h_q * layout.lse_head_stride
                             : layout.b * layout.lse_batch_stride;
}

// Whether no piece has many more keys than others: segments grow with the position.
bool pieces_are_even(ForwardPlan const& plan) {
  if (plan.pieces <= 1) return true;
  Segmentation const& cut = plan.segmentation;
  int64_t const last = plan.num_segments;
  return cut.begin(last) - cut.begin(last - 1) == cut.begin(1);
}

// How many thread blocks of few rows share a multiprocessor.
Company company_of(ForwardPlan const& plan, LayoutParams const& layout, int64_t places,
                   Processors const& processors) {
  if (plan.work > places && pieces_are_even(plan)) return Company::kCrowd;
  Segmentation const& cut = plan.segmentation;
  auto const begin = [&](int64_t piece) {
    return std::min(cut.begin(plan.num_segments * piece / plan.pieces), layout.s_k);
  };
  int64_t const last = plan.pieces - 1, before = last > 0 ? last - 1 : 0;
  int64_t const longest = std::max(layout.s_k - begin(last), begin(last) - begin(before));
  // One piece with more keys than a multiprocessor's share decides how long all of them take.
  int64_t const all = plan.tiles * layout.h_kv * layout.b * layout.s_k;
  bool const has_room = few_shared_bytes(static_cast<int>(head_dim_bucket(layout.d)),
                                         Company::kAlone) <= processors.most_shared_bytes;
  return has_room && longest * processors.count >= all ? Company::kAlone : Company::kSome;
}

// places [slots, h_kv]: late slots first.
__global__ __launch_bounds__(kRestThreads) void places_kernel(PackTiles const pack, int64_t slots,
                                                              int h_kv, Place* places) {
  int64_t const work = int64_t{blockIdx.x} * kRestThreads + threadIdx.x;
  if (work < slots * h_kv)
    places[work] = pack.at(slots - 1 - work / h_kv, static_cast<int>(work % h_kv), h_kv);
}

// For a call without a tile.
__global__ __launch_bounds__(kRestThreads) void rest_kernel(
    __grid_constant__ ForwardLaunch const launch) {
  int const h_kv = static_cast<int>(launch.call.layout.h_kv), block = static_cast<int>(blockIdx.x);
  write_the_rest(launch, block % h_kv, block / h_kv, kRestParts);
}

// Whether a kernel can be launched as the follower of another: compute capability 9 and later.
bool has_followers() {
  int device = 0, major = 0;
  cuda::check(cudaGetDevice(&device));
  cuda::check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  return major >= 9;
}

void launch_rest(ForwardLaunch const& launch, cudaStream_t stream) {
  auto const blocks = static_cast<unsigned>(launch.call.layout.h_kv * kRestParts);
  rest_kernel<<<blocks, kRestThreads, 0, stream>>>(launch);
  cuda::check(cudaGetLastError());
}

}  // namespace

Processors processors_of(int device) {
  int count = 0, bytes = 0, most = 0;
  cuda::check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  cuda::check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device));
  cuda::check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return {count, bytes, most};
}

ForwardPlan plan_forward(ForwardParams const& params, Processors const& processors) {
  LayoutParams const& layout = params.layout;
  check_positions(layout);
  ForwardPlan plan;
  int const bucket = static_cast<int>(head_dim_bucket(layout.d));
  int64_t const rows = layout.s_q * (layout.h_q / layout.h_kv);
  plan.few_rows = rows <= kFewRows;
  plan.tile_rows = tile_rows(bucket, plan.few_rows);
  plan.tiles = ceil_div(rows, plan.tile_rows);
  PackTiles const pack = query_tiles(layout, layout.h_q / layout.h_kv, plan.tile_rows);
  if (pack.are_fewer(plan.tiles, layout.h_kv)) plan.slots = pack.count();
  int64_t const tiles = (plan.slots > 0 ? plan.slots : plan.tiles * layout.b) * layout.h_kv;
  int64_t const places = processors.count * blocks_a_processor(bucket, plan.few_rows);
  int64_t pieces = 1;
  if (tiles > 0 && tiles < places) pieces = ceil_div(places, tiles);
  if (params.plan.num_splits > 0) pieces = params.plan.num_splits;

  // One extent for all sequences: no shorter one may have more segments than the longest.
  if (!params.plan.deterministic)
    plan.segmentation = Segmentation::of_splits(layout.s_k, pieces, kSplitKeys);
  plan.num_segments = plan.segmentation.count(layout.s_k);
  // Rather more pieces than places than uneven ones.
  int64_t const segments_each = plan.num_segments > pieces ? plan.num_segments / pieces : 1;
  pieces = ceil_div(plan.num_segments, segments_each);
  if (pieces > kMaxPieces) pieces = kMaxPieces;
  int64_t const partial_floats = plan.num_segments * partial_rows(layout) * (layout.d + 2);
  plan.pieces = pieces < 1 || partial_floats > kMaxPartialFloats ? 1 : pieces;
  if (plan.slots > 0) plan.pieces = 1;
  plan.work = plan.blocks = checked_blocks(tiles * plan.pieces);
  if (plan.few_rows) plan.company = company_of(plan, layout, places, processors);
  // Pieces share no keys, and late ones, which are longer, go first among all heads.
  int64_t const bytes = plan.pieces > 1 ? 0 : 4 * layout.s_k * bucket;
  plan.order = WorkOrder::of(layout.b, layout.h_kv, plan.slots > 0 ? 1 : plan.tiles * plan.pieces,
                             heads_a_section(bytes, layout.h_kv * layout.b));
  if (plan.pieces > 1) {
    plan.scratch_floats = partial_floats;
  } else if (plan.num_segments > 1 && !plan.few_rows) {  // few rows fold in registers
    plan.fold_shared = fold_vectors_in_shared(bucket, processors.shared_bytes);
    int64_t const vectors = fold_vectors(bucket) - plan.fold_shared;
    if (vectors > 0) {  // a place in scratch for each thread block that can run
      if (plan.blocks > places) plan.blocks = places;
      plan.scratch_floats = plan.blocks * vectors * kThreadsABlock * 4 + 1;  // and the counter
    }
  }
  static_assert(sizeof(Place) == 2 * sizeof(float));
  plan.list_floats = plan.slots > 0 ? ceil_div(2 * plan.work, 4) * 4 : 0;  // folds are vectors
  return plan;
}

void forward(ForwardParams const& call, ForwardPlan const& plan, float* scratch, void* stream) {
  ForwardLaunch launch;
  launch.call = call;
  launch.scale = cuda::ScoreScale::of(call.score);
  launch.plan = plan;
  launch.group = cuda::Divisor::of(call.layout.h_q / call.layout.h_kv);
  if (plan.slots == 0 && plan.tiles > 0) launch.tiles = cuda::Divisor::of(plan.tiles);
  launch.pieces = cuda::Divisor::of(plan.pieces);
  launch.aligned = call.layout.d % 8 == 0 && on_sixteen_bytes(call.q) && on_sixteen_bytes(call.k) &&
                   on_sixteen_bytes(call.v) && on_sixteen_bytes(call.out);
  auto const on = static_cast<cudaStream_t>(stream);
  if (plan.slots > 0) {
    auto* const places = reinterpret_cast<Place*>(scratch);
    scratch += plan.list_floats;
    auto const blocks = static_cast<unsigned>(ceil_div(plan.work, kRestThreads));
    places_kernel<<<blocks, kRestThreads, 0, on>>>(
        query_tiles(call.layout, launch.group.by, plan.tile_rows), plan.slots, call.layout.h_kv,
        places);
    cuda::check(cudaGetLastError());
    launch.places = places;
  }
  bool const hands_on = call.partials.out != nullptr;
  launch.partials = hands_on || plan.pieces > 1;
  if (hands_on) launch.call.lse = nullptr;  // partials are all that is written
  if (plan.work == 0 || launch.places) launch_rest(launch, on);
  if (plan.work == 0) return;
  if (hands_on) {
    launch.plan.blocks = plan.work, launch.plan.fold_shared = 0;
  } else if (plan.pieces > 1) {
    PartialBuffers& partials = launch.call.partials;
    partials.rows = partial_rows(call.layout);
    partials.out = scratch;
    partials.max_log2 = scratch + plan.num_segments * partials.rows * call.layout.d;
    partials.sum = partials.max_log2 + plan.num_segments * partials.rows;
    launch.follows = has_followers();
  } else if (plan.scratch_floats > 0) {
    launch.folds = reinterpret_cast<float4*>(scratch);
    if (plan.blocks < plan.work) {
      launch.next_work = reinterpret_cast<int*>(scratch + plan.scratch_floats - 1);
      cuda::check(cudaMemsetAsync(launch.next_work, 0, sizeof(int), on));
    }
  }
  bool const features = launch.scale.shaped || launch.scale.drops || !launch.aligned;
  int64_t const d = call.layout.d;
  auto const run = call.dtype == DType::kFloat16 ? with_head_dim<__half>(d, plan, features)
                                                 : with_head_dim<__nv_bfloat16>(d, plan, features);
  run(launch, on);
  if (launch.partials && !hands_on) launch_fold(launch, on);
}

}  // namespace fa::sm80
