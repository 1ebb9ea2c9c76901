// Host side of the row-class convolution's weight gradient: threads, workspace, blocks.

#include <ATen/Parallel.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "conv_rows.h"
#include "conv_rows_host.h"

#define FASTCONV_KERNELS_BF16
#define FASTCONV_WGRAD_KERNELS
#define FASTCONV_KERNELS "kernels/conv_rows_kernels.h"
#include "foreach_isa.h"

namespace fastconv::cpu {

using namespace rows_host;  // NOLINT: this file's own helpers

namespace {

constexpr int64_t kTapSums = 1 << 20;      // the part of dw that several taps at once may add to
constexpr int64_t kUpdateBytes = 1 << 20;  // of a weight gradient that is consumed at once: half of a 2 MB L2

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
  const int64_t per_tap = std::min(tile_registers<T>() ? kWgradKAmx : kWgradK, m.k1 - m.k0) * (m.c1 - m.c0) * 4;
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
  FASTCONV_ROWS_PICK(T, conv_wgrad<T, D>)(m);
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
  const RowsShape shape = tile_shape<T>();
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
  const RowsShape shape = tile_shape<T>();
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

#define FASTCONV_WGRAD_INSTANTIATE(T)                                                      \
  template void rows_weight_grad<T, float>(const ConvParams&, const T*, const T*, float*); \
  template void rows_weight_grad_blocks<T>(const ConvParams&, const T*, const T*, bool, const GradTaker&);
FASTCONV_WGRAD_INSTANTIATE(float)
FASTCONV_WGRAD_INSTANTIATE(bf16)
template void rows_weight_grad<bf16, bf16>(const ConvParams&, const bf16*, const bf16*, bf16*);

}  // namespace fastconv::cpu
