// Builds a RowsPlan: which output positions share which live taps, and how threads share the tiles. Host code, no
// torch, no kernels.
//
// Cost model, in cycles of one core, from the times in gemm_tile.h: a tile step costs 4 + rows / 2 (8 rows: 8; fewer
// rows wait for latencies and for the panel), a tile 40 on top, packing a unit of a panel 12. Tile registers (grain
// 16): 16 units of 16 rows and 32 columns are two products of 16 cycles, whatever the number of rows; 64 to write them
// out.
#pragma once

#include <algorithm>
#include <vector>

#include "conv_rows_types.h"

namespace fastconv::cpu {

struct RowsShape {  // of the register tile
  int64_t rows, columns;
  int64_t grain = 1;  // tiles get multiples of this many rows
};

struct RowsPlanData {
  RowsPlan plan;
  std::vector<int64_t> h_offset, w_offset;
  std::vector<uint8_t> tap_live;
  std::vector<std::vector<int32_t>> h_positions, w_positions;  // by axis class
  std::vector<RowsClass> classes;
  std::vector<std::vector<RowsSegment>> segments;  // by group
  std::vector<RowsGroup> groups;
  RowsShape shape{};
  int64_t panels = 1;
  int64_t max_segments = 1, tiles = 0;
  int64_t staged_units = 0;  // of a row: whole tile registers of every segment
  double cost = 0;           // of all tiles of one panel
  double pack_cost = 0;      // of one panel

  // Of one panel out of `panels`. classes: how many share the tiles.
  static double tile_cost(RowsShape shape, const RowsGroup& g, int64_t classes, int64_t units, int64_t panels) {
    if (shape.grain == 1) return g.tiles * (40.0 + units * 4.0) + g.rows * units * 0.5;
    const bool even = classes == 1 && (g.run > 0 || g.classes->nh * g.classes->nw == 1);
    return g.tiles * 40.0 + g.grains * (64.0 + units * 2.0) + (even ? 0.0 : g.rows * units * 0.125 / panels);
  }
  double group_cost(int64_t g) const {
    int64_t units = 0;
    for (const RowsSegment& s : segments[g]) units += s.units;
    return tile_cost(shape, groups[g], groups[g].n_classes, units, panels);
  }
  // The first of the tiles that come after `part` of the cost.
  int64_t tile_at(double part) const {
    double left = part * cost;
    int64_t tile = 0;
    for (int64_t g = 0; g < plan.n_groups; ++g) {
      const double c = group_cost(g);
      if (left < c) return tile + static_cast<int64_t>(left / c * groups[g].tiles + 0.5);
      left -= c;
      tile += groups[g].tiles;
    }
    return tiles;
  }
};

// Cuts the rows into grains and tiles. A class of at least three quarters of a register's rows in each image row starts
// anew there.
inline void cut_rows(RowsGroup& g, int64_t classes, int64_t rows, RowsShape shape) {
  const auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t width = g.classes->nw, whole = ceil(width, shape.grain);
  g.rows = rows;
  g.run = shape.grain > 1 && classes == 1 && width * 4 >= whole * shape.grain * 3 ? width : 0;
  g.grains = g.run > 0 ? rows / width * whole : ceil(rows, shape.grain);
  g.tiles = ceil(g.grains, shape.rows / shape.grain);
}

struct RowsAxis {
  std::vector<int64_t> in;                      // [out][taps]: input index, or -1
  std::vector<std::vector<uint8_t>> live;       // by class
  std::vector<std::vector<int32_t>> positions;  // by class

