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

// A: [k / 16][steps][16 rows of k][16 units of two positions]; blocks of 16 rows are `stride` bytes apart. Writes whole
// pairs of blocks. Zipping halves of vectors gives rows out of order, which the transpose's result is stored by.
inline void pack_rows_amx(const bf16* const* rows, int64_t steps, int64_t k0, int64_t k1, char* a, int64_t stride) {
  for (int64_t s = 0; s < steps; ++s, rows += 2 * kStepUnits, a += kRegisterBytes) {
    for (int64_t k = k0; k < k1; k += 32) {
      char* to = a + (k - k0) / 16 * stride;
      for (int odd = 0; odd < 2; ++odd) {
        u32v t[kStepUnits];
#pragma GCC unroll 16
        for (int u = 0; u < kStepUnits; ++u) {
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

// B: [c / 32][16 * steps units of two positions][32 columns]; blocks are `stride` bytes apart.
inline void pack_columns_amx(const bf16* const* rows, int64_t steps, int64_t c0, int64_t c1, char* b, int64_t stride) {
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  for (int64_t u = 0; u < steps * kStepUnits; ++u, rows += 2, b += kPanelRow) {
    char* to = b;
    for (int64_t c = c0; c < c1; c += kTileCols, to += stride) {
      const __m512i x = (__m512i)load_position(rows[0], c, c1 - c), y = (__m512i)load_position(rows[1], c, c1 - c);
      const __m512i l = _mm512_unpacklo_epi16(x, y), h = _mm512_unpackhi_epi16(x, y);
      *(u32v*)to = (u32v)_mm512_permutex2var_epi64(l, low, h);
      *(u32v*)(to + kRowBytes) = (u32v)_mm512_permutex2var_epi64(l, high, h);
    }
  }
}

// a: two blocks of 16 rows, a_stride apart; b: one of 32 columns; the first n_rows x n_cols of the product to out, as
// tile_outer() of gemm_tile.h.
template <class D>
__attribute__((noinline)) void tile_outer_amx(const char* a, int64_t a_stride, const char* b, int64_t steps, D* out,
                                              int64_t ld, int n_rows, int n_cols, bool add, bool past) {
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
  if (whole || n_rows > kGrain)
    multiply_steps<2>(a0, a1, sources, b, steps);
  else
    multiply_steps<1>(a0, a1, sources, b, steps);
  if (whole) {
    _tile_stored(0, c, row);
    _tile_stored(1, c + kRowBytes, row);
    _tile_stored(2, c_low, row);
    _tile_stored(3, c_low + kRowBytes, row);
    return;
  }
  f32v sums[kTileRows * kTileVecs];
  if (n_rows > kGrain)
    fold_registers<2>(sums, false);
  else
    fold_registers<1>(sums, false);
  for (int i = 0; i < n_rows; ++i)
    for (int v = 0; v < kTileVecs && n_cols > v * kLanes; ++v) {
      const int n = n_cols - v * kLanes;
      D* p = out + i * ld + v * kLanes;
      f32v y = sums[i * kTileVecs + v];
      if constexpr (sizeof(D) == 4) {
        if (past && n >= kLanes) {
          stream(p, y);
          continue;
        }
      }
      if (add) y += load_lanes(p, n);
      store_lanes(p, y, n);
    }
}

// One block of units into rows [ka, kb) of one tap; dz and x have whole steps of positions, null behind the last.
template <class T, class D>
void wgrad_block(const WgradTask<T, D>& t, const T* const* dz, const T* const* x, int64_t units, int64_t ka, int64_t kb,
                 D* out, int64_t ld, bool add, bool past) {
  const int64_t steps = units / kStepUnits;
  const int64_t a_stride = steps * kRegisterBytes + 64, b_stride = steps * kPanelStep + 64;
  pack_rows_amx(dz, steps, ka, kb, t.a, a_stride);
  const int64_t at_once = kWgradColumnBytes / b_stride * kTileCols;
  for (int64_t c0 = t.c0; c0 < t.c1; c0 += at_once) {
    const int64_t c1 = c0 + at_once < t.c1 ? c0 + at_once : t.c1;
    pack_columns_amx(x, steps, c0, c1, t.b, b_stride);
    for (int64_t k = ka; k < kb; k += kTileRows) {
      const int n_rows = kb - k < kTileRows ? (int)(kb - k) : kTileRows;
      for (int64_t c = c0; c < c1; c += kTileCols)
        tile_outer_amx<D>(t.a + (k - ka) / 16 * a_stride, a_stride, t.b + (c - c0) / kTileCols * b_stride, steps,
                          out + (k - ka) * ld + (c - t.c0), ld, n_rows, c1 - c < kTileCols ? (int)(c1 - c) : kTileCols,
                          add, past);
    }
  }
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
