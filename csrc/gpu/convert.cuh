// The two element types to and from fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fa::gpu {

__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounded to nearest even; any NaN becomes the one that PyTorch makes.
template <class Element>
__device__ __forceinline__ Element round_to(float x) {
  if constexpr (std::is_same_v<Element, __half>) {
    return x == x ? __float2half_rn(x) : __ushort_as_half(0x7e00);
  } else {
    return x == x ? __float2bfloat16_rn(x) : __ushort_as_bfloat16(0x7fc0);
  }
}

// Of two elements that pack2 made: its NaN, all ones, becomes PyTorch's.
template <class Element>
__device__ __forceinline__ uint32_t with_common_nan(uint32_t pair) {
  constexpr uint32_t kChange = std::is_same_v<Element, __half> ? 0x01ff01ff : 0x003f003f;
  return pair ^ (__vcmpeq2(pair, 0x7fff7fff) & kChange);
}

}  // namespace fa::gpu
