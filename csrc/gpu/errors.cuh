// What CUDA answers, as an exception.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fa::gpu {

inline void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("flash_attn: a CUDA call failed; received ") +
                           cudaGetErrorName(status) + " (" + cudaGetErrorString(status) +
                           "); rule: cudaSuccess");
}

}  // namespace fa::gpu
