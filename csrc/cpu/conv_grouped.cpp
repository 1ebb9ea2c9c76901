// Host side of the convolution in narrow groups: tables of what each output reads, threads, workspace.

#include "conv_grouped.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "conv_rows_host.h"

#define FASTCONV_KERNELS_BF16
#define FASTCONV_KERNELS "kernels/conv_grouped_kernels.h"
#include "foreach_isa.h"

namespace fastconv::cpu {

using namespace rows_host;  // NOLINT: this file's own helpers

namespace {

constexpr int64_t kPiece = 1024;   // positions of a weight gradient that are summed before they are added to the rest
constexpr int64_t kSmallMap = 16;  // output columns; beyond, images are worked on one by one, for what their rows share
// Filters of so many taps whose panels are larger, in floats, meet an image block by block of channels: 7x7 on 192 and
// 384 channels by 2 - 20% faster, 5x5 and 3x3 by up to 30% slower.
constexpr int64_t kLargeFilter = 36, kPanelsAtOnce = 8 << 10;
constexpr int64_t kWgradTasks = 32;  // shares of a weight gradient, where its channels alone give fewer

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Outputs of one axis that read the same taps, each the inputs of the one before it, `mul` further.
struct Runs {
  std::vector<GroupedRun> runs;
  std::vector<int64_t> run_of, index;  // by output
  int64_t mul;

  Runs(const RowsAxis& axis, int64_t out, int64_t taps, int64_t stride, bool transposed)
      : run_of(out), index(out), mul(transposed ? 1 : stride) {
    const int64_t step = transposed ? std::min(stride, out) : 1;
    for (int64_t first = 0; first < step; ++first) {
      for (int64_t o = first; o < out; o += step) {
        if (o == first || !follows(&axis.in[(o - step) * taps], &axis.in[o * taps], taps)) runs.push_back({o, step, 0});
        run_of[o] = static_cast<int64_t>(runs.size()) - 1;
        index[o] = runs.back().count++;
      }
    }
  }

 private:
  bool follows(const int64_t* a, const int64_t* b, int64_t taps) const {
    for (int64_t t = 0; t < taps; ++t)
      if (a[t] < 0 ? b[t] >= 0 : b[t] != a[t] + mul) return false;
    return true;
  }
};

// What every output reads.
struct GroupedPlan {
  std::vector<GroupedRow> rows;
  std::vector<GroupedRun> runs;
  std::vector<GroupedLine> lines;
  std::vector<int64_t> line_begin{0};
  int64_t step, advance;

  GroupedPlan(const ConvParams& p, bool transposed, int64_t panel) {  // elements of one tap in it
    const int64_t out_h = transposed ? p.h : p.p, out_w = transposed ? p.w : p.q;
    const int64_t in_h = transposed ? p.p : p.h, in_w = transposed ? p.q : p.w;
    const RowsAxis h(out_h, in_h, p.r, p.stride_h, p.pad_h, p.dil_h, transposed);
    const RowsAxis w(out_w, in_w, p.s, p.stride_w, p.pad_w, p.dil_w, transposed);
    const Runs rows_of(h, out_h, p.r, p.stride_h, transposed), columns_of(w, out_w, p.s, p.stride_w, transposed);
    for (int64_t o = 0; o < out_h; ++o)
      rows.push_back({rows_of.run_of[o], rows_of.index[o] * rows_of.mul * in_w * p.c});
    runs = columns_of.runs, step = columns_of.mul * p.c;
    // 3 taps with a stride share one input of four outputs' 12: 3x3 in bf16 by up to 15% faster from tap to tap.
    advance = transposed || p.s > 3 ? step : p.dil_w * p.c;
    for (const GroupedRun& a : rows_of.runs) {
      for (const GroupedRun& b : runs) {
        for (int64_t r = 0; r < p.r; ++r) {
          const int64_t y = h.in[a.out * p.r + r];
          if (y >= 0) add_lines(&w.in[b.out * p.s], p.s, y * in_w, r * p.s, p.c, panel);
        }
        line_begin.push_back(static_cast<int64_t>(lines.size()));
      }
    }
  }

