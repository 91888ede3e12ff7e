// The two backward kernels on a stream.
#pragma once

#include "csrc/cuda/errors.cuh"
#include "csrc/sm80/backward_keys.cuh"
#include "csrc/sm80/backward_launch.h"
#include "csrc/sm80/backward_queries.cuh"

namespace fa::sm80 {

template <class Traits>
void launch_tiles(void (*kernel)(BackwardLaunch), int shared_bytes, int64_t heads, int64_t length,
                  BackwardLaunch launch, cudaStream_t stream) {
  launch.tiles = (length + Traits::kRows - 1) / Traits::kRows;
  int64_t const blocks = launch.tiles * heads * launch.call.layout.b;
  if (blocks == 0) return;
  constexpr int kDefaultBytes = 48 * 1024;
  if (shared_bytes > kDefaultBytes) {
    fa::cuda::check(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  kernel<<<static_cast<unsigned>(blocks), Traits::kThreads, shared_bytes, stream>>>(launch);
  fa::cuda::check(cudaGetLastError());
}

template <class Traits>
void launch_query_tiles(BackwardLaunch const& launch, cudaStream_t stream) {
  constexpr int kBytes = Traits::kTensorBytes + static_cast<int>(sizeof(QueryTileShared<Traits>));
  launch_tiles<Traits>(query_tile_kernel<Traits>, kBytes, launch.call.layout.h_q,
                       launch.call.layout.s_q, launch, stream);
}

template <class Traits>
void launch_key_tiles(BackwardLaunch const& launch, cudaStream_t stream) {
  constexpr int kBytes = Traits::kTensorBytes + static_cast<int>(sizeof(KeyTileShared<Traits>));
  int64_t const h_kv = launch.call.layout.h_kv, s_k = launch.call.layout.s_k;
  if constexpr (Traits::kOneAfterTheOther) {
    launch_tiles<Traits>(key_tile_kernel<Traits, true, false>, kBytes, h_kv, s_k, launch, stream);
    launch_tiles<Traits>(key_tile_kernel<Traits, false, true>, kBytes, h_kv, s_k, launch, stream);
  } else {
    launch_tiles<Traits>(key_tile_kernel<Traits, true, true>, kBytes, h_kv, s_k, launch, stream);
  }
}

}  // namespace fa::sm80
