// The word in which kernels leave a fault, one a device (core/faults.h).
#pragma once

#include <cstdint>

#include "csrc/core/faults.h"
#include "csrc/core/sequence.h"

namespace fa::gpu {

// The word of a device, as its kernels write it. Lives until the process ends, so a captured graph
// may keep it.
uint64_t* fault_word(int device);

// Raises what earlier calls have left there, once.
void raise_fault(int device);

#if defined(__CUDACC__)
__device__ __forceinline__ void report(uint64_t* faults, Fault const& fault) {
  if (faults) *static_cast<uint64_t volatile*>(faults) = fault.word();
}

// Whether a call has index tensors, which can hold something wrong.
inline bool has_indices(LayoutParams const& layout) {
  return layout.faults && (layout.cu_seqlens_q || layout.cu_seqlens_k || layout.seqused_k ||
                           layout.leftpad_k || layout.cache_batch_idx || layout.block_table);
}

// A thread block of its own runs this, beside those that have tiles: as a part of their work it
// would cost a decode a microsecond. Each warp checks a sequence: its offsets, its lengths and its
// pages.
__device__ inline void report_all(LayoutParams const& layout) {
  int const lane = threadIdx.x % 32, num_warps = static_cast<int>(blockDim.x / 32);
  for (int64_t batch = threadIdx.x / 32; batch < layout.b; batch += num_warps) {
    Fault const fault = fault_of_sequence(layout, batch);
    if (lane == 0 && fault.what != Faulty::kNothing) report(layout.faults, fault);
    if (!layout.block_table) continue;
    int64_t const pages =
        (sequence_of(layout, batch).s_k + layout.page_size - 1) / layout.page_size;
    for (int64_t i = lane; i < pages; i += 32) {
      int64_t const entry = batch * layout.block_table_stride + i, page = layout.block_table[entry];
      if (page < 0 || page >= layout.cache_rows)
        report(layout.faults, {Faulty::kBlockTable, layout.caller, entry, page});
    }
  }
}
#endif

}  // namespace fa::gpu
