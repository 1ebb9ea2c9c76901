// Host side of the row-class convolution: plan, threads, workspace, choice of the instruction set.

#include "conv_rows.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <tuple>
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

#if FASTCONV_X86
#define FASTCONV_ROWS_PICK(...) \
  (active_isa() == Isa::avx512_bf16 ? &::fastconv::cpu::avx512_bf16::__VA_ARGS__ : FASTCONV_PICK(__VA_ARGS__))
#else
#define FASTCONV_ROWS_PICK(...) FASTCONV_PICK(__VA_ARGS__)
#endif

namespace fastconv::cpu {

using namespace rows_host;  // NOLINT: this file's own helpers

namespace {

constexpr int64_t kPanelCache = 512 << 10;  // half of a 1 MB L2 for packed panels,
constexpr int64_t kRowCache = 256 << 10;    // a quarter for the rows that meet them
constexpr int64_t kTableEntries = 4096;     // 32 KB of row pointers
constexpr int64_t kMaxTilesAtOnce = 32;     // kMaxTiles of conv_rows()
constexpr int64_t kTapSums = 1 << 20;       // the part of dw that several taps at once may add to
constexpr int64_t kUpdateBytes = 1 << 20;   // of a weight gradient that is consumed at once: half of a 2 MB L2
constexpr double kSerialWork = 1 << 18;     // multiply-adds; below, a parallel region (2-5 us) costs more than it saves

RowsShape tile_shape() {
  if (active_isa() >= Isa::avx512) return {8, 32};
  if (active_isa() == Isa::avx2) return {6, 16};
  return {6, 8};
}

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

// Plans are kept per thread, by geometry: making one costs microseconds, as much as a small convolution.
constexpr size_t kKeptPlans = 1024;  // several networks' worth; then all are dropped

template <class T>
std::shared_ptr<const RowsPlanData> kept_plan(const ConvParams& p, bool transposed, RowsShape shape) {
  using Key = std::tuple<bool, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                         int64_t, int64_t, int64_t, int64_t, int64_t>;
  thread_local std::map<Key, std::shared_ptr<const RowsPlanData>> plans;
  const Key key{transposed, p.n, p.h,        p.w,        p.c,     p.k,     p.r,     p.s,
                p.p,        p.q, p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dil_h, p.dil_w};
  auto found = plans.find(key);
  if (found != plans.end()) return found->second;
  auto made = std::make_shared<RowsPlanData>();
  make_plan<T>(p, transposed, shape, *made);
  if (plans.size() >= kKeptPlans) plans.clear();
  plans.emplace(key, made);
  return made;
}

template <class T, class W>
void run_rows(const ConvParams& p, bool transposed, const T* input, const W* weight, const void* packed,
              const RowsEpilogue<T>& e) {
  const RowsShape shape = tile_shape();
  const std::shared_ptr<const RowsPlanData> kept = kept_plan<T>(p, transposed, shape);
  const RowsPlanData& d = *kept;
  const int64_t channels = transposed ? p.k : p.c;
  if (d.plan.gather_r > 0)
    input = pad_input(p, input);
  else if (even<T>(channels) != channels)
    input = widen_channels(input, p.n * (transposed ? p.p * p.q : p.h * p.w), channels, even<T>(channels));
  const RowsPlan& plan = d.plan;
  const int64_t panels = (plan.columns + shape.columns - 1) / shape.columns;
  const double work = d.cost * panels * 16;
  const RowsGrid grid = choose_rows_grid(d, panels, work < kSerialWork ? 1 : at::get_num_threads(), packed != nullptr);
  const auto kernel = FASTCONV_ROWS_PICK(conv_rows<T, W>);

  at::parallel_for(0, grid.panel_parts * grid.tile_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t i = part / grid.tile_parts, l = part % grid.tile_parts;
      RowsTask<T, W> t{};
      t.plan = &plan;
      t.input = input;
      t.weight = weight;
      t.packed = static_cast<const char*>(packed);
      t.transposed = transposed;
      t.epilogue = e;
      t.panel_begin = panels * i / grid.panel_parts;
      t.panel_end = panels * (i + 1) / grid.panel_parts;
      t.tile_begin = d.tile_at(static_cast<double>(l) / grid.tile_parts);
      t.tile_end = l + 1 == grid.tile_parts ? d.tiles : d.tile_at(static_cast<double>(l + 1) / grid.tile_parts);
      t.panels_at_once =
          std::clamp<int64_t>(kPanelCache / plan.panel_bytes, 1, std::max<int64_t>(1, t.panel_end - t.panel_begin));
      t.table_tile = d.max_segments * shape.rows;
      t.tiles_at_once = std::clamp<int64_t>(kRowCache / (shape.rows * plan.tap_units * 4), 1,
                                            std::clamp<int64_t>(kTableEntries / t.table_tile, 1, kMaxTilesAtOnce));
      const int64_t panel_space = packed != nullptr ? 0 : round64(t.panels_at_once * plan.panel_bytes);
      const int64_t table_space = round64(t.tiles_at_once * t.table_tile * static_cast<int64_t>(sizeof(char*)));
      const int64_t zero_space = round64(plan.tap_units * 4);
      const int64_t gather_space =
          plan.gather_r > 0 ? t.tiles_at_once * shape.rows * gather_row_bytes(plan.tap_units) : 0;
      char* space = workspace<0>(panel_space + table_space + zero_space + gather_space);
      t.panels = space;
      t.table = reinterpret_cast<const char**>(space + panel_space);
      char* zeros = space + panel_space + table_space;
      std::memset(zeros, 0, plan.tap_units * 4);
      t.zeros = zeros;
      t.gathered = zeros + zero_space;
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

// Where stock was faster, one thread each, on Zen 5, ratio oneDNN : here (a ratio below 1 is a loss):
// - output columns that fill less than 0.8 of the 32-wide tiles: fprop K = 8, 16, 41, 48 at 0.64, 0.65, 0.89, 0.82;
// dgrad C = 3, 8, 16, 48 at
//   0.6, 0.62, 0.62, 0.78; wgrad C = 16, 24, 48 at 0.48, 0.66, 0.72;
// - 3x3 filters on 3 channels: 0.8 - 0.87 (the gathered sum is too short to pay for the gathering; 7x7: 1.3);
// - fp32 data gradient of one row: 0.74 - 0.79 (oneDNN has a matrix-vector product).
// Everywhere else it won: see the table in kernels/conv_rows.h.
bool rows_worthwhile(const ConvParams& p, int64_t element, ConvPass pass, bool packed) {
  if (rows_refusal(p, element) != nullptr || active_isa() == Isa::portable) return false;
  auto filled = [](int64_t columns) { return columns * 10 >= (columns + 31) / 32 * 32 * 8; };
  switch (pass) {
    case ConvPass::forward:
      return filled(p.k) && (!gathers(p) || p.r * p.s * p.c >= 64);
    case ConvPass::input_grad:
      return filled(p.c) && (packed || element == 2 || p.n * p.h * p.w > 1);
    case ConvPass::weight_grad:
      if (gathers(p)) return filled(p.r * p.s * p.c);
      // AVX2 packs for its six rows element by element: 0.9 - 1.0 on 3x3x64.
      return filled(p.c) && (active_isa() >= Isa::avx512 || element == 2 || p.r * p.s == 1 || p.c >= 128);
  }
  return false;
}

template <class T, class W>
void rows_forward(const ConvParams& p, const T* x, const W* weight, const void* packed, const RowsEpilogue<T>& e) {
  run_rows<T, W>(p, false, x, weight, packed, e);
}

template <class T, class W>
void rows_input_grad(const ConvParams& p, const T* dz, const W* weight, const void* packed, const RowsEpilogue<T>& e) {
  run_rows<T, W>(p, true, dz, weight, packed, e);
}

int64_t rows_packed_bytes(const ConvParams& p, int64_t element, ConvPass pass) {
  ConvParams q = p;
  if (pass == ConvPass::forward && gathers_forward(q, element)) q.c *= q.r * q.s, q.r = q.s = 1;
  const int64_t columns = tile_shape().columns;
  const int64_t summed = pass == ConvPass::forward ? q.c : q.k, out = pass == ConvPass::forward ? q.k : q.c;
  const int64_t units = element == 2 ? (summed + 1) / 2 : summed;
  return (out + columns - 1) / columns * columns * q.r * q.s * units * 4;
}

template <class T>
void rows_pack(const ConvParams& p, const T* weight, ConvPass pass, void* packed) {
  const RowsShape shape = tile_shape();
  const bool transposed = pass == ConvPass::input_grad;
  const std::shared_ptr<const RowsPlanData> kept = kept_plan<T>(p, transposed, shape);
  const RowsPlanData& d = *kept;
  const auto kernel = FASTCONV_ROWS_PICK(pack_panels<T>);
  const int64_t panels = (d.plan.columns + shape.columns - 1) / shape.columns;
  at::parallel_for(0, panels, std::max<int64_t>(1, (64 << 10) / d.plan.panel_bytes),
                   [&](int64_t a, int64_t b) { kernel(d.plan, weight, transposed, a, b, static_cast<char*>(packed)); });
}

// --- weight gradient
// ------------------------------------------------------------------------------------------------------------

namespace {

struct WgradGrid {
  int64_t k_parts, c_parts, tap_parts;
};

WgradGrid choose_wgrad_grid(int64_t k, int64_t c, int64_t taps, int64_t threads, RowsShape shape, int64_t element) {
  WgradGrid best{1, 1, 1};
  double best_cost = 1e300;
  auto ceil = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  for (int64_t tk = 1; tk <= std::min(threads, ceil(k, shape.rows)); ++tk) {
    for (int64_t tc = 1; tc <= std::min(threads / tk, ceil(c, shape.columns)); ++tc) {
      const int64_t tt = std::min(threads / (tk * tc), taps);
      const double kr = ceil(ceil(k, shape.rows), tk) * shape.rows,
                   cr = ceil(ceil(c, shape.columns), tc) * shape.columns;
      // cycles per position: tiles at 2 vectors a cycle, packing 0.25 per element
      const double cost = ceil(taps, tt) * (kr * cr / (2 * shape.columns / 2) * (element / 4.0) + (kr + cr) * 0.25);
      if (cost < best_cost * 0.999) best_cost = cost, best = {tk, tc, tt};
    }
  }
  return best;
}

// The task that all parts share; `p` becomes the convolution as the kernel sees it.
template <class T, class D>
WgradTask<T, D> wgrad_task(ConvParams& p, const T* dz, const T* x) {
  WgradTask<T, D> t{};
  t.k = p.k;
  t.columns = t.pixel = p.c;
  if (p.r == 1 && p.s == 1 && p.stride_h == 1 && p.stride_w == 1 && p.pad_h == 0 && p.pad_w == 0) {
    p.w = p.q = p.n * p.h * p.w;  // one long row
    p.n = p.h = p.p = 1;
  } else if (gathers(p)) {
    const int64_t hp = padded_h(p), wp = padded_w(p);
    x = pad_input(p, x);
    t.columns = p.r * p.s * p.c;
    t.gather_r = p.r;
    t.gather_step = p.dil_h * wp * p.c;
    t.gather_row = gather_row_bytes(t.columns) / 4;
    p.h = hp, p.w = wp, p.r = p.s = 1, p.pad_h = p.pad_w = 0;
  }
  t.dz = dz, t.x = x;
  t.n = p.n, t.p = p.p, t.q = p.q;
  t.h_size = p.h, t.w_size = p.w;
  t.taps_r = p.r, t.taps_s = p.s;
  t.stride_h = p.stride_h, t.stride_w = p.stride_w;
  t.pad_h = p.pad_h, t.pad_w = p.pad_w;
  t.dil_h = p.dil_h, t.dil_w = p.dil_w;
  return t;
}

// Runs the part [k0, k1) x [c0, c1) x [tap_begin, tap_end) of m. With m.dw null the gradient goes to the thread's own
// workspace, `extra` bytes of it, element (k0, 0, 0) first; its address is returned.
template <class T, class D>
D* run_wgrad(const ConvParams& p, WgradTask<T, D> m, int64_t extra = 0) {
  const int64_t a = kWgradRowBytes, b = kWgradColumnBytes;
  const int64_t per_tap = std::min(kWgradK, m.k1 - m.k0) * (m.c1 - m.c0) * 4;
  const bool streams =
      p.n * p.p * p.q * (p.k + p.c) * static_cast<int64_t>(sizeof(T)) > kPanelCache;  // else dz and x stay in L2
  m.taps_at_once = streams ? std::clamp<int64_t>(kTapSums / std::max<int64_t>(per_tap, 1), 1, kWgradTaps) : 1;
  m.taps_at_once = std::clamp<int64_t>(m.tap_end - m.tap_begin, 1, m.taps_at_once);
  const int64_t sum = sizeof(D) < 4 ? round64(m.taps_at_once * per_tap) : 0;
  const int64_t chunk = kWgradUnits * (4 / static_cast<int64_t>(sizeof(T)));
  const int64_t rows = round64(2 * chunk * static_cast<int64_t>(sizeof(T*)));
  const int64_t gathered = m.gather_r > 0 ? round64(chunk * m.gather_row * static_cast<int64_t>(sizeof(T)) + 64) : 0;
  char* space = workspace<0>(a + b + sum + rows + gathered + extra);
  m.a = space;
  m.b = space + a;
  m.sum = reinterpret_cast<float*>(space + a + b);
  m.rows = reinterpret_cast<const T**>(space + a + b + sum);
  m.gathered = reinterpret_cast<T*>(space + a + b + sum + rows);
  D* out = reinterpret_cast<D*>(space + a + b + sum + rows + gathered);
  if (m.dw == nullptr) m.dw = out - m.k0 * m.taps_r * m.taps_s * m.columns;
  FASTCONV_ROWS_PICK(conv_wgrad<T, D>)(m);
  return out;
}

int64_t cut(int64_t size, int64_t block, int64_t part, int64_t parts) {
  return std::min(size, (size + block - 1) / block * part / parts * block);
}

int64_t wgrad_threads(const ConvParams& p, int64_t columns) {
  const double work = static_cast<double>(p.n * p.p * p.q) * p.k * columns * p.r * p.s;
  return work < kSerialWork ? 1 : at::get_num_threads();
}

}  // namespace

template <class T, class D>
void rows_weight_grad(const ConvParams& full, const T* dz, const T* x, D* dw) {
  ConvParams p = full;
  WgradTask<T, D> t = wgrad_task<T, D>(p, dz, x);
  t.dw = dw;
  t.past = sizeof(D) == 4 && t.columns % 16 == 0 && reinterpret_cast<uintptr_t>(dw) % 64 == 0 &&
           p.k * p.r * p.s * t.columns * 4 >= kPastCacheBytes;
  const RowsShape shape = tile_shape();
  const int64_t taps = p.r * p.s;
  const WgradGrid grid = choose_wgrad_grid(p.k, t.columns, taps, wgrad_threads(p, t.columns), shape, sizeof(T));
  at::parallel_for(0, grid.k_parts * grid.c_parts * grid.tap_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      WgradTask<T, D> m = t;
      const int64_t tap = part % grid.tap_parts, c = part / grid.tap_parts % grid.c_parts,
                    k = part / grid.tap_parts / grid.c_parts;
      m.k0 = cut(p.k, shape.rows, k, grid.k_parts);
      m.k1 = cut(p.k, shape.rows, k + 1, grid.k_parts);
      m.c0 = cut(t.columns, shape.columns, c, grid.c_parts);
      m.c1 = cut(t.columns, shape.columns, c + 1, grid.c_parts);
      m.tap_begin = taps * tap / grid.tap_parts;
      m.tap_end = taps * (tap + 1) / grid.tap_parts;
      run_wgrad(p, m);
    }
  });
}

template <class T>
void rows_weight_grad_blocks(const ConvParams& full, const T* dz, const T* x, bool skip_dead, const GradTaker& take) {
  ConvParams p = full;
  WgradTask<T, float> t = wgrad_task<T, float>(p, dz, x);
  const RowsShape shape = tile_shape();
  const int64_t filter = p.r * p.s * t.columns;  // elements
  t.c1 = t.columns;
  t.tap_end = p.r * p.s;
  t.leave_dead = skip_dead;
  // Runs of live taps, as elements of a filter; one run of all of them where dead ones count.
  std::vector<std::pair<int64_t, int64_t>> runs;
  for (int64_t tap = 0; tap < p.r * p.s; ++tap) {
    const bool live = !skip_dead || (tap_is_live(p.h, p.p, p.stride_h, p.pad_h, p.dil_h, tap / p.s) &&
                                     tap_is_live(p.w, p.q, p.stride_w, p.pad_w, p.dil_w, tap % p.s));
    if (!live) continue;
    if (!runs.empty() && runs.back().second == tap * t.columns)
      runs.back().second += t.columns;
    else
      runs.emplace_back(tap * t.columns, (tap + 1) * t.columns);
  }
  const bool whole = runs.size() == 1 && runs[0].second - runs[0].first == filter;
  const int64_t parts = std::min(wgrad_threads(p, t.columns), (p.k + shape.rows - 1) / shape.rows);
  const int64_t block = std::max<int64_t>(shape.rows, kUpdateBytes / (filter * 4) / shape.rows * shape.rows);
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t last = cut(p.k, shape.rows, end, parts);
    for (int64_t k = cut(p.k, shape.rows, begin, parts); k < last; k += block) {
      WgradTask<T, float> m = t;
      m.k0 = k;
      m.k1 = std::min(last, k + block);
      const float* grad = run_wgrad(p, m, (m.k1 - m.k0) * filter * 4);
      if (whole) {
        take(m.k0 * filter, (m.k1 - m.k0) * filter, grad);
        continue;
      }
      for (int64_t i = m.k0; i < m.k1; ++i)
        for (const auto& [from, to] : runs) take(i * filter + from, to - from, grad + (i - m.k0) * filter + from);
    }
  });
}

#define FASTCONV_ROWS_PASSES(T, W)                                                                              \
  template void rows_forward<T, W>(const ConvParams&, const T*, const W*, const void*, const RowsEpilogue<T>&); \
  template void rows_input_grad<T, W>(const ConvParams&, const T*, const W*, const void*, const RowsEpilogue<T>&);
#define FASTCONV_ROWS_INSTANTIATE(T)                                                       \
  FASTCONV_ROWS_PASSES(T, T)                                                               \
  template void rows_pack<T>(const ConvParams&, const T*, ConvPass, void*);                \
  template void rows_weight_grad<T, float>(const ConvParams&, const T*, const T*, float*); \
  template void rows_weight_grad_blocks<T>(const ConvParams&, const T*, const T*, bool, const GradTaker&);
FASTCONV_ROWS_INSTANTIATE(float)
FASTCONV_ROWS_INSTANTIATE(bf16)
FASTCONV_ROWS_PASSES(bf16, float)
template void rows_weight_grad<bf16, bf16>(const ConvParams&, const bf16*, const bf16*, bf16*);

}  // namespace fastconv::cpu
