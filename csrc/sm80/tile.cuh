// Tiles of rows in shared memory: how they are laid out, filled and read.
//
// A tile is (rows, kD) elements of 16 bits. Chunks of sixteen bytes are permuted inside a row so
// that the eight rows which ldmatrix reads at once lie in different banks.
#pragma once

#include "csrc/gpu/chunk.cuh"
#include "csrc/gpu/convert.cuh"
#include "csrc/sm80/mma.cuh"

namespace fa::gpu::sm80 {

template <int kD>
struct TileLayout {
  static_assert(kD % 32 == 0);
  static constexpr int kChunks = kD / kChunk, kRowBytes = kD * 2;
  // Rows whose bytes are a multiple of 128 start in the same bank: eight chunks are permuted. With
  // 64 bytes more every other row starts in the other half of the banks: four chunks are enough.
  static constexpr int kSwizzledChunks = kChunks % 8 == 0 ? 8 : 4;

  __device__ static int swizzle(int row) { return kSwizzledChunks == 8 ? row & 7 : (row >> 1) & 3; }
  // Where a chunk lies, in bytes.
  __device__ static uint32_t offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ swizzle(row)) * 16;
  }
};

// A lane's chunks of rows that lie a multiple of eight apart: the first is (row, chunk), and the
// others cost one exclusive-or, or none, each.
template <int kD>
struct Cursor {
  using Layout = TileLayout<kD>;
  uint32_t base;

  __device__ Cursor(uint32_t tile, int row, int chunk) : base(tile + Layout::offset(row, chunk)) {}
  // `rows` below and `chunks` to the right; the bits of `chunks` are clear in the first chunk.
  __device__ __forceinline__ uint32_t at(int rows, int chunks) const {
    constexpr int kMask = Layout::kSwizzledChunks - 1;
    return (base ^ ((chunks & kMask) * 16)) + (chunks & ~kMask) * 16 + rows * Layout::kRowBytes;
  }
};

__device__ __forceinline__ uint4 load_chunk(uint32_t from) {
  uint4 word;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(word.x), "=r"(word.y), "=r"(word.z), "=r"(word.w)
               : "r"(from));
  return word;
}

// How a warp copies rows: kLanes lanes take the chunks of one row, in kPasses.
template <int kD>
struct RowCopy {
  static constexpr int kChunks = TileLayout<kD>::kChunks;
  static constexpr int kLanes = kChunks % 8 == 0 ? 8 : 4;  // 128 bytes of a row, or 64
  static constexpr int kPasses = kChunks / kLanes, kRowsAtOnce = 32 / kLanes;
};

__device__ __forceinline__ void copy_chunk_by_elements(uint32_t to, uint16_t const* from,
                                                       int present) {
  uint4 const word = chunk_by_elements(from, present);
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(word.x), "r"(word.y),
               "r"(word.z), "r"(word.w)
               : "memory");
}

// Fills rows [first, first + kRows) of a tile. row(i) is the address of row first + i, which this
// lane's kLanes neighbours also ask for, and there(i) whether it exists: what does not, and columns
// from d on, become zeros and are not read. kAnyAddress: rows need not lie on sixteen bytes;
// without it they must. kUnrolled rows are written out at a time.
template <int kD, int kRows, bool kAnyAddress, int kUnrolled, class Row, class There>
__device__ __forceinline__ void fill_rows(uint32_t tile, int first, int d, bool aligned, int lane,
                                          Row const& row, There const& there) {
  using W = RowCopy<kD>;
  int const local = lane / W::kLanes, first_chunk = lane % W::kLanes;
  if (!kAnyAddress || aligned) {
    // The swizzle is that of row first + local: eight rows further on it is the same, and four rows
    // further on one bit differs. (first is a multiple of eight, or the rows are one step.)
    uint32_t const to = tile + TileLayout<kD>::offset(first + local, first_chunk);
#pragma unroll kUnrolled
    for (int i = 0; i < kRows / W::kRowsAtOnce; ++i) {
      int const r = i * W::kRowsAtOnce + local;
      char const* const from = row(r, i);
      bool const exists = there(r);
#pragma unroll
      for (int pass = 0; pass < W::kPasses; ++pass) {
        int const chunk = pass * W::kLanes + first_chunk;
        uint32_t const flipped = i * W::kRowsAtOnce % 8 * 16;  // 0, or 64: four rows below
        cp_async_16(
            (to ^ flipped) + i * W::kRowsAtOnce * TileLayout<kD>::kRowBytes + pass * W::kLanes * 16,
            from + chunk * 16, exists && chunk * kChunk < d);
      }
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kRows / W::kRowsAtOnce; ++i) {
      int const r = i * W::kRowsAtOnce + local;
      char const* const from = row(r, i);
      bool const exists = there(r);
#pragma unroll 1
      for (int chunk = first_chunk; chunk < W::kChunks; chunk += W::kLanes) {
        copy_chunk_by_elements(tile + TileLayout<kD>::offset(first + r, chunk),
                               reinterpret_cast<uint16_t const*>(from) + chunk * kChunk,
                               exists ? max(d - chunk * kChunk, 0) : 0);
      }
    }
  }
}

