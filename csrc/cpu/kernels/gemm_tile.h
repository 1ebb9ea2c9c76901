// The register tile of the row-class convolution: acc[i][j] = sum over u of a(i, u) . b(u, j), i < 8 rows, j < 32
// columns, fp32.
//
// A unit is 32 bits: one fp32 channel, or two neighbouring bf16 channels (x . y is then x0 y0 + x1 y1). So both dtypes
// have one layout, one packing and one loop. b is a panel [units][columns], read in order; a is either rows by pointer,
// one unit after the other (forward, data gradient), or a packed block [units][rows] (weight gradient). A step loads 2
// vectors of b and broadcasts 8 units of a: 10 loads for 16 multiply-adds, so that two loads and two multiply-adds a
// cycle are bound by the latter; 16 accumulators hide the latency of 4. Accumulation: fp32, in registers; every 256
// units they are folded into a second sum (a stack array: 0.5% of the time), which keeps the error of a long reduction
// near that of a blocked GEMM.
//
// Tried (one core of a Zen 5, units = 64 / 1024; GFLOP/s fp32; peak 276): 8x32 250 / 276, 12x32 251 / 273, 14x32 249 /
// 265, 6x64 251 / 275, 8x48 258 / 274, 4x32 175 / 182 (latency), 1x32 112 / 71. bf16 8x32: 520 / 549 of 552. 8x32 is at
// peak, divides the usual channel counts and its 8 row pointers fit the integer registers. A panel of 590 KB (3x3x512),
// streamed from L2, costs nothing (276): so the reduction is not cut into L1-sized pieces. AVX2 and portable: 6 rows x
// 2 vectors, 12 accumulators of 16 registers. Without a bf16 dot product the halves are widened by shifts: two
// multiply-adds per unit and exact products.

namespace fastconv::cpu::FASTCONV_ISA_NS {

#ifdef FASTCONV_AMX
constexpr int kTileRows = 32;  // of bf16, in tile registers (gemm_tile_amx.h)
constexpr int kGrain = 16;     // rows of one register: tiles get whole ones
#else
constexpr int kTileRows = FASTCONV_VEC_BYTES == 64 ? 8 : 6;
constexpr int kGrain = 1;
#endif
constexpr int kTileVecs = 2;
constexpr int kLanes = FASTCONV_VEC_BYTES / 4;
constexpr int kTileCols = kTileVecs * kLanes;

constexpr int64_t kFoldUnits =
    256;  // longer sums are cut here and folded: 9 x 256 has the rounding error of 25 terms, not of 48

typedef uint32_t unit_u __attribute__((aligned(2), may_alias));
typedef u32v u32v_u __attribute__((aligned(2), may_alias));

FASTCONV_INLINE u32v broadcast_unit(const char* p) { return u32v{} + *(const unit_u*)p; }

// The same where it is written, once more where it was read before: GCC 12 would shift the scalar and move it across to
// the vectors, or keep the vector and spill others.
FASTCONV_INLINE u32v broadcast_again(const char* p) {
#if FASTCONV_VEC_BYTES == 32
  u32v v;
  asm volatile("vpbroadcastd %1, %0" : "=x"(v) : "m"(*(const unit_u*)p));
  return v;
#else
  return broadcast_unit(p);
#endif
}

FASTCONV_INLINE f32v dot(float, f32v acc, u32v a, u32v b) { return acc + (f32v)a * (f32v)b; }

FASTCONV_INLINE f32v dot(bf16, f32v acc, u32v a, u32v b) {
#ifdef FASTCONV_DPBF16
  return (f32v)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  acc += (f32v)(a << 16) * (f32v)(b << 16);
  return acc + (f32v)(a & 0xffff0000u) * (f32v)(b & 0xffff0000u);
#endif
}

// Without a bf16 dot product and with 16 registers: the low halves of all units, then the high ones, so that a tile's
// sums stay in registers beside the halves of one vector. f(widened) with what widens either.
template <class T>
constexpr bool kHalves = sizeof(T) == 2 && FASTCONV_VEC_BYTES < 64;

template <class F>
FASTCONV_INLINE void with_halves(const F& f) {
  f([](u32v v) __attribute__((always_inline)) { return (f32v)(v << 16); });
  f([](u32v v) __attribute__((always_inline)) { return (f32v)(v & 0xffff0000u); });
}

// One unit of R rows, unit(i) the address of row i's, against one of the panel.
template <class T, int R, class Unit>
FASTCONV_INLINE void tile_step(f32v (&acc)[R][kTileVecs], const char* b, const Unit& unit) {
  if constexpr (kHalves<T>) {
    with_halves([&](const auto& widened) {
      const f32v b0 = widened(*(const u32v_u*)b), b1 = widened(*(const u32v_u*)(b + FASTCONV_VEC_BYTES));
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const f32v a = widened(broadcast_again(unit(i)));
        acc[i][0] += a * b0;
        acc[i][1] += a * b1;
      }
    });
  } else {
    const u32v b0 = *(const u32v_u*)b, b1 = *(const u32v_u*)(b + FASTCONV_VEC_BYTES);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const u32v a = broadcast_unit(unit(i));
      acc[i][0] = dot(T{}, acc[i][0], a, b0);
      acc[i][1] = dot(T{}, acc[i][1], a, b1);
    }
  }
}

