// Memory that a call needs beside its tensors: one allocation, by whoever calls the kernels.
#pragma once

#include <cstdint>

namespace fa::gpu {

// Counters are zero when the kernels start; floats need no value, and lie behind the counters. They
// begin where a warp's vectors of sixteen bytes do: elsewhere each access takes one line of the
// cache more, which costs a backward pass 2 %.
struct Scratch {
  static constexpr int64_t kAlignment = 512;
  int64_t counters = 0, floats = 0;

  int64_t counter_bytes() const {
    return (counters * 4 + kAlignment - 1) / kAlignment * kAlignment;
  }
  int64_t bytes() const { return counter_bytes() + floats * 4; }

  int* counters_in(void* memory) const {
    return counters > 0 ? static_cast<int*>(memory) : nullptr;
  }
  float* floats_in(void* memory) const {
    return reinterpret_cast<float*>(static_cast<char*>(memory) + counter_bytes());
  }
};

}  // namespace fa::gpu
