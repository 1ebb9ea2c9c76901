// Host side of a convolution's gradients on a few rows (kernels/conv_few_rows.h): which rows each tap joins, threads,
// workspace.

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "conv_rows.h"
#include "conv_rows_host.h"

#define FASTCONV_KERNELS_BF16
#define FASTCONV_KERNELS "kernels/conv_few_rows_kernels.h"
#include "foreach_isa.h"

namespace fastconv::cpu {

using namespace rows_host;  // NOLINT: this file's own helpers

namespace {

constexpr int64_t kSumBytes = 512 << 10;  // of dx: half of a 1 MB L2
constexpr int64_t kStepWork = 8;          // of a weight and its state, in pairs
constexpr int64_t kPartFilters = 64, kMaxParts = 32;

// run(task) on every thread's parts, then the sum of the parts.
template <class T, class W, class F>
void share_out(const ConvParams& p, const std::vector<FewRowsTap>& taps, FewRowsTask<T, W> t, const F& run) {
  const int64_t columns = tile_shape<float>().columns, panels = p.c / columns;
  t.filters = p.k;
  t.filter = p.r * p.s * p.c;
  t.columns = p.c;
  t.rows = p.n * p.h * p.w;
  t.taps = taps.data();
  t.n_taps = static_cast<int64_t>(taps.size());
  t.pairs = taps.back().first + taps.back().padded;
  t.parts = std::clamp<int64_t>(p.k / kPartFilters, 1, kMaxParts);
  std::vector<int64_t> at(t.rows);
  for (int64_t i = 0; i < t.rows; ++i) at[i] = i * p.c;
  t.at = at.data();
  const int64_t dx = round64(t.pairs * p.c * 4);
  t.dx_pairs = reinterpret_cast<float*>(workspace<1>(t.parts * dx));
  const double work = static_cast<double>(t.pairs + kStepWork * t.n_taps) * p.k * p.c;
  const int64_t threads = work < kSerialWork ? 1 : at::get_num_threads();
  const auto share = [&](int64_t tasks, const auto& f) {
    const int64_t shares = std::min(tasks, threads);
    at::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
      FewRowsTask<T, W> mine = t;
      f(mine, tasks * begin / shares, tasks * end / shares);
    });
  };
  share(t.parts, [&](FewRowsTask<T, W>& mine, int64_t begin, int64_t end) {
    mine.part_begin = begin, mine.part_end = end;
    const int64_t dz = round64((p.k / t.parts + kFewFilters) * kFewRows * 4 * 2);
    char* space = workspace<0>(dz + dx);
    mine.dz_pairs = reinterpret_cast<uint32_t*>(space);
    mine.x_pairs = reinterpret_cast<float*>(space + dz);
    run(mine);
  });
  const auto join = FASTCONV_VECTORS_PICK(few_rows_join<T, W>);
  share(panels, [&](FewRowsTask<T, W>& mine, int64_t begin, int64_t end) {
    mine.panel_begin = begin, mine.panel_end = end;
    mine.sums = reinterpret_cast<float*>(workspace<0>(t.rows * columns * 4));
    join(mine);
  });
}

}  // namespace

std::vector<FewRowsTap> few_rows_taps(const ConvParams& p, int64_t element, bool step, bool dead) {
  if (rows_refusal(p, element) != nullptr || active_isa() == Isa::portable) return {};
  if (p.c % tile_shape<float>().columns != 0 || p.k % kFewFilters != 0 || p.n * p.h * p.w * p.c * 4 > kSumBytes)
    return {};
  if (p.n * p.p * p.q > kFewRows * p.r * p.s) return {};  // without a list of them
  const RowsAxis h(p.p, p.h, p.r, p.stride_h, p.pad_h, p.dil_h, false);
  const RowsAxis w(p.q, p.w, p.s, p.stride_w, p.pad_w, p.dil_w, false);
  std::vector<FewRowsTap> taps;
  int64_t first = 0, live = 0;
  for (int64_t tap = 0; tap < p.r * p.s; ++tap) {
    FewRowsTap next{tap * p.c, 0, 0, first, {}, {}};
    for (int64_t row = 0; row < p.n * p.p * p.q; ++row) {
      const int64_t ih = h.in[row / p.q % p.p * p.r + tap / p.s], iw = w.in[row % p.q * p.s + tap % p.s];
      if (ih < 0 || iw < 0) continue;
      if (next.pairs == kFewRows) return {};
      next.z[next.pairs] = static_cast<int32_t>(row);
      next.x[next.pairs++] = static_cast<int32_t>((row / (p.p * p.q) * p.h + ih) * p.w + iw);
    }
    if (next.pairs > 0) ++live;
    if (next.pairs == 0 && !dead) continue;
    next.padded = next.pairs <= 4 ? 4 : next.pairs <= 8 ? 8 : kFewRows;
    first += next.padded;
    taps.push_back(next);
  }
  // Without a step, bf16 panels lose to the weights in place up to 8 pairs: 110 us to 75 with 4 (512 -> 2048), 100 to
  // 75 with 4 to 16 (3x3x256 on 2x2), but 50 to 60 with 16 (256 -> 1024).
  return live > 0 && (step || element == 4 || first <= 8 * live) ? taps : std::vector<FewRowsTap>();
}

template <class T, class W>
void few_rows_input_grad(const ConvParams& p, const std::vector<FewRowsTap>& taps, const T* dz, const W* weight,
                         const RowsEpilogue<T>& e) {
  FewRowsTask<T, W> t{};
  t.dz = dz, t.weight = weight, t.epilogue = e;
  const auto kernel = FASTCONV_VECTORS_PICK(few_rows_input_grad<T, W>);
  share_out(p, taps, t, [&](const FewRowsTask<T, W>& mine) { kernel(mine); });
}

template <class T>
void few_rows_step(const ConvParams& p, const std::vector<FewRowsTap>& taps, const T* dz, const T* x,
                   const RowsEpilogue<T>& e, const WeightStep& step) {
  FewRowsTask<T, float> t{};
  t.dz = dz, t.x = x, t.weight = step.w, t.epilogue = e;
  const auto kernel = FASTCONV_VECTORS_PICK(few_rows_step<T>);
  share_out(p, taps, t, [&](const FewRowsTask<T, float>& mine) { kernel(mine, step); });
}

#define FASTCONV_FEW_ROWS_GRAD(T, W)                                                                             \
  template void few_rows_input_grad<T, W>(const ConvParams&, const std::vector<FewRowsTap>&, const T*, const W*, \
                                          const RowsEpilogue<T>&);
#define FASTCONV_FEW_ROWS(T)                                                                            \
  FASTCONV_FEW_ROWS_GRAD(T, T)                                                                          \
  template void few_rows_step<T>(const ConvParams&, const std::vector<FewRowsTap>&, const T*, const T*, \
                                 const RowsEpilogue<T>&, const WeightStep&);
FASTCONV_FEW_ROWS(float)
FASTCONV_FEW_ROWS(bf16)
FASTCONV_FEW_ROWS_GRAD(bf16, float)

}  // namespace fastconv::cpu
