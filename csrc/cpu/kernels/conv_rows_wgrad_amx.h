// The weight gradient's blocks in tile registers (gemm_tile_amx.h): dw[k, c] += sum over positions of dz[., k] * x[.,
// c].
//
// A register of rows holds 16 filters with 16 units of two positions each, so dz, where the filters lie inside, is
// transposed on the way: 16 x 16 units in registers, 160 shuffles for 32 filters of 32 positions (5 cycles per line of
// 64 bytes), shared by all columns. x is zipped as for the vector tile: 4 shuffles for 32 channels of two positions.
// At 64 filters on 64 channels that is more than the products (256 cycles for 450 of shuffles), at 256 a quarter.
// Sums of several chunks of positions start from what dw holds: registers load and store it in place.

namespace fastconv::cpu::FASTCONV_ISA_NS {

// 32 elements of one position from channel c on, or the first n; a missing position is zero.
FASTCONV_INLINE u32v load_position(const bf16* p, int64_t c, int64_t n) {
  if (p == nullptr) return u32v{};
  if (n >= 32) return *(const u32v_u*)(p + c);
  return (u32v)_mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1), p + c);
}

// A: [k / 16][units / 16][16 rows of k][16 units of two positions]; blocks of 16 rows are `stride` bytes apart. Writes
// whole pairs of blocks. Zipping halves of vectors gives rows out of order, which the transpose's result is stored by.
inline void pack_rows(const bf16* const* rows, int64_t units, int64_t k0, int64_t k1, char* a, int64_t stride) {
  for (int64_t u0 = 0; u0 < units; u0 += kTileUnits, rows += 2 * kTileUnits, a += kRegisterBytes) {
    for (int64_t k = k0; k < k1; k += 32) {
      char* to = a + (k - k0) / 16 * stride;
      for (int odd = 0; odd < 2; ++odd) {
        u32v t[kTileUnits];
#pragma GCC unroll 16
        for (int u = 0; u < kTileUnits; ++u) {
          const __m512i x = (__m512i)load_position(rows[2 * u], k, k1 - k);
          const __m512i y = (__m512i)load_position(rows[2 * u + 1], k, k1 - k);
          t[u] = (u32v)(odd ? _mm512_unpackhi_epi16(x, y) : _mm512_unpacklo_epi16(x, y));
        }
        transpose(t);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const int row = i / 4 * 8 + i % 4 + odd * 4;
          *(u32v*)(to + row / 16 * stride + row % 16 * kRowBytes) = t[i];
        }
      }
    }
  }
}

// B: [c / 32][units of two positions][32 columns]; blocks are `stride` bytes apart.
inline void pack_columns(const bf16* const* rows, int64_t units, int64_t c0, int64_t c1, char* b, int64_t stride) {
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int64_t u = 0; u < units; ++u, rows += 2, b += kPanelRow) {
    char* to = b;
    for (int64_t c = c0; c < c1; c += kTileCols, to += stride) {
      const __m512i x = (__m512i)load_position(rows[0], c, c1 - c), y = (__m512i)load_position(rows[1], c, c1 - c);
      const __m512i l = _mm512_unpacklo_epi16(x, y), h = _mm512_unpackhi_epi16(x, y);
      *(u32v*)to = (u32v)_mm512_permutex2var_epi64(l, low, h);
      *(u32v*)(to + kRowBytes) = (u32v)_mm512_permutex2var_epi64(l, high, h);
    }
  }
}

// a: two blocks of 16 rows, a_stride apart; b: one of 32 columns; as tile_outer() of gemm_tile.h. A whole tile of fp32
// sums starts from what `out` holds, and is stored there, by the registers themselves.
template <class T, class D>
__attribute__((noinline)) void tile_packed(const char* a, int64_t a_stride, const char* b, int64_t units, D* out,
                                           int64_t ld, int n_rows, int n_cols, bool add, bool past) {
  const int64_t steps = units / kTileUnits;
  const bool whole = sizeof(D) == 4 && n_rows == kTileRows && n_cols == kTileCols && !past;
  char *c = (char*)out, *c_low = c + 16 * ld * (int64_t)sizeof(D);
  const int64_t row = ld * (int64_t)sizeof(D);
  FASTCONV_TILE_FENCE;
  if (whole && add) {
    _tile_loadd(0, c, row);
    _tile_loadd(1, c + kRowBytes, row);
    _tile_loadd(2, c_low, row);
    _tile_loadd(3, c_low + kRowBytes, row);
  } else {
    FASTCONV_TILE_ZERO;
  }
  const RowsSource sources[2] = {{a, kRowBytes, kRegisterBytes}, {a + a_stride, kRowBytes, kRegisterBytes}};
  const char *a0 = sources[0].base, *a1 = sources[1].base;
  if (n_rows > kGrain)
    multiply_steps<2>(a0, a1, sources, b, steps);
  else
    multiply_steps<1>(a0, a1, sources, b, steps);
  if (whole) {
    FASTCONV_TILE_STORE(c, c_low, row);
    return;
  }
  f32v sums[kTileRows * kTileVecs];
  if (n_rows > kGrain)
    fold_registers<2>(sums, false);
  else
    fold_registers<1>(sums, false);
  store_sums(sums, out, ld, n_rows, n_cols, add, past);
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