 private:
  // Of one filter row, whose tap s reads the input column columns[s], or none (-1). From left to right in the input.
  void add_lines(const int64_t* columns, int64_t taps, int64_t row, int64_t first_tap, int64_t channels,
                 int64_t panel) {
    std::vector<int64_t> live;
    for (int64_t s = 0; s < taps; ++s)
      if (columns[s] >= 0) live.push_back(s);
    std::sort(live.begin(), live.end(), [&](int64_t a, int64_t b) { return columns[a] < columns[b]; });
    const size_t begin = lines.size();
    std::vector<int64_t> last;  // taps of these lines
    for (const int64_t s : live) {
      size_t i = 0;
      while (i < last.size() && (columns[s] - columns[last[i]]) * channels != advance) ++i;
      if (i == last.size()) {
        lines.push_back({(row + columns[s]) * channels, (first_tap + s) * panel, 0, 1});
        last.push_back(s);
      } else {
        lines[begin + i].next = (s - last[i]) * panel;
        ++lines[begin + i].count;
        last[i] = s;
      }
    }
  }
};

template <class T, class W, int G>
void run_grouped(const ConvParams& p, bool transposed, const T* input, const W* weight, const RowsEpilogue<T>& e) {
  const int64_t block = tile_shape<float>().columns, blocks = ceil_div(p.c, block);
  const auto found = kept<GroupedPlan>(p, {transposed, G * block, 0},
                                       [&] { return std::make_shared<GroupedPlan>(p, transposed, G * block); });
  const GroupedPlan& plan = *found;
  GroupedTask<T> task{};
  task.input = input, task.epilogue = e;
  task.rows = plan.rows.data(), task.runs = plan.runs.data(), task.n_runs = static_cast<int64_t>(plan.runs.size());
  task.lines = plan.lines.data(), task.line_begin = plan.line_begin.data();
  task.step = plan.step, task.advance = plan.advance;
  task.in_image = (transposed ? p.p * p.q : p.h * p.w) * p.c;
  task.out_h = transposed ? p.h : p.p, task.out_w = transposed ? p.w : p.q;
  const int64_t taps = p.r * p.s;
  task.channels = p.c, task.block = taps * G * block, task.n = p.n;
  task.at_once = task.out_w <= kSmallMap ? kGroupedSide : 1;
  const auto pack = FASTCONV_VECTORS_PICK(grouped_pack<T, W, G>);
  const auto kernel = FASTCONV_VECTORS_PICK(grouped<T, G>);
  // Rows are shared out where there are enough of them for even shares; else channels, in whole blocks.
  const int64_t rows = ceil_div(p.n, task.at_once) * task.out_h;
  const double work = static_cast<double>(p.n * p.p * p.q) * p.c * G * taps;
  const int64_t threads = work < kSerialWork ? 1 : at::get_num_threads();
  const int64_t c_parts = rows >= 8 * threads ? 1 : std::min(blocks, threads);
  const int64_t row_parts = std::min(rows, std::max<int64_t>(1, threads / c_parts));
  at::parallel_for(0, c_parts * row_parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t i = part / row_parts, j = part % row_parts;
      const int64_t c0 = blocks * i / c_parts * block, c1 = std::min(p.c, blocks * (i + 1) / c_parts * block);
      GroupedTask<T> mine = task;
      mine.panels = reinterpret_cast<float*>(workspace<0>(ceil_div(c1 - c0, block) * task.block * 4));
      pack(weight, taps, transposed, c0, c1, mine.panels);
      const int64_t row1 = rows * (j + 1) / row_parts;
      const int64_t c_step = taps * (c1 - c0) * G > kPanelsAtOnce && taps >= kLargeFilter ? block : c1 - c0;
      for (int64_t row = rows * j / row_parts; row < row1; row += task.out_h) {
        GroupedTask<T> some = mine;
        for (int64_t c = c0; c < c1; c += c_step, some.panels += task.block)
          kernel(some, row, std::min(row1, row + task.out_h), c, std::min(c1, c + c_step));
      }
    }
  });
}

// The taps that read data somewhere, in passes of at most `most`: of whole filter rows where these slide
// (GroupedWgradTask::shift), else as even as can be.
struct WgradPasses {
  std::vector<int64_t> taps, offsets, begin{0};
  std::vector<uint32_t> row_masks, column_masks;  // [pass][p], [pass][q]
  int64_t shift = 0, slide_begin = 0, slide_end = 0;

