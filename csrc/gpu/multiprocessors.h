// What a plan has to know of a GPU.
#pragma once

#include <cstdint>

namespace fa::gpu {

constexpr int kMaxDevices = 128;      // GPUs that a process can name
constexpr int kReservedBytes = 1024;  // of shared memory, by the system, for each thread block

struct Multiprocessors {
  int capability = 0;  // 10 major + minor
  int64_t count = 0;
  int64_t shared_bytes = 0;                // that each has for its thread blocks
  int64_t max_shared_bytes_per_block = 0;  // that one thread block can have
};

// Of a device; asked of the driver once.
Multiprocessors const& multiprocessors_of(int device);

}  // namespace fa::gpu
