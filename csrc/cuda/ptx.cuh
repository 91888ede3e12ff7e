// The instructions that C++ has no word for, one function each.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fa::cuda {

__device__ __forceinline__ uint32_t shared_address(void const* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Sixteen bytes from global to shared memory, past the first-level cache; zeros when !present, and
// then `from` is not read.
__device__ __forceinline__ void copy16_async(uint32_t to, void const* from, bool present,
                                             bool wanted = true) {
  int const bytes = present ? 16 : 0;
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %3, 0;\n"
      "@wanted cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;\n}" ::"r"(to),
      "l"(from), "r"(bytes), "r"(static_cast<int>(wanted)));
}
// Four bytes, likewise.
__device__ __forceinline__ void copy4_async(uint32_t to, void const* from, bool present) {
  int const bytes = present ? 4 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes));
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }
// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void store_pair(uint32_t to, uint32_t both) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(both) : "memory");
}
// Four 8 x 8 matrices of 16-bit elements: lane i names row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ __forceinline__ void load_matrix_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// C (16 x 8, fp32) += A (16 x 16) B (16 x 8).
//   A  a[0]: row g, columns 2t, 2t + 1; a[1]: row g + 8; a[2], a[3]: the same, columns + 8
//   B  b0: rows 2t, 2t + 1 of column g; b1: rows + 8
//   C  c[0], c[1]: row g, columns 2t, 2t + 1; c[2], c[3]: row g + 8
// with g = lane / 4 and t = lane % 4.
template <class Element>
__device__ __forceinline__ void multiply_add(float (&c)[4], uint32_t const (&a)[4], uint32_t b0,
                                             uint32_t b1);
template <>
__device__ __forceinline__ void multiply_add<__half>(float (&c)[4], uint32_t const (&a)[4],
                                                     uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply_add<__nv_bfloat16>(float (&c)[4], uint32_t const (&a)[4],
                                                            uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
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

// x, in a register from here on: the compiler would ask the hardware for a thread's number again at
// every use, and each answer takes long.
__device__ __forceinline__ int kept(int x) {
  asm volatile("mov.b32 %0, %0;" : "+r"(x));
  return x;
}

// A kernel that was launched as the other's follower may start while that one runs: the first lets
// it (its memory is there only after the second), which waits until it has ended. Nothing
// otherwise.
__device__ __forceinline__ void let_follower_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void wait_for_leader() {
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

}  // namespace fa::cuda
