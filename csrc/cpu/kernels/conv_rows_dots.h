// Forward of a few rows, from the weights where they lie:
//   y[row, k] = sum over live taps and c of x[row, tap, c] * w[k, tap, c].
//
// Each weight meets a handful of rows, so packing it (a transpose, a copy to L2 and back) costs more than its products.
// A filter and what a row reads of a segment are both runs of memory: lanes are channels, R rows meet F filters in
// registers, and the lanes are added up at the end. Eight filters at a time meet all tiles, while the lines of the next
// eight are asked for, or of the same ones further on where eight would not stay in L2: w is read once, in order.
// FLOPs: 2 * rows * live taps * C * K; bytes: w once.
//
// Measured, 2 cores of a Zen 4, weights from memory (ResNet50's training step at 32 px, batch 4), us, packed on the way
// : here, fp32 and bf16: 512 -> 2048 with 4 rows 165 : 131 and 83 : 64; 1024 -> 256 with 16 rows 76 : 65 and 37 : 28;
// 3x3x256 on 2x2 125 : 95 and 67 : 38. The first is at the rate of plain reading. 32 rows: no difference; 64: 49 : 70.

namespace fastconv::cpu::FASTCONV_ISA_NS {

constexpr int kDotFilters = 8;  // that meet all tiles before the next ones
// Bytes. A linear layer 25088 -> 4096 for one image, fp32, over ATen's time in the same run (2 cores of a Xeon with
// AMX): 1.43 and 1.50 where the next eight filters were asked for, 800 KB ahead; 0.98 to 1.12 from 1 to 16 KB ahead.
constexpr int64_t kFarAhead = 256 << 10, kNearAhead = 4096;

// Filters in registers beside R rows: up to 16 sums, or 12 of 16 registers in all.
constexpr int dot_filters(int rows) {
  if (FASTCONV_VEC_BYTES == 64) return rows <= 2 ? 8 : rows <= 4 ? 4 : 2;
  return rows == 1 ? 8 : rows == 2 ? 4 : 2;
}

// The task's tiles, placed.
template <class T, class W>
struct TilesInPlace {
  TileRows at[kInPlaceTiles];
  const RowsGroup* groups[kInPlaceTiles];
  int n = 0;

  explicit TilesInPlace(const RowsTask<T, W>& t) {
    const RowsPlan& p = *t.plan;
    int64_t first = 0;
    for (int64_t g = 0; g < p.n_groups; first += p.groups[g].tiles, ++g) {
      const RowsGroup& group = p.groups[g];
      const GroupTiles mine(group, first, t.tile_begin, t.tile_end);
      if (mine.begin >= mine.end) continue;
      RowWalker walk(p, group, grain_begin(group, mine.grain(mine.begin)));
      for (int64_t tile = mine.begin; tile < mine.end; ++tile, ++n) {
        groups[n] = &group;
        place_tile(t, walk, mine.grain(tile), mine.grain(tile + 1), n, at[n]);
      }
    }
  }
};

// t[0]: lane l is the sum of vector l's lanes. Halves the vectors log2(kLanes) times.
template <int D>
FASTCONV_INLINE void add_lanes(f32v (&t)[kLanes]) {
  const StageLanes<D> lanes;  // the sums of a transpose's rows
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; i += 2 * D)
    t[i] = __builtin_shuffle(t[i], t[i + D], lanes.low) + __builtin_shuffle(t[i], t[i + D], lanes.high);
  if constexpr (D * 2 < kLanes) add_lanes<D * 2>(t);
}

// R rows of one group and F filters from w on, `stride` elements apart, to sums[R][kTileCols]. ahead: elements to what
// is asked for.
template <class T, class W, int R, int F>
__attribute__((noinline)) void tile_dots(const char* const* rows, const RowsGroup& group, const W* w, int64_t stride,
                                         int64_t ahead, float* sums) {
  constexpr int64_t kStep = kLanes * kUnitElements<T>;
  f32v acc[R][F];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
    for (int k = 0; k < F; ++k) acc[i][k] = f32v{};
  for (int g = 0; g < group.n_segments; ++g) {
    const RowsSegment& s = group.segments[g];
    const W* b = w + s.panel * kUnitElements<T>;
    const char* row[R];
    for (int i = 0; i < R; ++i) row[i] = rows[g * kTileRows + i];
    for (int64_t u = 0; u < s.units; u += kLanes, b += kStep) {
      u32v filter[F];
#pragma GCC unroll 8
      for (int k = 0; k < F; ++k) {
        __builtin_prefetch(b + k * stride + ahead, 0, 2);
        if (sizeof(W) > sizeof(T)) __builtin_prefetch(b + k * stride + ahead + kLanes, 0, 2);
        filter[k] = load_units<T>(b + k * stride);
      }
      if constexpr (kHalves<T>) {
        with_halves([&](const auto& widened) {
          f32v half[F];
          for (int k = 0; k < F; ++k) half[k] = widened(filter[k]);
#pragma GCC unroll 8
          for (int i = 0; i < R; ++i) {
            const f32v x = widened(*(const u32v_u*)(row[i] + u * 4));
            for (int k = 0; k < F; ++k) acc[i][k] += x * half[k];
          }
        });
      } else {
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
          const u32v x = *(const u32v_u*)(row[i] + u * 4);
          for (int k = 0; k < F; ++k) acc[i][k] = dot(T{}, acc[i][k], x, filter[k]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < R * F; n += kLanes) {
    f32v t[kLanes];
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l) t[l] = n + l < R * F ? acc[(n + l) / F % R][(n + l) % F] : f32v{};
    add_lanes<1>(t);
#pragma GCC unroll 16
    for (int l = 0; l < kLanes; ++l)
      if (n + l < R * F) sums[(n + l) / F * kTileCols + (n + l) % F] = t[0][l];
  }
}

// The task's tiles, at most kInPlaceTiles, against all of its panels; t.table has room for them, t.sums for
// [tiles][kTileRows][kTileCols].
template <class T, class W>
void conv_rows_dots(const RowsTask<T, W>& t) {
  const RowsPlan& p = *t.plan;
  const TilesInPlace<T, W> tiles(t);
  const int64_t stride = p.taps_r * p.taps_s * p.reduce, next = kDotFilters * stride, width = sizeof(W);
  const int64_t ahead = next * width <= kFarAhead ? next : kNearAhead / width;
  constexpr int64_t kTile = kTileRows * kTileCols;
  for (int64_t j = t.panel_begin; j < t.panel_end; ++j) {
    for (int k = 0; k < kTileCols; k += kDotFilters)
      for (int i = 0; i < tiles.n; ++i)
        with_tile_height(tiles.at[i].rows[0], [&](auto height) {
          constexpr int R = decltype(height)::rows, F = dot_filters(R);
          for (int f = 0; f < kDotFilters; f += F)
            tile_dots<T, W, R, F>(t.table + i * t.table_tile, *tiles.groups[i],
                                  t.weight + (j * kTileCols + k + f) * stride, stride, ahead,
                                  t.sums + i * kTile + k + f);
        });
    for (int i = 0; i < tiles.n; ++i)
      finish(t.epilogue, tiles.at[i].at, j * kTileCols, (const f32v*)(t.sums + i * kTile), tiles.at[i].rows[0],
             kTileCols);
  }
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