// The first n of a vector. AVX-512 masks; vec.h's loop over elements took most of the time where channels are no
// multiple of 16.
template <class T>
FASTCONV_INLINE f32v load_lanes(const T* p, int n) {
  if (n >= kLanes) return Vec<T>::load(p);
#if FASTCONV_VEC_BYTES == 64
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(T) == 4)
    return (f32v)_mm512_maskz_loadu_ps((__mmask16)mask, p);
  else
    return widen(T{}, (u16v)_mm256_maskz_loadu_epi16((__mmask16)mask, p));
#else
  return Vec<T>::load_n(p, n);
#endif
}

template <class T>
FASTCONV_INLINE void store_lanes(T* p, f32v v, int n) {
#if FASTCONV_VEC_BYTES == 64
  const __mmask16 mask = n >= kLanes ? (__mmask16)0xffff : (__mmask16)((1u << n) - 1);
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(p, mask, (__m512)v);
  } else {
#ifdef FASTCONV_DPBF16
    _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh((__m512)v));
#else
    _mm256_mask_storeu_epi16(p, mask, (__m256i)narrow(T{}, v));
#endif
  }
#else
  store(p, v, n >= kLanes, n);
#endif
}

FASTCONV_INLINE f32v activate(f32v y, Act act) {
  if (act == Act::identity) return y;
  return act == Act::relu ? apply_act<float, kActRelu>(y, act) : act_any<float>(y, act);
}

// y = act((acc - mean) * scale + shift + residual) on columns [j, j + n) of n_rows rows of sums, in memory. Out of
// line: inlined into the tile it cost 150 cycles a tile in tests and spilled addresses, against 40 for the way through
// L1.
template <class T>
__attribute__((noinline)) void finish(const RowsEpilogue<T>& e, const int64_t* at, int64_t j, const f32v* sums,
                                      int n_rows, int n) {
  for (int v = 0; v < kTileVecs; ++v, j += kLanes, n -= kLanes) {
    if (n <= 0) return;
    const f32v scale = e.scale ? load_lanes(e.scale + j, n) : f32v{} + 1.0f;
    const f32v mean = e.mean ? load_lanes(e.mean + j, n) : f32v{};
    const f32v shift = e.shift ? load_lanes(e.shift + j, n) : f32v{};
    for (int i = 0; i < n_rows; ++i) {
      f32v y = (sums[i * kTileVecs + v] - mean) * scale + shift;
      if (e.residual) y += load_lanes(e.residual + at[i] + j, n);
      if (e.pre) store_lanes(e.pre + at[i] + j, y, n);
      store_lanes(e.out + at[i] + j, activate(y, e.act), n);
    }
  }
}

template <class T>
FASTCONV_INLINE bool is_plain(const RowsEpilogue<T>& e) {
  return !e.mean && !e.scale && !e.shift && !e.residual && !e.pre && e.act == Act::identity;
}

// The lines that a row of a tile ends in, asked for while its sums are made: without those of the output, wide outputs
// wait 30% of the time for them.
template <class T>
FASTCONV_INLINE void prefetch_ends(const RowsEpilogue<T>& e, int64_t at) {
  __builtin_prefetch(e.out + at, 1);
  if (sizeof(T) == 4) __builtin_prefetch(e.out + at + 16, 1);
  if (e.residual == nullptr) return;
  __builtin_prefetch(e.residual + at);
  if (sizeof(T) == 4) __builtin_prefetch(e.residual + at + 16);
}

