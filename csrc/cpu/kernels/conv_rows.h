// Convolution by row classes, forward and data gradient:
//   y[n,p,q,k]  = act(scale_k * sum over live (r,s), c of x[n, p st - pad + r dil, q st - pad + s dil, c] * w[k,r,s,c]
//   + shift_k + residual) dx[n,h,w,c] = sum over live (r,s), k of dz[n, (h + pad - r dil) / st, (w + pad - s dil) / st,
//   k] * w[k,r,s,c]
//
// A tap is live at an output position if it reads inside the map (data gradient: and where the division has no rest).
// Positions with the same live taps form a class, and a class is one matrix product over its live taps only: rows =
// positions x images, found by pointers, no im2col, no zero padding, no holes of a stride. On a 1x1 map a padded 3x3
// filter costs one ninth, on a 2x2 map four. Layout: NHWC in and out; weights KRSC, packed into panels of 32 columns
// (gemm_tile_pack.h) by the thread that uses them, or once by the caller. Taps of one filter row that lie side by side
// in the input are one segment: the 7x7x3 stem has segments of 21 channels. Threads: a grid of column panels x row
// tiles; each thread packs its panels into its own L2 (half of it), then passes over its tiles. One parallel region, no
// barrier, no shared writes; the sum of an element has one order whatever the number of threads. Tiles: a class is cut
// into tiles of at most 8 rows, evenly (9 rows are 5 + 4). Small classes are joined where a common tile, with zeros
// read for the dead taps of a row, costs less (conv_rows_plan.h). FLOPs: 2 * live (row, tap) pairs * C * K. Bytes: x
// once per pass over the rows (a block of tiles meets all panels in L2), y once, w once. Limits: groups == 1; fp32 and
// bf16; an odd number of summed bf16 channels needs an input padded by one (the host copies it). A filter on few
// channels (bf16 forward: the stem) reads an input with its padding written out: an infinite weight then meets those
// zeros and gives NaN.
//
// Measured: ResNet50's convolutions at 32 px, each as often as it occurs, one core of a Zen 5 (AVX-512 bf16),
// microseconds, oneDNN (channels_last, torch 2.11) : here, weights packed on the way : weights packed before:
//   fp32 batch 64, forward: 3x3x64 8x8 1036 : 983 : 973; 64->256 549 : 532 : 528; 3x3x256 2x2 1893 : 561 : 513; 3x3x512
//   1x1 1291 : 162 : 141 bf16 batch 64, forward: 3x3x64 8x8 562 : 496 : 492; 64->256 302 : 298 : 296; 3x3x256 2x2 965 :
//   292 : 262; 3x3x512 1x1 1006 : 83 : 72 bf16 batch 4, forward: 3x3x64 66 : 35 : 34; 64->256 46 : 20 : 20; 3x3x256 214
//   : 36 : 28; 3x3x512 600 : 12 : 11 85-97% of the multiply-add peak (276 GFLOP/s fp32, 552 bf16) at batch 64.
// Versions: epilogue tests per vector in the tile 420 us (64->256 bf16, batch 64), per tile 346, out of line and zeroed
// without a memory array 298. The stem by segments of 21 channels, 4 to a bf16 pixel, 1030 us; gathered 750.
// A few rows read the weights where they lie: conv_rows_dots.h, and conv_few_rows.h for the gradients.

namespace fastconv::cpu::FASTCONV_ISA_NS {

// Walks over the rows of a group in order: class, image, h, w.
struct RowWalker {
  const RowsPlan& plan;
  const RowsGroup& group;
  const RowsClass* cls;
  int64_t n, h, w;

