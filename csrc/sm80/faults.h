// The word in which kernels leave a fault, one a device (core/faults.h).
#pragma once

#include <cstdint>

#include "csrc/core/faults.h"

namespace fa::sm80 {

// The word of a device, as its kernels write it. Lives until the process ends, so a captured graph
// may keep it.
uint64_t* fault_word(int device);

// Raises what earlier calls have left there, once.
void raise_fault(int device);

#if defined(__CUDACC__)
__device__ __forceinline__ void report(uint64_t* faults, Fault const& fault) {
  if (faults) *static_cast<uint64_t volatile*>(faults) = fault.word();
}
// By one thread, of one tile of each sequence.
__device__ inline void report_sequence(LayoutParams const& layout, int64_t batch) {
  if (!layout.faults) return;
  Fault const fault = fault_of_sequence(layout, batch);
  if (fault.what != Faulty::kNothing) report(layout.faults, fault);
}
#endif

}  // namespace fa::sm80
