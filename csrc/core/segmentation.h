// Where segments end: on the contract's ladder, or (standard mode only) every `extent` keys.
#pragma once

#include <cstdint>

#include "csrc/core/contract.h"

namespace fa {

template <class Order>
struct SegmentationOn {
  int64_t extent = 0;  // 0: the ladder

  FA_MEMBER int64_t begin(int64_t segment) const {
    return extent ? segment * extent : contract::segment_begin<Order>(segment);
  }
  FA_MEMBER int64_t of(int64_t key) const {
#if defined(__CUDA_ARCH__)  // where positions fit 32 bits, and a quotient of 64 is slow
    if (extent) return static_cast<uint32_t>(key) / static_cast<uint32_t>(extent);
#endif
    return extent ? key / extent : contract::segment_of<Order>(key);
  }
  FA_MEMBER int64_t count(int64_t s_k) const { return s_k > 0 ? of(s_k - 1) + 1 : 0; }

  // Standard mode: s_k keys in at most `splits` parts of whole blocks.
  FA_MEMBER static SegmentationOn of_splits(int64_t s_k, int64_t splits, int64_t block_keys) {
    int64_t const blocks = (s_k + block_keys - 1) / block_keys;
    int64_t const blocks_a_split = (blocks + splits - 1) / splits;
    return {(blocks_a_split > 0 ? blocks_a_split : 1) * block_keys};
  }
};

}  // namespace fa
