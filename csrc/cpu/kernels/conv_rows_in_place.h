// fp32 data gradient of a few rows, from the weights where they lie:
//   dx[row, c] = sum over taps and k of dz[row, k] * w[k, tap, c].
//
// Each weight meets a handful of rows, so packing it (a copy to L2 and back) costs more than its products. k runs
// outside in blocks whose weights stay in L2; within a block every panel of 32 columns meets every tile of 8 rows, and
// the block's sums are added to a sum in memory, which also shortens the chains of additions. So w is read once, in
// order, in runs of a whole filter tap. FLOPs: 2 * rows * live taps * K * C; bytes: w once.
//
// Measured on 2 cores of an Intel Xeon (AVX-512), us, packed : in place, weights in cache: 512 -> 2048 with 4 rows 220
// : 102, 256 -> 1024 with 16 rows 48 : 27. ResNet50's data gradients at 32 px, batch 4, weights from memory, ms: 5.9
// : 4.6. Blocks of 32 KB as 128, 512 KB 5.5; 16 units ahead as 8, 32 a little slower.

namespace fastconv::cpu::FASTCONV_ISA_NS {

// Units [k0, k0 + units) of one tile and 32 columns: onto sums[R][kTileCols], or into it if `first`.
template <int R>
__attribute__((noinline)) void tile_in_place(const char* const* rows, const RowsGroup& group, const float* w,
                                             int64_t taps_s, int64_t columns, int64_t stride, int64_t k0, int64_t units,
                                             f32v* sums, bool first) {
  constexpr int64_t kAhead = 8;  // units
  f32v acc[R][kTileVecs];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) acc[i][0] = acc[i][1] = f32v{};
  for (int g = 0; g < group.n_segments; ++g) {
    const RowsSegment& s = group.segments[g];
    const float* b = w + k0 * stride + (s.r * taps_s + s.s) * columns;
    const char* row[R];
    for (int i = 0; i < R; ++i) row[i] = rows[g * kTileRows + i] + k0 * 4;
    for (int64_t u = 0; u < units; ++u, b += stride) {
      __builtin_prefetch(b + kAhead * stride, 0, 2);
      __builtin_prefetch(b + kAhead * stride + 16, 0, 2);
      const u32v b0 = *(const u32v_u*)b, b1 = *(const u32v_u*)(b + kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        const u32v a = broadcast_unit(row[i] + u * 4);
        acc[i][0] = dot(0.0f, acc[i][0], a, b0);
        acc[i][1] = dot(0.0f, acc[i][1], a, b1);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < kTileVecs; ++v)
      sums[i * kTileVecs + v] = first ? acc[i][v] : sums[i * kTileVecs + v] + acc[i][v];
}

// The task's tiles, at most kInPlaceTiles, against all of its panels; t.table has room for them, t.sums for
// [panels][tiles][kTileRows][kTileCols].
template <class T>
void conv_rows_in_place(const RowsTask<T, T>& t) {
  static_assert(sizeof(T) == 4, "bf16 units are of two weights that do not lie side by side");
  const RowsPlan& p = *t.plan;
  TileRows tiles[kInPlaceTiles];
  const RowsGroup* groups[kInPlaceTiles];
  int n = 0;
  int64_t first = 0;
  for (int64_t g = 0; g < p.n_groups; first += p.groups[g].tiles, ++g) {
    const RowsGroup& group = p.groups[g];
    const GroupTiles mine(group, first, t.tile_begin, t.tile_end);
    if (mine.begin >= mine.end) continue;
    RowWalker walk(p, group, grain_begin(group, mine.grain(mine.begin)));
    for (int64_t tile = mine.begin; tile < mine.end; ++tile, ++n) {
      groups[n] = &group;
      place_tile(t, walk, mine.grain(tile), mine.grain(tile + 1), n, tiles[n]);
    }
  }
  const int64_t stride = p.taps_r * p.taps_s * p.columns;
  int64_t block = kInPlaceBytes / (stride * 4);
  block = block < kInPlaceUnits ? kInPlaceUnits : block;
  f32v* const sums = (f32v*)t.sums;
  constexpr int64_t kTile = kTileRows * kTileVecs;
  for (int64_t k0 = 0; k0 < p.reduce; k0 += block) {
    const int64_t units = p.reduce - k0 < block ? p.reduce - k0 : block;
    for (int64_t j = t.panel_begin; j < t.panel_end; ++j)
      for (int i = 0; i < n; ++i)
        with_tile_height(tiles[i].rows[0], [&](auto height) {
          tile_in_place<decltype(height)::rows>(t.table + i * t.table_tile, *groups[i], t.weight + j * kTileCols,
                                                p.taps_s, p.columns, stride, k0, units,
                                                sums + ((j - t.panel_begin) * n + i) * kTile, k0 == 0);
        });
  }
  for (int64_t j = t.panel_begin; j < t.panel_end; ++j)
    for (int i = 0; i < n; ++i)
      finish(t.epilogue, tiles[i].at, j * kTileCols, sums + ((j - t.panel_begin) * n + i) * kTile, tiles[i].rows[0],
             kTileCols);
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
