// Blocks of a sequence's keys (or values) into shared memory, whatever holds them.
#pragma once

#include "csrc/core/sequence.h"
#include "csrc/sm80/tile.cuh"

namespace fa::gpu::sm80 {

// Traits: kD, kWarps, kLoadKeys, kAnyAddress, kPaged. Lies in shared memory, because its users are
// short of registers.
template <class Traits>
struct KeyTiles {
  static constexpr int kD = Traits::kD, kWarpRows = Traits::kLoadKeys / Traits::kWarps;

  char const* first;   // row 0 of the sequence, or of page 0 in a paged cache
  int64_t row_bytes;   //
  int64_t page_bytes;  // in a paged cache
  int const* pages;    // of this sequence; null: not paged
  int page_size, num_pages;
  int s_k, d;
  bool aligned;

  __device__ void set(LayoutParams const& layout, RowTensor const& t, Sequence const& s,
                      int head_kv, bool on_sixteen_bytes) {
    KeyRows const rows = key_rows(t, layout, s, head_kv, 2);
    first = rows.base + s.first_key * rows.row_bytes;
    row_bytes = rows.row_bytes;
    page_bytes = rows.page_bytes;
    pages = rows.pages;
    page_size = static_cast<int>(layout.page_size);
    num_pages = static_cast<int>(min(layout.cache_rows, int64_t{0x7fffffff}));
    s_k = static_cast<int>(s.s_k), d = static_cast<int>(layout.d);
    aligned = on_sixteen_bytes;
  }

  // Where row `key` lies by the table, which nobody has read on the host; null: no such page.
  __device__ __forceinline__ char const* paged_row(int key) const {
    int const page = page_of(pages, page_size, key);
    if (page < 0 || page >= num_pages) return nullptr;
    return first + page * page_bytes + row_in_page(page_size, key) * row_bytes;
  }

  // This warp's share of rows [block, block + kLoadKeys) of the tile `to`; what lies beyond s_k
  // becomes zeros and is not read.
  __device__ __forceinline__ void load(uint32_t to, int block, int warp, int lane) const {
    int const own = warp * kWarpRows, begin = block + own, present = s_k - begin;
    if (!Traits::kPaged || !pages) {
      fill_even_rows<kD, kWarpRows, Traits::kAnyAddress>(to, own, first + begin * row_bytes,
                                                         row_bytes, present, d, aligned, lane);
      return;
    }
    auto const find = [&](int row) {
      return row < kWarpRows && row < present ? paged_row(begin + row) : nullptr;
    };
    fill_scattered_rows<kD, kWarpRows, Traits::kAnyAddress>(to, own, find(lane), find(lane + 32), d,
                                                            aligned, lane);
  }

  // The same, to be copied step by step. A share of up to sixteen rows lies in one page, because
  // the size of a page is a multiple of sixteen. The caller says whether the cache is paged: a look
  // at `pages` would wait for shared memory.
  using Part = EvenRows<kD, kWarpRows, Traits::kAnyAddress>;
  __device__ __forceinline__ Part part(uint32_t to, int block, bool paged, int warp,
                                       int lane) const {
    static_assert(kWarpRows <= 16);
    int const own = warp * kWarpRows, key = block + own;
    Part rows{to, own, first, row_bytes, s_k - key, d, aligned, lane};
    if (!Traits::kPaged || !paged) {
      rows.from += key * row_bytes;
    } else if (rows.present > 0) {
      rows.from = paged_row(key);
      if (!rows.from) rows.present = 0;
    }
    return rows;
  }

  // Moves a part on to `block` from the block before, without a multiplication.
  __device__ __forceinline__ void advance(Part& part, uint32_t to, int block, bool paged, int warp,
                                          int lane) const {
    if (Traits::kPaged && paged) {
      part = this->part(to, block, paged, warp, lane);
      return;
    }
    part.tile = to, part.present -= Traits::kLoadKeys;
    part.from += Traits::kLoadKeys * part.stride;
  }
};

}  // namespace fa::gpu::sm80