  WgradPasses(const ConvParams& p, int64_t most, int64_t element) {
    for (int64_t t = 0; t < p.r * p.s; ++t) {
      if (!tap_is_live(p.h, p.p, p.stride_h, p.pad_h, p.dil_h, t / p.s)) continue;
      if (!tap_is_live(p.w, p.q, p.stride_w, p.pad_w, p.dil_w, t % p.s)) continue;
      taps.push_back(t);
      offsets.push_back((t / p.s * p.dil_h * p.w + t % p.s * p.dil_w) * p.c);
    }
    const auto count = static_cast<int64_t>(taps.size());
    find_slide(p, most, element);
    const int64_t pass = p.s == 3 ? 9 : p.s, passes = ceil_div(count, shift > 0 ? pass : most);
    for (int64_t i = 1; i <= passes; ++i) begin.push_back(shift > 0 ? std::min(count, i * pass) : count * i / passes);
    row_masks.assign(passes * p.p, 0), column_masks.assign(passes * p.q, 0);
    for (int64_t i = 0; i < passes; ++i) {
      for (int64_t k = begin[i]; k < begin[i + 1]; ++k) {
        const uint32_t bit = 1u << (k - begin[i]);
        for (int64_t o = 0; o < p.p; ++o)
          if (tap_touches(p.h, p.stride_h, p.pad_h, p.dil_h, o, taps[k] / p.s)) row_masks[i * p.p + o] |= bit;
        for (int64_t o = 0; o < p.q; ++o)
          if (tap_touches(p.w, p.stride_w, p.pad_w, p.dil_w, o, taps[k] % p.s)) column_masks[i * p.q + o] |= bit;
      }
    }
  }

 private:
  // From so many columns on. Nine taps take one vector at a time then, which has to pay for their edges: 3x3 in fp32 on
  // 14 columns 129 us by taps, 132 to 150 sliding, on 28 347 : 268 to 362, on 56 1181 : 736; in bf16 on 14 columns 112
  // : 98, on 4 62 : 81.
  void find_slide(const ConvParams& p, int64_t most, int64_t element) {
    if (active_isa() < Isa::avx512) return;  // too few registers
    if (most < 9 || (p.s != 3 && p.s != 5 && p.s != 7) || p.stride_w % p.dil_w != 0 || p.stride_w > 2 * p.dil_w) return;
    const auto reads = [&](int64_t o, int64_t s) { return tap_touches(p.w, p.stride_w, p.pad_w, p.dil_w, o, s); };
    const int64_t least = p.s > 3 ? 4 : element == 4 ? 20 : 12;
    while (slide_begin < p.q && !reads(slide_begin, 0)) ++slide_begin;
    slide_end = slide_begin;
    while (slide_end < p.q && reads(slide_end, p.s - 1)) ++slide_end;
    if (slide_end - slide_begin >= least) shift = p.stride_w / p.dil_w;
  }
};

template <class T, class D, int G>
void run_weight_grad(const ConvParams& p, const T* dz, const T* x, D* dw) {
  const auto found = kept<WgradPasses>(p, {grouped_taps(G), sizeof(T), 0},
                                       [&] { return std::make_shared<WgradPasses>(p, grouped_taps(G), sizeof(T)); });
  const WgradPasses& passes = *found;
  const auto count = static_cast<int64_t>(passes.taps.size()), taps = p.r * p.s;
  const int64_t block = tile_shape<float>().columns, blocks = ceil_div(p.c, block), rows = p.n * p.p;
  if (count < taps) std::memset(static_cast<void*>(dw), 0, p.c * G * taps * sizeof(D));
  if (count == 0) return;
  // Shares of the rows, by the shape alone, in whole pieces.
  const int64_t piece = std::max<int64_t>(1, kPiece / p.q), pieces = ceil_div(rows, piece);
  const int64_t parts = std::min(pieces, std::max<int64_t>(1, kWgradTasks / blocks));
  const int64_t part = count * G * block;
  auto* sums = reinterpret_cast<float*>(workspace<1>(blocks * parts * part * 4));
  const auto kernel = FASTCONV_VECTORS_PICK(grouped_wgrad<T, G>);
  const double work = static_cast<double>(p.n * p.p * p.q) * p.c * G * count;
  const int64_t tasks = blocks * parts,
                shares = work < kSerialWork ? 1 : std::min<int64_t>(tasks, at::get_num_threads());
  at::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = tasks * first / shares; i < tasks * last / shares; ++i) {
      const int64_t c = i / parts * block, j = i % parts;
      const int n = static_cast<int>(std::min(block, p.c - c));
      float* mine = sums + i * part;
      std::memset(mine, 0, part * 4);
      GroupedWgradTask<T> t{dz, x, p.p, p.q, p.h, p.w, p.c, p.stride_h, p.stride_w, p.pad_h, p.pad_w};
      t.shift = passes.shift, t.slide_begin = passes.slide_begin, t.slide_end = passes.slide_end;
      const int64_t begin_row = pieces * j / parts * piece, end_row = std::min(rows, pieces * (j + 1) / parts * piece);
      for (int64_t row = begin_row; row < end_row; row += piece) {
        for (size_t k = 0; k + 1 < passes.begin.size(); ++k) {
          const int64_t begin = passes.begin[k];
          t.offsets = &passes.offsets[begin];
          t.row_mask = &passes.row_masks[k * p.p], t.column_mask = &passes.column_masks[k * p.q];
          kernel(t, passes.begin[k + 1] - begin, row, std::min(rows, row + piece), c, n, mine + begin * G * block);
        }
      }
    }
  });
  const auto put = FASTCONV_VECTORS_PICK(grouped_wgrad_put<D>);
  for (int64_t b = 0; b < blocks; ++b) {
    const int n = static_cast<int>(std::min(block, p.c - b * block));
    put(sums + b * parts * part, parts, part, passes.taps.data(), count, taps, G, n, dw + b * block * taps * G);
  }
}

