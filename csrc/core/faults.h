// What a kernel tells the host of an index that leads outside a tensor.
//
// The contents of index tensors lie on the GPU, and the host does not read them. The kernels keep
// inside the tensors whatever they say, and write one word to memory that the host reads without
// waiting; the next call raises it. Of several faults any one is kept.
#pragma once

#include <cstdint>

#include "csrc/core/host_device.h"
#include "csrc/core/params.h"

namespace fa {

enum class Faulty : int {
  kNothing,
  kCuSeqlensQ,     // an offset below the one before it, or outside the pack; the first not 0
  kCuSeqlensK,     //
  kMaxSeqlenQ,     // a sequence longer than the call's largest
  kMaxSeqlenK,     //
  kKeyLengths,     // cache_seqlens (new keys included), or seqused_k
  kLeftPadding,    //
  kCacheBatchIdx,  //
  kBlockTable,     //
  kAppend,         // a new key's position
  kRotary,         // a query's position
};

// Sixty-four bits: what, 4; whose, 2; which entry, 26, the last for all beyond; what it holds, 32.
struct Fault {
  Faulty what = Faulty::kNothing;
  Caller caller = Caller::kVarlen;
  int64_t entry = 0;  // of the tensor, row-major
  int64_t value = 0;  // int32

  static constexpr int64_t kMostEntries = (int64_t{1} << 26) - 1;

  FA_HOST_DEVICE uint64_t word() const {
    return static_cast<uint64_t>(what) << 60 | static_cast<uint64_t>(caller) << 58 |
           static_cast<uint64_t>(entry < kMostEntries ? entry : kMostEntries) << 32 |
           static_cast<uint32_t>(value);
  }
  static Fault of(uint64_t word) {
    return {static_cast<Faulty>(word >> 60), static_cast<Caller>(word >> 58 & 3),
            static_cast<int64_t>(word >> 32) & kMostEntries,
            static_cast<int32_t>(static_cast<uint32_t>(word))};
  }
};

// What is wrong with the offsets and lengths of a sequence; the rules are those of
// flash_attn/_check_contents.py.
FA_HOST_DEVICE static inline Fault fault_of_sequence(LayoutParams const& layout, int64_t batch) {
  // Of a pair of offsets: which entry is wrong, none when neither is.
  auto const wrong_offset = [&](int32_t const* cu, int64_t total) -> int64_t {
    if (batch == 0 && cu[0] != 0) return 0;
    return cu[batch + 1] < cu[batch] || cu[batch + 1] > total ? batch + 1 : -1;
  };
  auto const length_of = [&](int32_t const* cu) {
    return static_cast<int64_t>(cu[batch + 1]) - cu[batch];
  };
  auto const fault = [&](Faulty what, int64_t entry, int64_t value) {
    return Fault{what, layout.caller, entry, value};
  };
  if (int32_t const* const cu = layout.cu_seqlens_q) {
    int64_t const entry = wrong_offset(cu, layout.total_q);
    if (entry >= 0) return fault(Faulty::kCuSeqlensQ, entry, cu[entry]);
    if (length_of(cu) > layout.s_q) return fault(Faulty::kMaxSeqlenQ, batch, length_of(cu));
  }
  int64_t length = layout.s_k, most = layout.s_k;
  if (int32_t const* const cu = layout.cu_seqlens_k) {
    int64_t const entry = layout.block_table ? -1 : wrong_offset(cu, layout.total_k);
    if (entry >= 0) return fault(Faulty::kCuSeqlensK, entry, cu[entry]);
    length = length_of(cu);
    if (layout.seqused_k && !layout.block_table && length < most) most = length;
  }
  if (layout.seqused_k) length = layout.seqused_k[batch] + layout.new_keys;
  if (length < 0 || length > most)
    return fault(layout.seqused_k ? Faulty::kKeyLengths : Faulty::kMaxSeqlenK, batch, length);
  if (layout.leftpad_k && (layout.leftpad_k[batch] < 0 || layout.leftpad_k[batch] > length))
    return fault(Faulty::kLeftPadding, batch, layout.leftpad_k[batch]);
  if (layout.cache_batch_idx) {
    int64_t const row = layout.cache_batch_idx[batch];
    if (row < 0 || row >= layout.cache_rows) return fault(Faulty::kCacheBatchIdx, batch, row);
  }
  return {};
}

}  // namespace fa