// Fills rows [first, first + kRows) of a tile from rows that lie `stride` bytes apart, the first at
// `from`; `present` of them exist. A step copies a few rows, so that the addresses of one step are
// computed while other work goes on.
template <int kD, int kRows, bool kAnyAddress>
struct EvenRows {
  using W = RowCopy<kD>;
  static constexpr int kSteps = kRows / W::kRowsAtOnce;

  uint32_t tile;
  int first;
  char const* from;
  int64_t stride;
  int present, d;
  bool aligned;
  int lane;
  bool wanted = true;  // else the tile stays as it is

  __device__ __forceinline__ void copy(int step) const {
    int const local = lane / W::kLanes, first_chunk = lane % W::kLanes;
    if (!kAnyAddress || aligned) {
      // The swizzle is that of row first + local: eight rows further on it is the same, and four
      // rows further on one bit differs. (first is a multiple of eight, or the rows are one step.)
      uint32_t const to = tile + TileLayout<kD>::offset(first + local, first_chunk);
      char const* const mine = from + local * stride + first_chunk * 16;
      int const row = step * W::kRowsAtOnce;
      uint32_t const flipped = row % 8 * 16;  // 0, or 64: four rows below
#pragma unroll
      for (int pass = 0; pass < W::kPasses; ++pass) {
        cp_async_16((to ^ flipped) + row * TileLayout<kD>::kRowBytes + pass * W::kLanes * 16,
                    mine + row * stride + pass * W::kLanes * 16,
                    row + local < present && (pass * W::kLanes + first_chunk) * kChunk < d, wanted);
      }
    } else if (step == 0 && wanted) {  // all of it
      char const* const mine = from + local * stride;
      fill_rows<kD, kRows, true, 1>(
          tile, first, d, false, lane,
          [&](int, int i) { return mine + i * (W::kRowsAtOnce * stride); },
          [&](int r) { return r < present; });
    }
  }
  __device__ __forceinline__ void copy_all() const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) copy(step);
  }
};

template <int kD, int kRows, bool kAnyAddress>
__device__ __forceinline__ void fill_even_rows(uint32_t tile, int first, char const* from,
                                               int64_t stride, int present, int d, bool aligned,
                                               int lane) {
  EvenRows<kD, kRows, kAnyAddress>{tile, first, from, stride, present, d, aligned, lane}.copy_all();
}

// Fills rows of which each has an address of its own. Lane i holds the address of row i in `mine`
// and that of row 32 + i in `other`; null where there is no such row.
template <int kD, int kRows, bool kAnyAddress>
__device__ __forceinline__ void fill_scattered_rows(uint32_t tile, int first, char const* mine,
                                                    char const* other, int d, bool aligned,
                                                    int lane) {
  bool exists = false;
  fill_rows<kD, kRows, kAnyAddress, 4>(
      tile, first, d, aligned, lane,
      [&](int r, int i) {
        auto const held =
            reinterpret_cast<unsigned long long>(i * RowCopy<kD>::kRowsAtOnce < 32 ? mine : other);
        auto const from = reinterpret_cast<char const*>(__shfl_sync(kFullWarp, held, r % 32));
        exists = from != nullptr;
        return from;
      },
      [&](int) { return exists; });
}

