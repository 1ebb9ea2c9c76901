// Tiles in shared memory: the XOR swizzle and the copies from global memory.
//
// A K-major tile holds one GEMM row (or column) per shared row, kKBytes of consecutive k; an MN-major tile holds one k
// per shared row, consecutive m or n. Either way a row is a run of 16-byte chunks, and chunk c of row r lies at c ^
// f(r), with f such that the 8 rows that one ldmatrix phase reads fall into 8 different groups of 4 banks.
#pragma once

#include "common.cuh"

namespace fastconv {

// Float32 = an MN-major tile read by 4-byte loads at (k = t, mn = g), t < 4, g < 8: the 4 rows take 2 chunks each.
template <int RowBytes, bool Float32Mn = false>
struct Swizzle {
  static constexpr int kChunks = RowBytes / 16;
  static_assert(kChunks >= 4 && (kChunks & (kChunks - 1)) == 0, "a shared row is 64, 128, 256, ... bytes");
  static_assert(!Float32Mn || kChunks >= 8, "the fp32 MN-major swizzle needs rows of 32 values");

  __device__ __forceinline__ static int f(int row) {
    if constexpr (Float32Mn) return (row & 3) << 1 | (row >> 2 & 1);
    if constexpr (kChunks >= 8) return row & 7;
    return (row >> 1) & 3;  // 64-byte rows: two rows share the 128 bytes of all banks
  }
  __device__ __forceinline__ static int offset(int row, int chunk) { return row * RowBytes + ((chunk ^ f(row)) << 4); }
};

// How the threads of a block cover a tile of Rows x RowBytes with accesses of VecBytes. A thread keeps its column.
template <class T, int Rows, int RowBytes, int VecBytes, int Threads, bool Async, bool Float32Mn>
struct TileCopy {
  static constexpr int kPerRow = RowBytes / VecBytes;
  static_assert(Threads % kPerRow == 0, "every thread keeps one column");
  static constexpr int kRowStep = Threads / kPerRow;
  static_assert(Rows % kRowStep == 0, "the threads cover the tile in whole passes");
  static constexpr int kIters = Rows / kRowStep;
  static constexpr int kElems = VecBytes / static_cast<int>(sizeof(T));
  static_assert(!Async || VecBytes >= 4, "cp.async moves at least 4 bytes");
  using Item = Vec<T, kElems>;

  int row0, col;  // first row, column in elements
  Item held[Async ? 1 : kIters];
  unsigned valid;  // bit i: held[i] is real data, not padding (the prologue must not touch padding)
  static_assert(Async || kIters <= 32, "one validity bit per held item");

  __device__ __forceinline__ explicit TileCopy(int thread)
      : row0(thread / kPerRow), col(thread % kPerRow * kElems), valid(0) {}

  __device__ __forceinline__ static unsigned char* at(unsigned char* tile, int row, int col) {
    int byte = col * static_cast<int>(sizeof(T));
    return tile + Swizzle<RowBytes, Float32Mn>::offset(row, byte >> 4) + (byte & 15);
  }

  // source(row, ok) -> address of this thread's column in that row; ok = false makes it zero.
  template <class Source>
  __device__ __forceinline__ void fetch(unsigned char* tile, Source source) {
    if constexpr (!Async) valid = 0;
#pragma unroll
    for (int i = 0; i < kIters; ++i) {
      int row = row0 + i * kRowStep;
      bool ok = true;
      const T* p = source(row, ok);
      if constexpr (Async) {
        ptx::cp_async<VecBytes>(at(tile, row, col), p, ok);
      } else {
        held[i] = Item{};
        if (ok) {
          held[i] = *reinterpret_cast<const Item*>(p);
          valid |= 1u << i;
        }
      }
    }
  }

  // Register-staged copies end here: transform(item) on real data, then the store.
  template <class Transform>
  __device__ __forceinline__ void commit(unsigned char* tile, Transform transform) {
    if constexpr (!Async) {
#pragma unroll
      for (int i = 0; i < kIters; ++i) {
        int row = row0 + i * kRowStep;
        if (valid >> i & 1) transform(held[i]);
        *reinterpret_cast<Item*>(at(tile, row, col)) = held[i];
      }
    }
  }
};

}  // namespace fastconv