  // Forward: in = out * stride - pad + tap * dil. Transposed: out = in * stride - pad + tap * dil.
  RowsAxis(int64_t out, int64_t in_size, int64_t taps, int64_t stride, int64_t pad, int64_t dil, bool transposed)
      : in(out * taps) {
    for (int64_t o = 0; o < out; ++o) {
      std::vector<uint8_t> key(taps);
      for (int64_t t = 0; t < taps; ++t) {
        int64_t i = transposed ? o + pad - t * dil : o * stride - pad + t * dil;
        if (transposed) i = i < 0 || i % stride != 0 ? -1 : i / stride;
        key[t] = i >= 0 && i < in_size;
        in[o * taps + t] = key[t] ? i : -1;
      }
      size_t c = 0;
      while (c < live.size() && live[c] != key) ++c;
      if (c == live.size()) live.push_back(key), positions.emplace_back();
      positions[c].push_back(static_cast<int32_t>(o));
    }
  }
};

// `p` has an even number of summed channels where an element has two bytes. pixel: bytes from one input pixel to the
// next.
inline void build_rows_plan(const ConvParams& p, bool transposed, int64_t element, int64_t pixel, RowsShape shape,
                            RowsPlanData& d) {
  const int64_t out_h = transposed ? p.h : p.p, out_w = transposed ? p.w : p.q;
  const int64_t in_h = transposed ? p.p : p.h, in_w = transposed ? p.q : p.w;
  const int64_t reduce = transposed ? p.k : p.c, columns = transposed ? p.c : p.k;
  d.shape = shape;
  d.panels = (columns + shape.columns - 1) / shape.columns;
  const RowsAxis ah(out_h, in_h, p.r, p.stride_h, p.pad_h, p.dil_h, transposed);
  const RowsAxis aw(out_w, in_w, p.s, p.stride_w, p.pad_w, p.dil_w, transposed);
  const int64_t taps = p.r * p.s;
  const int64_t tap_units = reduce * element / 4;
  auto offsets = [](const std::vector<int64_t>& in, int64_t bytes) {
    std::vector<int64_t> v(in);
    for (int64_t& i : v) i = i < 0 ? -1 : i * bytes;
    return v;
  };
  d.h_offset = offsets(ah.in, in_w * pixel);
  d.w_offset = offsets(aw.in, pixel);
  d.h_positions = ah.positions;
  d.w_positions = aw.positions;
  d.tap_live.assign(taps, 0);

  struct Open {  // a group in the making
    int64_t first = 0, classes = 0, rows = 0, live = 0;
    std::vector<uint8_t> taps;
  };
  std::vector<Open> open;
  auto cost = [&](const Open& o) {
    RowsGroup g{};
    g.classes = &d.classes[o.first];
    cut_rows(g, o.classes, o.rows, shape);
    return RowsPlanData::tile_cost(shape, g, o.classes, o.live * tap_units, d.panels);
  };
  for (size_t i = 0; i < ah.live.size(); ++i) {
    for (size_t j = 0; j < aw.live.size(); ++j) {
      d.classes.push_back({d.h_positions[i].data(), d.w_positions[j].data(),
                           static_cast<int64_t>(d.h_positions[i].size()),
                           static_cast<int64_t>(d.w_positions[j].size())});
      Open c;
      c.first = static_cast<int64_t>(d.classes.size()) - 1;
      c.classes = 1;
      c.rows = p.n * d.classes.back().nh * d.classes.back().nw;
      c.taps.assign(taps, 0);
      for (int64_t t = 0; t < taps; ++t) {
        if (!ah.live[i][t / p.s] || !aw.live[j][t % p.s]) continue;
        c.taps[t] = d.tap_live[t] = 1;
        ++c.live;
      }
      if (!open.empty()) {  // join the last group where that is cheaper
        Open both = open.back();
        both.live = 0;
        for (int64_t t = 0; t < taps; ++t) both.live += both.taps[t] |= c.taps[t];
        both.classes += 1;
        both.rows += c.rows;
        if (cost(both) <= cost(open.back()) + cost(c)) {
          open.back() = both;
          continue;
        }
      }
      open.push_back(c);
    }
  }
  // Side by side taps of a filter row are side by side in the input: only forward, undilated, and where no row reads
  // zeros for one.
  const bool runs = !transposed && p.dil_w == 1;
  int64_t first = 0;
  for (const Open& o : open) {
    std::vector<RowsSegment> segments;
    for (int64_t t = 0; t < taps; ++t) {
      if (!o.taps[t]) continue;
      if (runs && o.classes == 1 && t % p.s != 0 && o.taps[t - 1])
        segments.back().units += tap_units;
      else
        segments.push_back({t * tap_units, tap_units, static_cast<int32_t>(t / p.s), static_cast<int32_t>(t % p.s)});
    }
    d.segments.push_back(std::move(segments));
    RowsGroup g{};
    g.classes = d.classes.data() + first;
    g.n_classes = static_cast<int32_t>(o.classes);
    cut_rows(g, o.classes, o.rows, shape);
    first += o.classes;
    d.groups.push_back(g);
  }
  for (size_t g = 0; g < d.groups.size(); ++g) {
    d.groups[g].segments = d.segments[g].data();
    d.groups[g].n_segments = static_cast<int32_t>(d.segments[g].size());
    d.max_segments = std::max<int64_t>(d.max_segments, d.groups[g].n_segments);
    d.tiles += d.groups[g].tiles;
    int64_t units = 0;
    for (const RowsSegment& s : d.segments[g]) units += (s.units + kTileUnits - 1) / kTileUnits * kTileUnits;
    d.staged_units = std::max(d.staged_units, units);
  }
  RowsPlan& r = d.plan;
  r = RowsPlan{};
  r.groups = d.groups.data();
  r.n_groups = static_cast<int64_t>(d.groups.size());
  r.n_images = p.n;
  r.taps_r = p.r;
  r.taps_s = p.s;
  r.h_offset = d.h_offset.data();
  r.w_offset = d.w_offset.data();
  r.image_bytes = in_h * in_w * pixel;
  r.out_h = out_h;
  r.out_w = out_w;
  r.reduce = reduce;
  r.columns = columns;
  r.tap_units = tap_units;
  r.panel_bytes = taps * tap_units * shape.columns * 4;
  r.tap_live = d.tap_live.data();
  for (int64_t g = 0; g < r.n_groups; ++g) d.cost += d.group_cost(g);
  for (uint8_t live : d.tap_live) d.pack_cost += live * 12.0 * tap_units;
}

struct RowsGrid {
  int64_t panel_parts, tile_parts;
};

// The grid of at most `threads` parts with the shortest longest part, in cycles: products, packing, and the rows that a
// part reads and writes from beyond its own cache, at 8 bytes a cycle. The last decides where the others do not: parts
// of whole rows find them in the cache of the core that wrote them (64 -> 256 on 64x8x8, bf16, two threads, between
// other operators: 431 us by panels, 290 by rows).
inline RowsGrid choose_rows_grid(const RowsPlanData& d, int64_t panels, int64_t threads, bool packed) {
  const double pack = packed ? 0.0 : d.pack_cost;
  int64_t rows = 0;
  for (const RowsGroup& g : d.groups) rows += g.rows;
  const double traffic = static_cast<double>(rows) * d.plan.tap_units * 4 / 8;
  RowsGrid best{1, 1};
  double best_cost = 1e300;
  for (int64_t parts = 1; parts <= std::min(threads, panels); ++parts) {
    const int64_t tile_parts = std::max<int64_t>(1, std::min(threads / parts, d.tiles));
    const double c = (panels + parts - 1) / parts * (d.cost / tile_parts + pack) + traffic / tile_parts;
    if (c < best_cost) best_cost = c, best = {parts, tile_parts};
  }
  return best;
}

}  // namespace fastconv::cpu
