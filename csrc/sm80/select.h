// From what is known of a call when it runs to the types that a kernel is compiled for.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "csrc/core/params.h"

namespace fa::gpu::sm80 {

// The head dim that the kernels of d were compiled for: columns from d on are zeros.
constexpr int head_dim_bucket(int64_t d) {
  return d <= 64 ? 64 : d <= 96 ? 96 : d <= 128 ? 128 : d <= 192 ? 192 : 256;
}

// for_types.template operator()<Element, kD>(), for the call's dtype and head dim.
template <class Element, class ForTypes>
auto select_head_dim(int64_t d, ForTypes const& for_types) {
  switch (head_dim_bucket(d)) {
    case 64:
      return for_types.template operator()<Element, 64>();
    case 96:
      return for_types.template operator()<Element, 96>();
    case 128:
      return for_types.template operator()<Element, 128>();
    case 192:
      return for_types.template operator()<Element, 192>();
    default:
      return for_types.template operator()<Element, 256>();
  }
}
template <class ForTypes>
auto select_types(DType dtype, int64_t d, ForTypes const& for_types) {
  return dtype == DType::kFloat16 ? select_head_dim<__half>(d, for_types)
                                  : select_head_dim<__nv_bfloat16>(d, for_types);
}

}  // namespace fa::gpu::sm80
