// Host side of the row-class convolution: plan, threads, workspace, choice of the instruction set.

#include "conv_rows.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "conv_rows_host.h"
#include "isa.h"
#include "kernels/conv_rows_plan.h"

#if FASTCONV_X86
#include <immintrin.h>
#endif

#define FASTCONV_KERNELS_BF16
#define FASTCONV_KERNELS "kernels/conv_rows_kernels.h"
#include "foreach_isa.h"

namespace fastconv::cpu {

using namespace rows_host;  // NOLINT: this file's own helpers

namespace {

constexpr int64_t kRowCache = 256 << 10;  // a quarter of a 1 MB L2 for the rows that meet the panels
constexpr int64_t kTableEntries = 4096;   // 32 KB of row pointers
constexpr int64_t kMaxTilesAtOnce = 32;   // kMaxTiles of conv_rows()

// Pieces of one workspace, each on a cache line of its own.
struct Layout {
  int64_t bytes = 0;
  int64_t add(int64_t size) {
    const int64_t at = bytes;
    bytes += round64(size);
    return at;
  }
};

// The convolution as the kernels see it, and its plan: no dead taps and one tap of r * s * c channels where taps are
// gathered, one long row of pixels under a 1x1 filter. `summed`: the weight's own number of summed channels, of which
// the input has an even number.
template <class T>
void make_plan(const ConvParams& full, bool transposed, RowsShape shape, RowsPlanData& d) {
  ConvParams p = full;
  int64_t& channels = transposed ? p.k : p.c;
  int64_t gather_r = 0, pixel = even<T>(channels) * static_cast<int64_t>(sizeof(T));
  if (!transposed && gathers_forward(p, sizeof(T))) {
    gather_r = p.r;
    pixel = p.c * static_cast<int64_t>(sizeof(T));
    p.h = padded_h(p), p.w = padded_w(p), p.pad_h = p.pad_w = 0;
    p.c *= p.r * p.s;
    p.r = p.s = 1;
  } else if (p.r == 1 && p.s == 1 && p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0) {
    p.n *= p.h * p.w;
    p.h = p.w = p.p = p.q = 1;
  }
  const int64_t summed = channels;
  channels = even<T>(channels);
  build_rows_plan(p, transposed, sizeof(T), pixel, shape, d);
  d.plan.reduce = summed;
  if (gather_r > 0) {
    d.plan.gather_r = gather_r;
    d.plan.gather_bytes = full.s * pixel;
    d.plan.gather_step = full.dil_h * p.w * pixel;
  }
}

template <class T>
std::shared_ptr<const RowsPlanData> kept_plan(const ConvParams& p, bool transposed, RowsShape shape) {
  return kept<RowsPlanData>(p, {transposed, sizeof(T), shape.grain}, [&] {
    auto made = std::make_shared<RowsPlanData>();
    make_plan<T>(p, transposed, shape, *made);
    return made;
  });
}

// The plan of a forward pass that reads the weights where they lie (conv_rows_dots.h): few rows, whole tiles of
// columns, whole vectors of channels. Else null. Tile registers want packed weights sooner: from the second tile of
// vectors on.
template <class T>
std::shared_ptr<const RowsPlanData> plan_in_place(const ConvParams& p) {
  const RowsShape shape = tile_registers<T>() ? kVectorTile : tile_shape<T>();
  if (p.n * p.p * p.q > shape.rows * (tile_registers<T>() ? 1 : kInPlaceTiles)) return nullptr;
  const auto found = kept_plan<T>(p, false, shape);
  const RowsPlan& plan = found->plan;
  const int64_t step = shape.columns / 2 * (4 / static_cast<int64_t>(sizeof(T)));
  const bool fits = found->tiles <= kInPlaceTiles && plan.columns % shape.columns == 0 && plan.gather_r == 0 &&
                    plan.reduce % step == 0;
  return fits ? found : nullptr;
}

template <class T, class W>
void run_rows(const ConvParams& p, bool transposed, const T* input, const W* weight, const void* packed,
              const RowsEpilogue<T>& e) {
  std::shared_ptr<const RowsPlanData> found;
  if (!transposed && packed == nullptr) found = plan_in_place<T>(p);
  const bool in_place = found != nullptr;
  if (!in_place) found = kept_plan<T>(p, transposed, tile_shape<T>());
  const RowsPlanData& d = *found;
  const RowsShape shape = d.shape;
  const int64_t channels = transposed ? p.k : p.c;
  if (d.plan.gather_r > 0)
    input = pad_input(p, input);
  else if (even<T>(channels) != channels)
    input = widen_channels(input, p.n * (transposed ? p.p * p.q : p.h * p.w), channels, even<T>(channels));
  const RowsPlan& plan = d.plan;
  const int64_t panels = (plan.columns + shape.columns - 1) / shape.columns;
  const double work = (d.cost + (packed != nullptr ? 0.0 : d.pack_cost)) * panels * 16;
  RowsGrid grid = choose_rows_grid(d, panels, work < kSerialWork ? 1 : at::get_num_threads(), packed != nullptr);
  auto kernel = FASTCONV_ROWS_PICK(T, conv_rows<T, W>);
  if (in_place) {
    kernel = FASTCONV_VECTORS_PICK(conv_rows_dots<T, W>);
    grid = {std::min(grid.panel_parts * grid.tile_parts, panels), 1};
  }
  const bool registers = tile_registers<T>() && !in_place;
  // Panels packed together: those of the data gradient read longer runs of the weights, and rows that are copied first
  // (tile registers) meet more of them.
  const bool wide = transposed || (registers && d.cost > d.pack_cost);
  const int64_t panel_cache = wide ? wide_panel_cache() : kPanelCache;

  at::parallel_for(0, grid.panel_parts * grid.tile_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t i = part / grid.tile_parts, l = part % grid.tile_parts;
      RowsTask<T, W> t{};
      t.plan = &plan;
      t.input = input;
      t.input_end = reinterpret_cast<const char*>(input) + plan.n_images * plan.image_bytes;
      t.weight = weight;
      t.packed = static_cast<const char*>(packed);
      t.transposed = transposed;
      t.epilogue = e;
      t.panel_begin = panels * i / grid.panel_parts;
      t.panel_end = panels * (i + 1) / grid.panel_parts;
      t.tile_begin = d.tile_at(static_cast<double>(l) / grid.tile_parts);
      t.tile_end = l + 1 == grid.tile_parts ? d.tiles : d.tile_at(static_cast<double>(l + 1) / grid.tile_parts);
      t.panels_at_once =
          std::clamp<int64_t>(panel_cache / plan.panel_bytes, 1, std::max<int64_t>(1, t.panel_end - t.panel_begin));
      t.table_tile = d.max_segments * shape.rows;
      t.sources_tile = d.max_segments * 2;
      t.staged_tile = registers ? shape.rows * d.staged_units * 4 : 0;
      t.tiles_at_once = std::clamp<int64_t>(kRowCache / (registers ? t.staged_tile : shape.rows * plan.tap_units * 4),
                                            1, std::clamp<int64_t>(kTableEntries / t.table_tile, 1, kMaxTilesAtOnce));
      if (in_place) t.tiles_at_once = t.tile_end - t.tile_begin;
      Layout space;
      const int64_t panels_at = space.add(packed != nullptr || in_place ? 0 : t.panels_at_once * plan.panel_bytes);
      const int64_t sums_at = space.add(in_place ? t.tiles_at_once * shape.rows * shape.columns * 4 : 0);
      const int64_t table_at =
          space.add((registers ? 1 : t.tiles_at_once) * t.table_tile * static_cast<int64_t>(sizeof(char*)));
      const int64_t zeros_at = space.add(plan.tap_units * 4);
      const int64_t gathered_at =
          space.add(plan.gather_r > 0 ? t.tiles_at_once * shape.rows * gather_row_bytes(plan.tap_units) : 0);
      const int64_t sources_at =
          space.add(registers ? t.tiles_at_once * t.sources_tile * static_cast<int64_t>(sizeof(RowsSource)) : 0);
      const int64_t staged_at = space.add(t.tiles_at_once * t.staged_tile);
      char* base = workspace<0>(space.bytes);
      t.panels = base + panels_at;
      t.sums = reinterpret_cast<float*>(base + sums_at);
      t.table = reinterpret_cast<const char**>(base + table_at);
      std::memset(base + zeros_at, 0, plan.tap_units * 4);
      t.zeros = base + zeros_at;
      t.gathered = base + gathered_at;
      t.sources = reinterpret_cast<RowsSource*>(base + sources_at);
      t.staged = base + staged_at;
      kernel(t);
    }
  });
}

}  // namespace