  RowWalker(const RowsPlan& p, const RowsGroup& g, int64_t row) : plan(p), group(g), cls(g.classes) {
    while (row >= p.n_images * cls->nh * cls->nw) row -= p.n_images * cls->nh * cls->nw, ++cls;
    w = row % cls->nw;
    h = row / cls->nw % cls->nh;
    n = row / cls->nw / cls->nh;
  }
  void next() {
    if (++w < cls->nw) return;
    w = 0;
    if (++h < cls->nh) return;
    h = 0;
    if (++n < plan.n_images) return;
    n = 0;
    ++cls;
  }
};

template <class T, class W>
inline void fill_tile(const RowsTask<T, W>& t, RowWalker& walk, int n_rows, const char** table, int64_t* at,
                      char* gathered) {
  const RowsPlan& p = *t.plan;
  for (int i = 0; i < n_rows; ++i) {
    const int64_t oh = walk.cls->h[walk.h], ow = walk.cls->w[walk.w];
    const char* image = (const char*)t.input + walk.n * p.image_bytes;
    const int64_t *h = p.h_offset + oh * p.taps_r, *w = p.w_offset + ow * p.taps_s;
    for (int g = 0; g < walk.group.n_segments; ++g) {
      const int64_t dh = h[walk.group.segments[g].r], dw = w[walk.group.segments[g].s];
      table[g * kTileRows + i] = (dh < 0 || dw < 0) ? t.zeros : image + dh + dw;
    }
    if (p.gather_r) {
      copy_pieces(table[i], p.gather_step, p.gather_r, p.gather_bytes, gathered);
      __builtin_memset(gathered + p.gather_r * p.gather_bytes, 0, 4);  // the other half of the last unit
      table[i] = gathered;
      gathered += gather_row_bytes(p.tap_units);
    }
    at[i] = ((walk.n * p.out_h + oh) * p.out_w + ow) * p.columns;
    walk.next();
  }
}

// The first row of a grain; of the last one's successor, all rows.
FASTCONV_INLINE int64_t grain_begin(const RowsGroup& group, int64_t grain) {
  if (group.run > 0) {
    const int64_t whole = (group.run + kGrain - 1) / kGrain;
    return grain / whole * group.run + grain % whole * kGrain;
  }
  return grain * kGrain < group.rows ? grain * kGrain : group.rows;
}

// The task's tiles [begin, end) of one group, whose tiles before are `first`; grains are spread evenly over a group's.
struct GroupTiles {
  int64_t begin, end, base, extra;  // `extra` tiles have one grain more than `base`

