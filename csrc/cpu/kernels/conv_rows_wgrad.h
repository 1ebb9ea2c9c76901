// Weight gradient by taps:  dw[k,r,s,c] = sum over n and the positions (p,q) where tap (r,s) reads inside the map of
//   dz[n,p,q,k] * x[n, p st - pad + r dil, q st - pad + s dil, c];   exactly zero for a tap that never does.
//
// From y = sum x w: dL/dw[k,r,s,c] = sum over every y[n,p,q,k] that w[k,r,s,c] enters, of dL/dy * the x it was
// multiplied by. One matrix product per tap: rows k, columns c, summed over positions. Both operands lie with the
// summed index outside. fp32 and few channels: the tile reads both where they lie, by row pointers. Else both are
// packed in blocks of 128 units; a unit is one position (fp32) or two (bf16: the dot product sums pairs): a = dz in row
// blocks [k / 8][units][8], b = x [units][32]. Packing a costs 4 cycles per 16 elements (L2), shared by all columns:
// 13% of the time at 64 channels, 3% at 256. Large maps: the taps go round one chunk of positions while its rows of dz
// and x lie in L2; small maps: one tap after the other, whose live positions alone fill the chunks. Sums of several
// chunks: fp32, in dw or (bf16) in a workspace. Threads own blocks of k, of c and of taps: no atomics, no reduction
// between threads, one order of summation whatever their number. Few channels (the stem, 7x7x3, on an input that the
// host has padded): rows of all taps are gathered, 147 columns in the order of dw. FLOPs: 2 * live positions * K * C
// per tap. Bytes: dz and x once per tap (L2 at these sizes), dw once; dead taps are only zeroed.
//
// Versions, 3x3x64 on 8x8, batch 64, fp32, one core (oneDNN 1050): packed, chunks of 256 1341 us; no sharing of cache
// sets 1269; in place 990-1046. bf16 (oneDNN 860): 700, with packing by 16 lanes 650. Stem fp32 (oneDNN 1340): a tap
// per filter row, 21 of 32 columns 3925; gathered by memcpy 1777, by vectors 1498. 3x3x512 on 1x1, batch 64, fp32: 535,
// almost all of it zeroing (oneDNN 26000).

