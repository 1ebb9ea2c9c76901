// A few rows against weights as they lie, [k][taps][c]: y[i][k] = sum over u of a(i, u) . w(k, u), vectors along the
// summed units.
//
// For a handful of rows (1x1 and 2x2 maps at small batch) each weight is used once or twice, and packing it first would
// double its traffic: here both operands are read in order, 4 rows x 4 weights a step (8 loads, 16 multiply-adds), and
// each of the 16 accumulators is summed over its lanes at the end (8 operations: so not for short sums or many rows;
// conv_rows.cpp decides). fp32 accumulation, one partial sum per lane. 2048 -> 512 on a 1x1 map, fp32, batch 1 / 4, one
// core: here 38 / 61 us, packed on the way 134 / 154. With the tail's test inside the loop 43 / 164: keep the loop over
// whole vectors free of it.

namespace fastconv::cpu::FASTCONV_ISA_NS {

template <int D>
FASTCONV_INLINE f32v add_swapped(f32v v) {
  i32v mask;
  for (int l = 0; l < kLanes; ++l) mask[l] = l ^ D;
  return v + __builtin_shuffle(v, mask);
}
FASTCONV_INLINE float sum_lanes(f32v v) {  // pairwise
  if constexpr (kLanes >= 16) v = add_swapped<8>(v);
  if constexpr (kLanes >= 8) v = add_swapped<4>(v);
  return add_swapped<1>(add_swapped<2>(v))[0];
}

FASTCONV_INLINE u32v load_whole(const char* p) { return *(const u32v_u*)p; }
FASTCONV_INLINE u32v load_units(const char* p, int64_t n) {
  u32v t{};
  __builtin_memcpy(&t, p, n * 4);
  return t;
}

// sums[i * kTileCols + l] for R rows and the four weights w[l].
template <class T, int R>
__attribute__((noinline)) void tile_dot(const char* const* rows, const RowsSegment* segments, int n_segments,
                                        const char* const (&w)[4], float* sums) {
  f32v acc[R][4];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = f32v{};
  for (int g = 0; g < n_segments; ++g) {
    const int64_t first = segments[g].panel * 4, units = segments[g].units;
    const char *w0 = w[0] + first, *w1 = w[1] + first, *w2 = w[2] + first, *w3 = w[3] + first;
    const char* row[R];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) row[i] = rows[g * kTileRows + i];
#define FASTCONV_DOT_STEP(load)                                                                            \
  {                                                                                                        \
    const u32v b0 = load(w0 + u * 4), b1 = load(w1 + u * 4), b2 = load(w2 + u * 4), b3 = load(w3 + u * 4); \
    _Pragma("GCC unroll 4") for (int i = 0; i < R; ++i) {                                                  \
      const u32v a = load(row[i] + u * 4);                                                                 \
      acc[i][0] = dot(T{}, acc[i][0], a, b0);                                                              \
      acc[i][1] = dot(T{}, acc[i][1], a, b1);                                                              \
      acc[i][2] = dot(T{}, acc[i][2], a, b2);                                                              \
      acc[i][3] = dot(T{}, acc[i][3], a, b3);                                                              \
    }                                                                                                      \
  }
    int64_t u = 0;
    for (; u + kLanes <= units; u += kLanes) FASTCONV_DOT_STEP(load_whole)
    if (u < units) {
      const int64_t n = units - u;
      auto load_part = [n](const char* p) __attribute__((always_inline)) { return load_units(p, n); };
      FASTCONV_DOT_STEP(load_part)
    }
#undef FASTCONV_DOT_STEP
  }
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i)
    for (int l = 0; l < 4; ++l) sums[i * kTileCols + l] = sum_lanes(acc[i][l]);
}

// The same result as tile_rows_any() for forward weights that are not packed.
template <class T>
inline void tile_rows_unpacked(int n_rows, const char* const* rows, const RowsSegment* segments, int n_segments,
                               const char* weight, int64_t stride, const RowsEpilogue<T>& e, const int64_t* at,
                               int64_t j, int64_t columns) {
  alignas(64) float sums[kTileRows * kTileCols];
  const int n = columns - j < kTileCols ? (int)(columns - j) : kTileCols;
  for (int l = 0; l < n; l += 4) {
    const char* w[4];
    for (int m = 0; m < 4; ++m) w[m] = weight + (j + (l + m < n ? l + m : n - 1)) * stride;
    for (int i = 0; i < n_rows; i += 4) {
      float* to = sums + i * kTileCols + l;
      switch (n_rows - i) {
        case 1:
          tile_dot<T, 1>(rows + i, segments, n_segments, w, to);
          break;
        case 2:
          tile_dot<T, 2>(rows + i, segments, n_segments, w, to);
          break;
        case 3:
          tile_dot<T, 3>(rows + i, segments, n_segments, w, to);
          break;
        default:
          tile_dot<T, 4>(rows + i, segments, n_segments, w, to);
      }
    }
  }
  finish(e, at, j, (const f32v*)sums, n_rows, n);
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
