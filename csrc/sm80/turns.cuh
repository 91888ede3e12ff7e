// Adding to one place from many thread blocks, in a fixed order.
//
// Each tile of keys adds its part to the gradient of a block of queries. The parts are summed by
// the memory, but one after the other: one adds when the one before it has. A thread block that
// waits has started after those that it waits for, so somebody can always go on.
#pragma once

#include <cuda/atomic>

#include "csrc/cuda/ptx.cuh"

namespace fa::sm80 {

// How many tiles have added to a block of queries: zero before the kernel.
struct Turns {
  int* count;

  using Counter = ::cuda::atomic_ref<int, ::cuda::thread_scope_device>;

  // How many had added. Enough to add to memory, which happens where the count was read; not to
  // read sums.
  __device__ __forceinline__ int look() const {
    return Counter(*count).load(::cuda::memory_order_relaxed);
  }
  // By one thread, before those that it waits for go on: what was added before `turn` is there.
  __device__ __forceinline__ void wait_for(int turn) const {
    while (Counter(*count).load(::cuda::memory_order_acquire) < turn) __nanosleep(20);
  }
  // By one thread, after a barrier: what the thread block has added comes first.
  __device__ __forceinline__ void pass_on() const {
    Counter(*count).fetch_add(1, ::cuda::memory_order_release);
  }
};

// x + y as the memory adds: to nearest, subnormals are zero.
__device__ __forceinline__ float add_as_memory(float x, float y) {
  float sum;
  asm("add.rn.ftz.f32 %0, %1, %2;" : "=f"(sum) : "f"(x), "f"(y));
  return sum;
}

// *to += x, without waiting for it.
__device__ __forceinline__ void add_to_memory(float4* to, float4 x) {
#if __CUDA_ARCH__ >= 900
  atomicAdd(to, x);
#else
  atomicAdd(&to->x, x.x), atomicAdd(&to->y, x.y), atomicAdd(&to->z, x.z), atomicAdd(&to->w, x.w);
#endif
}

}  // namespace fa::sm80