// Stores kRows rows of a tile to addresses of their own, held as above; null: not stored.
template <class Element, int kD, int kRows, bool kAnyAddress>
__device__ __forceinline__ void store_rows(uint32_t tile, char* mine, int first, int d,
                                           bool aligned, int lane) {
  using Layout = TileLayout<kD>;
  auto const address = reinterpret_cast<unsigned long long>(mine);
  constexpr int kSteps = kRows * Layout::kChunks / 32;
  // A chunk, and the address of its row: what a lane has at a step.
  auto const chunk_of = [&](int i) { return (i * 32 + lane) % Layout::kChunks; };
  auto const row_at = [&](int i) {
    return reinterpret_cast<char*>(
        __shfl_sync(kFullWarp, address, (i * 32 + lane) / Layout::kChunks));
  };
  auto const word_of = [&](int i) {
    uint4 word =
        load_chunk(tile + Layout::offset(first + (i * 32 + lane) / Layout::kChunks, chunk_of(i)));
    word.x = with_common_nan<Element>(word.x), word.y = with_common_nan<Element>(word.y);
    word.z = with_common_nan<Element>(word.z), word.w = with_common_nan<Element>(word.w);
    return word;
  };
  if (!kAnyAddress || aligned) {
#pragma unroll 4
    for (int i = 0; i < kSteps; ++i) {
      char* const to = row_at(i);
      uint4 const word = word_of(i);
      if (to && chunk_of(i) * kChunk < d) reinterpret_cast<uint4*>(to)[chunk_of(i)] = word;
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kSteps; ++i) {
      int const column = chunk_of(i) * kChunk;
      uint16_t* const to = reinterpret_cast<uint16_t*>(row_at(i));
      uint4 const word = word_of(i);
      uint32_t const words[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
      for (int j = 0; j < kChunk; ++j) {
        if (to && column + j < d)
          to[column + j] = static_cast<uint16_t>(words[j / 2] >> (j % 2 * 16));
      }
    }
  }
}

// The matrices of the tensor cores' operands, sixteen rows by sixteen columns at a time.

// A: ldmatrix_x4 at at(row, 2 k) gives rows [row, row + 16), columns [16 k, 16 k + 16).
template <int kD>
__device__ __forceinline__ Cursor<kD> cursor_a(uint32_t tile, int row, int lane) {
  return Cursor<kD>(tile, row + lane % 16, lane / 16);
}
// B from rows that are columns of B (keys of q k^T): ldmatrix_x4 at at(n, 2 k) gives columns [n, n
// + 16) of B. Elements 0, 1 belong to the first eight, 2, 3 to the others.
template <int kD>
__device__ __forceinline__ Cursor<kD> cursor_b(uint32_t tile, int first, int lane) {
  return Cursor<kD>(tile, first + lane % 8 + lane / 16 * 8, lane / 8 % 2);
}
// B from rows that are rows of B (values of p v): ldmatrix_x4_trans at at(row, 2 n) gives
// rows [first + row, first + row + 16), columns [16 n, 16 n + 16), counted from the chunk `chunk`,
// whose bits 2 n must not share.
template <int kD>
__device__ __forceinline__ Cursor<kD> cursor_b_transposed(uint32_t tile, int first, int lane,
                                                          int chunk = 0) {
  return Cursor<kD>(tile, first + lane % 16, chunk + lane / 16);
}
// A from rows that are its columns (probabilities of p^T dout): ldmatrix_x4_trans at at(k, 2
// t) gives columns [k, k + 16) of rows [16 t, 16 t + 16) of A, counted from `chunk` likewise.
template <int kD>
__device__ __forceinline__ Cursor<kD> cursor_a_transposed(uint32_t tile, int lane, int chunk) {
  return Cursor<kD>(tile, lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2);
}

}  // namespace fa::gpu::sm80
