// One kernel on a stream, with the shared memory and the zeroed counters that it asks for.
#pragma once

#include <array>
#include <atomic>

#include "csrc/gpu/errors.cuh"
#include "csrc/gpu/multiprocessors.h"
#include "csrc/gpu/scratch.h"

namespace fa::gpu {

// Lets a kernel have `bytes` of dynamic shared memory on the current device. The driver is asked
// only when it has not been asked for as much before.
template <auto kKernel>
void allow_shared_bytes(int bytes) {
  constexpr int kAlwaysAllowed = 48 * 1024;
  static std::array<std::atomic<int>, kMaxDevices> allowed{};
  if (bytes <= kAlwaysAllowed) return;
  int device = 0;
  check(cudaGetDevice(&device));
  std::atomic<int>& here = allowed.at(static_cast<size_t>(device));
  if (here.load(std::memory_order_relaxed) >= bytes) return;
  check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  here.store(bytes, std::memory_order_relaxed);
}

template <auto kKernel, class Launch>
void launch_kernel(Launch const& launch, int64_t blocks, int threads, int shared_bytes,
                   void* stream) {
  allow_shared_bytes<kKernel>(shared_bytes);
  kKernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
            static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream)>>>(launch);
  check(cudaGetLastError());
}

inline void zero_counters(Scratch const& scratch, void* memory, void* stream) {
  if (scratch.counters == 0) return;
  check(cudaMemsetAsync(memory, 0, static_cast<size_t>(scratch.counter_bytes()),
                        static_cast<cudaStream_t>(stream)));
}

}  // namespace fa::gpu