const char* rows_refusal(const ConvParams& p, int64_t element) {
  if (p.groups != 1) return "the row-class convolution takes groups == 1";
  if (element != 4 && element != 2) return "the row-class convolution takes float32 and bfloat16";
  if (p.n <= 0 || p.c <= 0 || p.k <= 0 || p.p <= 0 || p.q <= 0)
    return "the row-class convolution takes no empty tensors";
  return nullptr;
}

// Without AVX-512, oneDNN 3.10 multiplies bf16 at 17 GFLOP/s with two threads, the row classes at 60 with one. In fp32
// stock was faster here (one thread of a Zen 3, on 8x14x14 with 128 channels on the other side, and 16, 24, 32 and 64
// to as many on 28x28 and 56x56, ratios as below):
// - output columns of whole vectors that fill less than 0.8 of the 16-wide tiles: fprop K = 8, 24 (3x3) at 0.76, 0.82,
//   24 to 24 at 0.57 - 0.83; dgrad C = 4, 8, 24 (3x3) at 0.67, 0.76, 0.89; 1x1 data gradients won all, 1.1 - 3.5;
// - few channels on both sides: fprop 16 to 16 at 0.57 (1x1) and 0.92, 32 to 32 at 0.84 - 0.95; 3x3 dgrad 0.78, 0.86;
//   wgrad 16 to 16 at 0.70 - 0.94, K = 16 on 3 channels at 0.75. Other weight gradients: 0.9 - 3.3.
static bool avx2_worthwhile(const ConvParams& p, int64_t element, ConvPass pass) {
  if (element == 2) return true;
  const auto filled = [](int64_t columns) {
    return columns % 8 == 0 ? columns * 10 >= (columns + 15) / 16 * 16 * 8 : columns > 8;
  };
  const bool single = p.r * p.s == 1;
  switch (pass) {
    case ConvPass::forward:
      return filled(p.k) && (gathers(p) ? p.r * p.s * p.c >= 32 || p.k >= 64 : p.k >= 32 || p.c >= 32);
    case ConvPass::input_grad:
      return single || (filled(p.c) && (p.k >= 32 || p.c >= 128));
    case ConvPass::weight_grad:
      return p.k >= 32 || (p.c >= 32 && !gathers(p));
  }
  return false;
}

