// Memory that a call needs beside its tensors: one allocation, by whoever calls the kernels.
#pragma once

#include <cstdint>

namespace fa::gpu {

// Counters are zero when the kernels start; floats need no value, and lie behind the counters.
struct Scratch {
  int64_t counters = 0, floats = 0;

  int64_t counter_bytes() const { return (counters * 4 + 15) / 16 * 16; }
  int64_t bytes() const { return counter_bytes() + floats * 4; }

  int* counters_in(void* memory) const {
    return counters > 0 ? static_cast<int*>(memory) : nullptr;
  }
  float* floats_in(void* memory) const {
    return reinterpret_cast<float*>(static_cast<char*>(memory) + counter_bytes());
  }
};

}  // namespace fa::gpu