  GroupTiles(const RowsGroup& group, int64_t first, int64_t tile_begin, int64_t tile_end)
      : begin(tile_begin > first ? tile_begin - first : 0),
        end(tile_end - first < group.tiles ? tile_end - first : group.tiles),
        base(group.grains / group.tiles),
        extra(group.grains % group.tiles) {}
  int64_t grain(int64_t tile) const { return tile * base + (tile < extra ? tile : extra); }
};

// A tile of the task: where its rows are read and written.
struct TileRows {
  int64_t at[kTileRows];
  int rows[kTileRows / kGrain];  // of each grain; without tile registers, of the tile in the first
};

// Tile i of those at once: grains [grain, end), whose rows come next in the walk.
template <class T, class W>
FASTCONV_INLINE void place_tile(const RowsTask<T, W>& t, RowWalker& walk, int64_t grain, int64_t end, int64_t i,
                                TileRows& tile) {
  char* gathered = t.gathered + i * kTileRows * gather_row_bytes(t.plan->tap_units);
#ifdef FASTCONV_AMX
  tile.rows[1] = 0;
  for (int64_t g = 0; grain + g < end; ++g, gathered += kGrain * gather_row_bytes(t.plan->tap_units)) {
    tile.rows[g] = (int)(grain_begin(walk.group, grain + g + 1) - grain_begin(walk.group, grain + g));
    fill_tile(t, walk, tile.rows[g], t.table + g * kGrain, tile.at + g * kGrain, gathered);
  }
  stage_rows(t, walk.group, tile.rows, i);
#else
  tile.rows[0] = (int)(end - grain);
  fill_tile(t, walk, tile.rows[0], t.table + i * t.table_tile, tile.at, gathered);
#endif
}

template <class T, class W>
FASTCONV_INLINE void run_tile(const RowsTask<T, W>& t, const RowsGroup& group, const char* panel, int64_t j, int64_t i,
                              const TileRows& tile) {
#ifdef FASTCONV_AMX
  tile_rows_amx<T>(tile.rows, t.sources + i * t.sources_tile, group.segments, group.n_segments, panel, t.epilogue,
                   tile.at, j, t.plan->columns);
#else
  with_tile_height(tile.rows[0], [&](auto height) {
    tile_rows<T, decltype(height)::rows>(t.table + i * t.table_tile, group.segments, group.n_segments, panel,
                                         t.epilogue, tile.at, j, t.plan->columns);
  });
#endif
}

// Asks for what tile i reads last, the end of its last segment, where it is new: other taps' rows were read for tiles
// above. Not for tile registers, which load sixteen rows at once: no difference.
template <class T, class W>
FASTCONV_INLINE void prefetch_tile(const RowsTask<T, W>& t, const RowsGroup& group, int64_t i, const TileRows& tile) {
#ifndef FASTCONV_AMX
  if (group.n_segments == 0) return;  // no tap reads: the positions between those of a stride
  const int64_t g = group.n_segments - 1, bytes = t.plan->tap_units * 4, skip = group.segments[g].units * 4 - bytes;
  const char* const* rows = t.table + i * t.table_tile + g * kTileRows;
  for (int r = 0; r < tile.rows[0]; ++r)
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(rows[r] + skip + at, 0, 2);
#endif
}

template <class T, class W>
void conv_rows(const RowsTask<T, W>& t) {
  const RowsPlan& p = *t.plan;
  constexpr int64_t kMaxTiles = 32, kAhead = 2;
  TileRows tiles[kMaxTiles];
#ifdef FASTCONV_AMX
  const TileRegisters registers;
#endif
  const int64_t taps = p.taps_r * p.taps_s;
  for (int64_t j0 = t.panel_begin; j0 < t.panel_end; j0 += t.panels_at_once) {
    const int64_t j1 = j0 + t.panels_at_once < t.panel_end ? j0 + t.panels_at_once : t.panel_end;
    const char* panels = t.packed != nullptr ? t.packed + j0 * p.panel_bytes : t.panels;
    if (t.packed == nullptr) {
      if (t.transposed)
        pack_transpose<T>(t.weight, p.reduce, taps, p.columns, p.tap_live, j0, j1, t.panels, p.panel_bytes);
      for (int64_t j = j0; j < j1 && !t.transposed; ++j)
        pack_forward<T>(t.weight, p.columns, taps, p.reduce, p.tap_live, j, t.panels + (j - j0) * p.panel_bytes);
    }
    int64_t first = 0;  // index of the group's first tile
    for (int64_t g = 0; g < p.n_groups; first += p.groups[g].tiles, ++g) {
      const RowsGroup& group = p.groups[g];
      const GroupTiles mine(group, first, t.tile_begin, t.tile_end);
      if (mine.begin >= mine.end) continue;
      RowWalker walk(p, group, grain_begin(group, mine.grain(mine.begin)));
      for (int64_t tile = mine.begin; tile < mine.end;) {
        const int64_t n = mine.end - tile < t.tiles_at_once ? mine.end - tile : t.tiles_at_once;
        for (int64_t i = 0; i < n; ++i)
          place_tile(t, walk, mine.grain(tile + i), mine.grain(tile + i + 1), i, tiles[i]);
        for (int64_t i = 0; i < kAhead && i < n; ++i) prefetch_tile(t, group, i, tiles[i]);
        for (int64_t j = j0; j < j1; ++j)
          for (int64_t i = 0; i < n; ++i) {
            if (j == j0 && i + kAhead < n) prefetch_tile(t, group, i + kAhead, tiles[i + kAhead]);
            run_tile(t, group, panels + (j - j0) * p.panel_bytes, j * kTileCols, i, tiles[i]);
          }
        tile += n;
      }
    }
  }
}

// Packs panels [begin, end) for a caller that keeps them.
template <class T>
void pack_panels(const RowsPlan& p, const T* weight, bool transposed, int64_t begin, int64_t end, char* out) {
  const int64_t taps = p.taps_r * p.taps_s;
  if (transposed)
    pack_transpose<T>(weight, p.reduce, taps, p.columns, p.tap_live, begin, end, out + begin * p.panel_bytes,
                      p.panel_bytes);
  for (int64_t j = begin; j < end && !transposed; ++j)
    pack_forward<T>(weight, p.columns, taps, p.reduce, p.tap_live, j, out + j * p.panel_bytes);
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
