// The kernel table of one instruction set; included by isa_*.cpp after they name it.
#pragma once

#include "csrc/cpu/backward.h"
#include "csrc/cpu/forward.h"

namespace fa::cpu::FA_ISA {

#define FA_STRING(x) #x
#define FA_NAME(x) FA_STRING(x)

// Calls the instance of a kernel for a dtype known only at run time.
#define FA_DISPATCH_DTYPE(dtype, kernel, ...)       \
  switch (dtype) {                                  \
    case DType::kFloat32:                           \
      return kernel<DType::kFloat32>(__VA_ARGS__);  \
    case DType::kFloat16:                           \
      return kernel<DType::kFloat16>(__VA_ARGS__);  \
    case DType::kBFloat16:                          \
      return kernel<DType::kBFloat16>(__VA_ARGS__); \
  }

static int64_t forward_floats(int64_t num_rows, int64_t num_heads, int64_t d) {
  return ForwardHeads<DType::kFloat32>::floats(num_rows, num_heads, d);
}

static int64_t backward_floats(int64_t num_rows, int64_t d) {
  return BackwardScratch::floats(num_rows > kBlockQueries ? num_rows : kBlockQueries, d);
}

static void forward(ForwardParams const& params, QueryTile const& tile,
                    Segmentation const& segmentation, int64_t segment_begin, int64_t segment_end,
                    PartialBuffers const* partials, float* workspace) {
  FA_DISPATCH_DTYPE(params.dtype, forward_tile, params, tile, segmentation, segment_begin,
                    segment_end, partials, workspace)
}

static void fold(ForwardParams const& params, QueryTile const& tile, PartialBuffers const& partials,
                 int64_t num_segments, float* workspace) {
  FA_DISPATCH_DTYPE(params.dtype, fold_tile, params, tile, partials, num_segments, workspace)
}

static void backward_delta(BackwardParams const& params, QueryTile const& tile) {
  FA_DISPATCH_DTYPE(params.dtype, backward_delta_tile, params, tile)
}

static void backward_query(BackwardParams const& params, QueryTile const& tile, float* workspace) {
  FA_DISPATCH_DTYPE(params.dtype, backward_query_tile, params, tile, workspace)
}

static void backward_key(BackwardParams const& params, KeyTile const& tile, float* workspace){
    FA_DISPATCH_DTYPE(params.dtype, backward_key_tile, params, tile, workspace)}

KernelTable const& kernels() {
  static constexpr KernelTable kTable{FA_NAME(FA_ISA), forward_floats, backward_floats,
                                      forward,         fold,           backward_delta,
                                      backward_query,  backward_key};
  return kTable;
}

}  // namespace fa::cpu::FA_ISA
