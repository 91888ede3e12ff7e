// Ordered addition: many thread blocks add to the same sums in memory, in a fixed order.
//
// Each tile of keys adds its part to the gradient dQ of the queries that see it. A counter says how
// many tiles have added: a tile adds when all tiles before it have. A thread block waits only for
// thread blocks that started before it, so there is always one that can go on.
#pragma once

#include <cuda/atomic>

#include "csrc/gpu/warp.cuh"

namespace fa::gpu {

// How many tiles have added to a block of queries: zero before the kernel.
struct Turns {
  int* count;

  using Counter = ::cuda::atomic_ref<int, ::cuda::thread_scope_device>;

  // How many tiles had added. The answer allows an addition in memory, which happens in the same
  // place as the read of the counter; it does not allow a read of the sums.
  __device__ __forceinline__ int look() const {
    return Counter(*count).load(::cuda::memory_order_relaxed);
  }
  // Waits until `turn` tiles have added. By one thread, before a barrier; behind the barrier all
  // threads see what those tiles have added.
  __device__ __forceinline__ void wait_for(int turn) const {
    while (Counter(*count).load(::cuda::memory_order_acquire) < turn) __nanosleep(20);
  }
  // Lets the next tile add. By one thread, after a barrier behind the additions of all threads.
  __device__ __forceinline__ void pass_on() const {
    Counter(*count).fetch_add(1, ::cuda::memory_order_release);
  }
};

// x + y as an addition in memory rounds: to nearest, with subnormals as zero.
__device__ __forceinline__ float add_as_memory(float x, float y) {
  float sum;
  asm("add.rn.ftz.f32 %0, %1, %2;" : "=f"(sum) : "f"(x), "f"(y));
  return sum;
}

// *to += x; nobody waits for the result.
__device__ __forceinline__ void add_to_memory(float4* to, float4 x) {
#if __CUDA_ARCH__ >= 900
  atomicAdd(to, x);
#else
  atomicAdd(&to->x, x.x), atomicAdd(&to->y, x.y), atomicAdd(&to->z, x.z), atomicAdd(&to->w, x.w);
#endif
}

}  // namespace fa::gpu