// run(tag) with the number of channels of a group.
template <class F>
void with_group(const ConvParams& p, const F& run) {
  switch (p.c / p.groups) {
    case 1:
      return run(std::integral_constant<int, 1>{});
    case 2:
      return run(std::integral_constant<int, 2>{});
    case 4:
      return run(std::integral_constant<int, 4>{});
    case 8:
      return run(std::integral_constant<int, 8>{});
    default:
      return run(std::integral_constant<int, 16>{});
  }
}

}  // namespace

// Against oneDNN through ATen, one thread of a Zen 4, other programs running, 3x3 filters, ratio oneDNN : here in fp32
// and bf16:
// - groups of 1: bench/results; of 2 (4x28x28x64): 5.4, 5.1 forward, 5.7, 5.2 data gradient, 5.9, 11.6 weight gradient;
//   of 4 (4x56x56x128): 5.1, 1.1; 2.1, 1.3; 8.7, 4.3;
// - of 8, 16x2x2x208: 3.2, 2.9; 2.2, 1.8; 3.2, 3.5; 4x7x7x440: 1.1, 0.8; 1.0, 0.7; 1.4, 1.6; 4x28x28x256: 0.8, 0.5;
//   0.9, 0.5; 1.5, 0.8: a call of oneDNN costs 60 us more, its bf16 dot products are twice as fast;
// - of 16, 16x8x8x112: 0.7, 0.4; 0.7, 0.4; 0.7, 0.5.
bool grouped_worthwhile(const ConvParams& p, ConvPass pass) {
  if (p.groups == 1 || p.c != p.k || active_isa() == Isa::portable) return false;
  if (p.n <= 0 || p.p <= 0 || p.q <= 0) return false;
  const int64_t group = p.c / p.groups, lanes = tile_shape<float>().columns / 2;
  if (group > lanes || lanes % group != 0) return false;
  const int64_t most = pass == ConvPass::weight_grad && group == 8 ? 16 << 20 : 4 << 20;
  return group <= 4 || p.n * p.p * p.q * p.k * group * p.r * p.s <= most;
}

template <class T, class W>
void grouped_forward(const ConvParams& p, const T* x, const W* weight, const RowsEpilogue<T>& e) {
  with_group(p, [&](auto group) { run_grouped<T, W, group.value>(p, false, x, weight, e); });
}

template <class T, class W>
void grouped_input_grad(const ConvParams& p, const T* dz, const W* weight, const RowsEpilogue<T>& e) {
  with_group(p, [&](auto group) { run_grouped<T, W, group.value>(p, true, dz, weight, e); });
}

template <class T, class D>
void grouped_weight_grad(const ConvParams& p, const T* dz, const T* x, D* dw) {
  with_group(p, [&](auto group) { run_weight_grad<T, D, group.value>(p, dz, x, dw); });
}

#define FASTCONV_GROUPED(T, W)                                                                           \
  template void grouped_forward<T, W>(const ConvParams&, const T*, const W*, const RowsEpilogue<T>&);    \
  template void grouped_input_grad<T, W>(const ConvParams&, const T*, const W*, const RowsEpilogue<T>&); \
  template void grouped_weight_grad<T, W>(const ConvParams&, const T*, const T*, W*);
FASTCONV_GROUPED(float, float)
FASTCONV_GROUPED(bf16, bf16)
FASTCONV_GROUPED(bf16, float)

}  // namespace fastconv::cpu