namespace fastconv::cpu::FASTCONV_ISA_NS {

struct TapRange {  // output positions whose tap lies inside the map
  int64_t begin, end;
};
FASTCONV_INLINE TapRange tap_range(int64_t out, int64_t in, int64_t stride,
                                   int64_t offset) {  // 0 <= o * stride + offset < in
  const int64_t begin = offset >= 0 ? 0 : (-offset + stride - 1) / stride;
  const int64_t last = in - 1 - offset;
  int64_t end = last < 0 ? 0 : last / stride + 1;
  if (end > out) end = out;
  return {begin < end ? begin : end, end};
}

#ifndef FASTCONV_AMX  // else in conv_rows_wgrad_amx.h
// A: [k block][unit][kTileRows] from rows of dz; blocks are `stride` bytes apart.
template <class T>
inline void pack_rows(const T* const* rows, int64_t units, int64_t k0, int64_t k1, char* a, int64_t stride) {
  constexpr int E = kUnitElements<T>;
  for (int64_t u = 0; u < units; ++u) {
    const T *lo = rows[u * E], *hi = E == 2 ? rows[u * E + E - 1] : nullptr;
    char* to = a + u * kTileRows * 4;
    int64_t k = k0;
#if FASTCONV_VEC_BYTES == 64
    static_assert(kLanes == 2 * kTileRows, "a vector is two blocks");
    for (; k + kLanes <= k1; k += kLanes, to += 2 * stride) {
      const u32v z = zip_units<T>(lo + k, hi ? hi + k : nullptr, kLanes);
      *(__m256i*)to = _mm512_castsi512_si256((__m512i)z);
      *(__m256i*)(to + stride) = _mm512_extracti64x4_epi64((__m512i)z, 1);
    }
#elif FASTCONV_VEC_BYTES == 32
    // Whole vectors: two units too many, which the next ones, or nothing but the gap between blocks, lie under.
    static_assert(kLanes == kTileRows + 2 && kLanes == 8);
    for (; k < k1; k += kTileRows, to += stride) {
      const int n = k1 - k < kLanes ? (int)(k1 - k) : kLanes;
      *(u32v_u*)to = zip_units<T>(lo + k, hi ? hi + k : nullptr, n);
    }
#endif
    for (; k < k1; k += kTileRows, to += stride) {
      uint32_t t[kTileRows] = {};
      const int n = k1 - k < kTileRows ? (int)(k1 - k) : kTileRows;
      for (int i = 0; i < n; ++i) {
        T pair[E] = {};
        pair[0] = lo[k + i];
        if (hi) pair[E - 1] = hi[k + i];
        __builtin_memcpy(&t[i], pair, 4);
      }
      __builtin_memcpy(to, t, sizeof(t));
    }
  }
}

// B: [column block][unit][kTileCols] from rows of x; blocks are `stride` bytes apart.
template <class T>
inline void pack_columns(const T* const* rows, int64_t units, int64_t c0, int64_t c1, char* b, int64_t stride) {
  constexpr int E = kUnitElements<T>;
  for (int64_t u = 0; u < units; ++u) {
    const T *lo = rows[u * E], *hi = E == 2 ? rows[u * E + E - 1] : nullptr;
    char* to = b + u * kTileCols * 4;
    int64_t c = c0;
    for (; c + kTileCols <= c1; c += kTileCols, to += stride)
      for (int v = 0; v < kTileVecs; ++v)
        ((u32v*)to)[v] = zip_units<T>(lo + c + v * kLanes, hi ? hi + c + v * kLanes : nullptr, kLanes);
    if (c == c1) continue;
    for (int v = 0; v < kTileVecs; ++v, c += kLanes)
      ((u32v*)to)[v] =
          c < c1 ? zip_units<T>(lo + c, hi ? hi + c : nullptr, c1 - c < kLanes ? (int)(c1 - c) : kLanes) : u32v{};
  }
}

// Packed blocks of one tile of filters (a_stride: between tile registers, of which AVX has none).
template <class T, class D>
FASTCONV_INLINE void tile_packed(const char* a, int64_t /*a_stride*/, const char* b, int64_t units, D* out, int64_t ld,
                                 int n_rows, int n_cols, bool add, bool past) {
  tile_outer<T, D, false>(a, b, nullptr, units, out, ld, n_rows, n_cols, add, past);
}
#endif

constexpr int kBlockRows = kGrain > 1 ? kGrain : kTileRows;  // filters of one block of A

// One block of units into rows [ka, kb) of one tap. Columns inside rows: a row of dw is written in order.
template <class T, class D>
void wgrad_block(const WgradTask<T, D>& t, const T* const* dz, const T* const* x, int64_t units, int64_t ka, int64_t kb,
                 D* out, int64_t ld, bool add, bool past) {
  if constexpr (sizeof(T) == 4) {
    if (kb - ka + t.c1 - t.c0 <= kWgradDirect && (kb - ka) % kTileRows == 0 &&
        ((t.c1 - t.c0) % kTileCols == 0 || t.gather_r)) {
      for (int64_t c = t.c0; c < t.c1; c += kTileCols) {
        const int n_cols = t.c1 - c < kTileCols ? (int)(t.c1 - c) : kTileCols;
        pack_columns(x, units, c, c + kTileCols, t.b, 0);
        for (int64_t k = ka; k < kb; k += kTileRows)
          tile_outer<T, D, true>((const char*)(k * 4), t.b, dz, units, out + (k - ka) * ld + (c - t.c0), ld, kTileRows,
                                 n_cols, add, past);
      }
      return;
    }
  }
  const int64_t a_stride = units * kBlockRows * 4 + 64,
                b_stride = units * kTileCols * 4 + 64;  // + 64: not the same cache set
  pack_rows(dz, units, ka, kb, t.a, a_stride);
  const int64_t at_once = kWgradColumnBytes / b_stride * kTileCols;
  for (int64_t c0 = t.c0; c0 < t.c1; c0 += at_once) {
    const int64_t c1 = c0 + at_once < t.c1 ? c0 + at_once : t.c1;
    pack_columns(x, units, c0, t.gather_r ? (c1 + kTileCols - 1) / kTileCols * kTileCols : c1, t.b, b_stride);
    for (int64_t k = ka; k < kb; k += kTileRows) {
      const int n_rows = kb - k < kTileRows ? (int)(kb - k) : kTileRows;
      for (int64_t c = c0; c < c1; c += kTileCols) {
        const int n_cols = c1 - c < kTileCols ? (int)(c1 - c) : kTileCols;
        tile_packed<T, D>(t.a + (k - ka) / kBlockRows * a_stride, a_stride, t.b + (c - c0) / kTileCols * b_stride,
                          units, out + (k - ka) * ld + (c - t.c0), ld, n_rows, n_cols, add, past);
      }
    }
  }
}

struct TapShift {  // where tap (r, s) reads, and the output positions that it serves
  int64_t dh, dw;
  TapRange p, q;
};
template <class T, class D>
FASTCONV_INLINE TapShift tap_shift(const WgradTask<T, D>& t, int64_t tap) {
  const int64_t dh = tap / t.taps_s * t.dil_h - t.pad_h, dw = tap % t.taps_s * t.dil_w - t.pad_w;
  return {dh, dw, tap_range(t.p, t.h_size, t.stride_h, dh), tap_range(t.q, t.w_size, t.stride_w, dw)};
}

// Row pointers of the live positions among [m, m1), at most `most`; m moves behind the last one taken.
template <class T, class D>
inline int64_t list_rows(const WgradTask<T, D>& t, const TapShift& tap, int64_t& m, int64_t m1, int64_t most,
                         const T** dz, const T** x) {
  int64_t rows = 0;
  while (m < m1 && rows < most) {
    const int64_t line = m / t.q, n = line / t.p, p = line % t.p;
    if (p < tap.p.begin || p >= tap.p.end) {
      m = (line + 1) * t.q;
      continue;
    }
    int64_t q = m - line * t.q, end = tap.q.end;
    if (q < tap.q.begin) q = tap.q.begin;
    if (end > m1 - line * t.q) end = m1 - line * t.q;
    if (end > q + most - rows) end = q + most - rows;
    const T* a = t.dz + (line * t.q + q) * t.k;
    const T* b = t.x + ((n * t.h_size + p * t.stride_h + tap.dh) * t.w_size + q * t.stride_w + tap.dw) * t.pixel;
    for (; q < end; ++q, ++rows, a += t.k, b += t.stride_w * t.pixel) dz[rows] = a, x[rows] = b;
    m = end >= tap.q.end ? (line + 1) * t.q : line * t.q + end;
  }
  return rows;
}

// Few channels: the rows of x are gathered (all taps side by side, as they lie in dw) into t.gathered.
template <class T, class D>
inline void gather_rows(const WgradTask<T, D>& t, int64_t rows, const T** x) {
  const int64_t width = t.columns / t.gather_r;
  T* to = t.gathered;
  for (int64_t i = 0; i < rows; ++i, to += t.gather_row) {
    copy_pieces((const char*)x[i], t.gather_step * sizeof(T), t.gather_r, width * sizeof(T), (char*)to);
    x[i] = to;
  }
}

// Taps [tap0, tap1) of rows [ka, kb): all taps of one chunk of positions before the next, so that dz and x come from
// L2.
template <class T, class D>
void wgrad_taps(const WgradTask<T, D>& t, const int64_t* taps, int n_taps, int64_t ka, int64_t kb) {
  constexpr int E = kUnitElements<T>;
  constexpr int64_t kRows = kWgradUnits * E;
  constexpr int64_t kWhole = kGrain * E;  // positions that are multiplied together
  const int64_t total = t.n * t.p * t.q, width = t.c1 - t.c0, all_taps = t.taps_r * t.taps_s, ld = all_taps * t.columns;
  const bool through_sum = sizeof(D) < 4 && total > kRows;  // partial sums must stay fp32
  const T **dz = t.rows, **x = t.rows + kRows;
  bool started[kWgradTaps] = {};
  // Chunks of one size: one tap takes as many live rows as fit, several taps take the same positions.
  int64_t summed = total;
  if (n_taps == 1) {
    const TapShift tap = tap_shift(t, taps[0]);
    summed = t.n * (tap.p.end - tap.p.begin) * (tap.q.end - tap.q.begin);
  }
  const int64_t chunks = (summed + kRows - 1) / kRows,
                most = ((summed + chunks - 1) / chunks + kWhole - 1) / kWhole * kWhole;
  for (int64_t m0 = 0; m0 < total;) {
    int64_t next = m0;
    for (int i = 0; i < n_taps; ++i) {
      const TapShift tap = tap_shift(t, taps[i]);
      int64_t m = m0;
      const int64_t rows = list_rows(t, tap, m, n_taps == 1 || m0 + most > total ? total : m0 + most, most, dz, x);
      next = n_taps == 1 ? m : m0 + most;
      if (rows == 0) continue;
      if (t.gather_r > 0) gather_rows(t, rows, x);
      int64_t whole = rows;
      for (; whole % kWhole; ++whole) dz[whole] = x[whole] = nullptr;
      const int64_t units = whole / E;
      D* out = t.dw + (ka * all_taps + taps[i]) * t.columns + t.c0;
      if constexpr (sizeof(D) < 4) {
        if (through_sum) {
          WgradTask<T, float> sums{};  // the same block, into fp32
          sums.a = t.a, sums.b = t.b, sums.c0 = t.c0, sums.c1 = t.c1, sums.gather_r = t.gather_r;
          wgrad_block<T, float>(sums, dz, x, units, ka, kb, t.sum + i * (kb - ka) * width, width, started[i], false);
        } else {
          wgrad_block<T, D>(t, dz, x, units, ka, kb, out, ld, false, false);
        }
      } else {
        wgrad_block<T, D>(t, dz, x, units, ka, kb, out, ld, started[i], t.past && chunks == 1);
      }
      started[i] = true;
    }
    m0 = next;
  }
  if constexpr (sizeof(D) < 4) {
    for (int i = 0; through_sum && i < n_taps; ++i)
      for (int64_t k = ka; k < kb; ++k)
        for (int64_t c = 0; c < width; c += kLanes) {
          const int n = width - c < kLanes ? (int)(width - c) : kLanes;
          const float* from = t.sum + (i * (kb - ka) + k - ka) * width + c;
          store_lanes(t.dw + (k * all_taps + taps[i]) * t.columns + t.c0 + c, load_lanes(from, n), n);
        }
  }
}

// One row of a dead tap.
template <class T, class D>
FASTCONV_INLINE void zero_columns(const WgradTask<T, D>& t, D* to) {
  if constexpr (sizeof(D) == 4) {
    if (t.past) {
      for (int64_t c = 0; c < t.c1 - t.c0; c += kLanes) stream(to + c, f32v{});
      return;
    }
  }
  __builtin_memset(to, 0, (t.c1 - t.c0) * sizeof(D));
}

template <class T, class D>
void conv_wgrad(const WgradTask<T, D>& t) {
  int64_t taps[kWgradTaps];
#ifdef FASTCONV_AMX
  constexpr int64_t kAtOnce = kWgradKAmx;
  const TileRegisters registers;
#else
  constexpr int64_t kAtOnce = kWgradK;
#endif
  for (int64_t k = t.k0; k < t.k1; k += kAtOnce) {
    const int64_t k1 = k + kAtOnce < t.k1 ? k + kAtOnce : t.k1;
    int n = 0;
    for (int64_t tap = t.tap_begin; tap < t.tap_end; ++tap) {
      const TapShift s = tap_shift(t, tap);
      if (s.p.begin < s.p.end && s.q.begin < s.q.end) {
        taps[n++] = tap;
      } else if (!t.leave_dead) {
        for (int64_t i = k; i < k1; ++i) zero_columns(t, t.dw + (i * t.taps_r * t.taps_s + tap) * t.columns + t.c0);
      }
      if (n == t.taps_at_once) wgrad_taps(t, taps, n, k, k1), n = 0;
    }
    if (n > 0) wgrad_taps(t, taps, n, k, k1);
  }
  if (t.past) stream_fence();
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
