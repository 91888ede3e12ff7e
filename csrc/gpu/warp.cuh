// What a warp does that C++ has no word for, one function each; nothing here is a set's own.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fa::gpu {

__device__ __forceinline__ uint32_t shared_address(void const* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void store_pair(uint32_t to, uint32_t both) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(both) : "memory");
}
// 2^x by the special function unit: the same bits for the same x on one GPU architecture; 1 at 0,
// 0 at -inf, subnormal results are 0.
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to nearest even, the first in the low half.
template <class Element>
__device__ __forceinline__ uint32_t pack2(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack2<__half>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
template <>
__device__ __forceinline__ uint32_t pack2<__nv_bfloat16>(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

// x, in a register from here on. Without this the compiler reads the thread's number from the
// hardware again at every use, and each read takes twenty cycles.
__device__ __forceinline__ int kept(int x) {
  asm volatile("mov.b32 %0, %0;" : "+r"(x));
  return x;
}

// Programmatic dependent launch. The first kernel lets the second start while it still runs; the
// second waits here until the first has ended, before it reads what that one has written. Both do
// nothing where the second was launched in the usual way.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_prerequisite() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

constexpr unsigned kFullWarp = 0xffffffffu;

// Over the four lanes that share a row of C: every lane gets the same bits, (x0 + x1) + (x2 + x3).
__device__ __forceinline__ float sum_of_quad(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}
// Whether all four lanes say yes.
__device__ __forceinline__ bool all_of_quad(bool yes) {
  return (__ballot_sync(kFullWarp, yes) >> (threadIdx.x % 32 / 4 * 4) & 0xf) == 0xf;
}
__device__ __forceinline__ float max_of_quad(float x) {
  x = fmaxf(x, __shfl_xor_sync(kFullWarp, x, 1));
  return fmaxf(x, __shfl_xor_sync(kFullWarp, x, 2));
}

}  // namespace fa::gpu