// Where stock was faster, one thread each, on Zen 5, ratio oneDNN : here (a ratio below 1 is a loss):
// - output columns that fill less than 0.8 of the 32-wide tiles: fprop K = 8, 16, 41, 48 at 0.64, 0.65, 0.89, 0.82;
// dgrad C = 3, 8, 16, 48 at
//   0.6, 0.62, 0.62, 0.78; wgrad C = 16, 24, 48 at 0.48, 0.66, 0.72;
// - 3x3 filters on 3 channels: 0.8 - 0.87 (the gathered sum is too short to pay for the gathering; 7x7: 1.3);
// - fp32 data gradient of one row: 0.74 - 0.79 (oneDNN has a matrix-vector product).
// And on a Xeon with AMX, where the sum or the rows of a gradient fill little of a tile, one thread, on 2x56x56 of 64
// channels and 2x28x28 of 256, filters K = 1 to 64:
// - data gradient through a filter larger than 1x1: tile registers, K below 32 at 0.26 - 0.57 (64: 0.63 - 1.0); vectors
//   at 64 channels, fp32 K below 32 at 0.43 - 0.90, bf16 K below 8 at 0.67 - 0.82;
// - weight gradient: tile registers and a larger filter, K below 32 at 0.36 - 0.88; fp32 1x1, K no multiple of a
//   tile's rows at 0.30 - 0.66; fp32 of a larger filter on 64 channels, K below 8 at 0.61 - 0.69.
// Two threads there, 3x3 filters, 32 to 256 channels, one to 64 images of 8x8 to 112x112:
// - fp32 weight gradient, maps from 14x14 on: 0.71 - 0.95 (8x8: 0.83 - 1.01); an AMD EPYC loses none of these layers;
// - tile registers, maps from 56x56 on: data gradient of 32 filters 0.54 - 0.83, of more of them 0.68 - 0.92; weight
//   gradient on 32 channels 0.67 - 0.75.
// Everywhere else it won: see the table in kernels/conv_rows.h. AVX2 has narrower tiles, and rules of its own.
bool rows_worthwhile(const ConvParams& p, int64_t element, ConvPass pass, bool packed) {
  if (rows_refusal(p, element) != nullptr || active_isa() == Isa::portable) return false;
  if (active_isa() == Isa::avx2) return avx2_worthwhile(p, element, pass);
  auto filled = [](int64_t columns) { return columns * 10 >= (columns + 31) / 32 * 32 * 8; };
  const bool single = p.r * p.s == 1, xeon = tile_registers<bf16>(), registers = element == 2 && xeon;
  const int64_t work = p.n * p.p * p.q * p.k * p.c * p.r * p.s;  // multiply-adds
  const bool large = work >= 1 << 18;                            // else a call of oneDNN costs more than it saves
  switch (pass) {
    case ConvPass::forward:
      return filled(p.k) && (!gathers(p) || p.r * p.s * p.c >= 64);
    case ConvPass::input_grad: {
      const int64_t least = registers ? 32 : p.c >= 128 ? 0 : element == 4 ? 32 : 8;
      if (large && !single && p.k < least) return false;
      if (registers && !single && p.w >= 48 && work >= (p.k <= 32 ? 1 << 26 : 1 << 28)) return false;
      return filled(p.c) && (packed || element == 2 || p.n * p.h * p.w > 1);
    }
    case ConvPass::weight_grad: {
      if (gathers(p)) return filled(p.r * p.s * p.c);
      if (large && registers && !single && (p.k < 32 || (p.c <= 32 && p.q >= 48))) return false;
      if (large && element == 4 && (single ? p.k % tile_shape<float>().rows != 0 : p.c < 128 && p.k < 8)) return false;
      if (xeon && element == 4 && !single && p.q >= 14 && work >= 1 << 26) return false;
      return filled(p.c);
    }
  }
  return false;
}