// R rows by pointer: rows[segment * kTileRows + i]. at[i]: element offset of row i's first column in the output.
template <class T, int R>
__attribute__((noinline)) void tile_rows(const char* const* rows, const RowsSegment* segments, int n_segments,
                                         const char* panel, const RowsEpilogue<T>& e, const int64_t* at, int64_t j,
                                         int64_t columns) {
  f32v acc[R][kTileVecs], fold[R * kTileVecs];
  f32v* sum = fold;
  asm("" : "+r"(sum));  // in memory, as written: the compiler would keep both sums in registers and spill
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) acc[i][0] = acc[i][1] = f32v{};
  for (int i = 0; i < R; ++i) prefetch_ends(e, at[i] + j);
  constexpr int64_t kUnitBytes = kTileCols * 4, kPanelAhead = 8 * kUnitBytes;
  int64_t summed = 0;
  bool folded = false;
  for (int g = 0; g < n_segments; ++g) {
    const char* row[R];
    for (int i = 0; i < R; ++i) row[i] = rows[g * kTileRows + i];
    const char* b = panel + segments[g].panel * kUnitBytes;
    for (int64_t left = segments[g].units; left > 0;) {
      const int64_t units = left < kFoldUnits ? left : kFoldUnits;
      left -= units;
      if (summed + units > kFoldUnits) {
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i)
          for (int v = 0; v < kTileVecs; ++v) {
            sum[i * kTileVecs + v] = folded ? sum[i * kTileVecs + v] + acc[i][v] : acc[i][v];
            acc[i][v] = f32v{};
          }
        folded = true;
        summed = 0;
      }
      summed += units;
      for (int64_t u = 0; u < units; ++u) {
        __builtin_prefetch(b + kPanelAhead);
        if (kUnitBytes > 64) __builtin_prefetch(b + kPanelAhead + 64);
        tile_step<T, R>(acc, b, [&](int i) { return row[i] + u * 4; });
        b += kUnitBytes;
      }
      for (int i = 0; i < R; ++i) row[i] += units * 4;
    }
  }
  if (folded) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < kTileVecs; ++v) acc[i][v] += sum[i * kTileVecs + v];
  }
  if (columns - j >= kTileCols && is_plain(e)) {
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      store_lanes(e.out + at[i] + j, acc[i][0], kLanes);
      store_lanes(e.out + at[i] + j + kLanes, acc[i][1], kLanes);
    }
    return;
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < kTileVecs; ++v) sum[i * kTileVecs + v] = acc[i][v];
  finish(e, at, j, sum, R, columns - j < kTileCols ? (int)(columns - j) : kTileCols);
}

template <int R>
struct TileHeight {
  static constexpr int rows = R;
};

// f(TileHeight<n_rows>): the code of a tile depends on its number of rows.
template <class F>
FASTCONV_INLINE void with_tile_height(int n_rows, const F& f) {
  switch (n_rows) {
#define FASTCONV_TILE(R) \
  case R:                \
    return f(TileHeight<R>{});
    FASTCONV_TILE(1)
    FASTCONV_TILE(2)
    FASTCONV_TILE(3)
    FASTCONV_TILE(4)
    FASTCONV_TILE(5)
    FASTCONV_TILE(6)
#if FASTCONV_VEC_BYTES == 64
    FASTCONV_TILE(7)
    FASTCONV_TILE(8)
#endif
#undef FASTCONV_TILE
  }
}

// Sums of a tile to its first n_rows x n_cols elements of out (row stride ld), as tile_outer() says.
template <class D>
FASTCONV_INLINE void store_sums(const f32v* sums, D* out, int64_t ld, int n_rows, int n_cols, bool add, bool past) {
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

// a [units][kTileRows] and b [units][kTileCols], packed, or (DIRECT, fp32) a + a_rows[u] where it is; the first n_rows
// x n_cols of the tile go to out (row stride ld), added to what is there if `add` (fp32 only), past the caches if
// `past` (fp32 only).
template <class T, class D, bool DIRECT>
__attribute__((noinline)) void tile_outer(const char* a, const char* b, const T* const* a_rows, int64_t units, D* out,
                                          int64_t ld, int n_rows, int n_cols, bool add, bool past) {
  f32v acc[kTileRows][kTileVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i) acc[i][0] = acc[i][1] = f32v{};
  for (int64_t u = 0; u < units; ++u) {
    const char* ua = DIRECT ? (const char*)a_rows[u] + (int64_t)a : a + u * (kTileRows * 4);
    tile_step<T, kTileRows>(acc, b + u * (kTileCols * 4), [&](int i) { return ua + i * 4; });
  }
  if (n_rows == kTileRows && n_cols == kTileCols) {
    if constexpr (sizeof(D) == 4) {
      if (past) {
#pragma GCC unroll 8
        for (int i = 0; i < kTileRows; ++i)
          for (int v = 0; v < kTileVecs; ++v) stream(out + i * ld + v * kLanes, acc[i][v]);
        return;
      }
    }
    if (add) {
#pragma GCC unroll 8
      for (int i = 0; i < kTileRows; ++i)
        for (int v = 0; v < kTileVecs; ++v) acc[i][v] += Vec<D>::load(out + i * ld + v * kLanes);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kTileRows; ++i)
      for (int v = 0; v < kTileVecs; ++v) store_lanes(out + i * ld + v * kLanes, acc[i][v], kLanes);
    return;
  }
  f32v sums[kTileRows * kTileVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kTileRows; ++i)
    for (int v = 0; v < kTileVecs; ++v) sums[i * kTileVecs + v] = acc[i][v];
  store_sums(sums, out, ld, n_rows, n_cols, add, false);
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