template <class T, class W>
void rows_forward(const ConvParams& p, const T* x, const W* weight, const void* packed, const RowsEpilogue<T>& e) {
  run_rows<T, W>(p, false, x, weight, packed, e);
}

template <class T, class W>
void rows_input_grad(const ConvParams& p, const T* dz, const W* weight, const void* packed, const RowsEpilogue<T>& e) {
  const auto taps = packed == nullptr ? few_rows_taps(p, sizeof(T), false, false) : std::vector<FewRowsTap>();
  if (taps.empty()) {
    run_rows<T, W>(p, true, dz, weight, packed, e);
  } else {
    few_rows_input_grad<T, W>(p, taps, dz, weight, e);
  }
}

int64_t rows_packed_bytes(const ConvParams& p, int64_t element, ConvPass pass) {
  ConvParams q = p;
  if (pass == ConvPass::forward && gathers_forward(q, element)) q.c *= q.r * q.s, q.r = q.s = 1;
  const int64_t columns = tile_shape<float>().columns;  // the same for every type
  const int64_t summed = pass == ConvPass::forward ? q.c : q.k, out = pass == ConvPass::forward ? q.k : q.c;
  const int64_t units = element == 2 ? (summed + 1) / 2 : summed;
  return (out + columns - 1) / columns * columns * q.r * q.s * units * 4;
}

template <class T>
bool rows_in_place(const ConvParams& p) {
  return plan_in_place<T>(p) != nullptr;
}

template <class T>
void rows_pack(const ConvParams& p, const T* weight, ConvPass pass, void* packed) {
  const RowsShape shape = tile_shape<T>();
  const bool transposed = pass == ConvPass::input_grad;
  const auto found = kept_plan<T>(p, transposed, shape);
  const RowsPlanData& d = *found;
  const auto kernel = FASTCONV_ROWS_PICK(T, pack_panels<T>);
  const int64_t panels = (d.plan.columns + shape.columns - 1) / shape.columns;
  at::parallel_for(0, panels, std::max<int64_t>(1, (64 << 10) / d.plan.panel_bytes),
                   [&](int64_t a, int64_t b) { kernel(d.plan, weight, transposed, a, b, static_cast<char*>(packed)); });
}

#define FASTCONV_ROWS_PASSES(T, W)                                                                              \
  template void rows_forward<T, W>(const ConvParams&, const T*, const W*, const void*, const RowsEpilogue<T>&); \
  template void rows_input_grad<T, W>(const ConvParams&, const T*, const W*, const void*, const RowsEpilogue<T>&);
#define FASTCONV_ROWS_INSTANTIATE(T)                 \
  FASTCONV_ROWS_PASSES(T, T)                         \
  template bool rows_in_place<T>(const ConvParams&); \
  template void rows_pack<T>(const ConvParams&, const T*, ConvPass, void*);
FASTCONV_ROWS_INSTANTIATE(float)
FASTCONV_ROWS_INSTANTIATE(bf16)
FASTCONV_ROWS_PASSES(bf16, float)

}  // namespace fastconv::cpu
