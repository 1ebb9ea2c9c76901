// Convolution in narrow groups, NHWC: forward, data gradient, weight gradient. A group has G channels in and G out, and
// vectors hold whole groups: G = 1 (depthwise), 2, 4, 8 and, with AVX-512, 16. c(k, j) is channel j of k's group.
//
//   y[n,p,q,k]  = sum_{r,s,j} x[n, p stride - pad + r dil, q stride - pad + s dil, c(k,j)] w[k,r,s,j]
//   dx[n,h,w,c] = sum_{r,s,j} dz[n,p,q,c(c,j)] w[c(c,j),r,s,c mod G]    over the (p, q) that read (h, w) by tap (r, s)
//   dw[k,r,s,j] = sum_{n,p,q} dz[n,p,q,k] x[n, p stride - pad + r dil, q stride - pad + s dil, c(k,j)]
//
// Forward and data gradient are one loop: outputs that read the same taps stand in runs of rows and of columns (the
// whole interior; with a stride's data gradient each residue class of it), so neither padding nor the holes of a stride
// cost anything. Channels lie in vectors; four to six outputs of two vectors are summed side by side, so a weight is
// loaded once for that many multiply-adds, and the sums hide their latency. They are neighbours in a row, whose inputs
// slide through registers from tap to tap, one load each, or on small maps one of each of four images. Every lane meets
// its group's channels by G permutations of the vector, one for each j. Weights come from a panel [tap][j][channels] in
// fp32, transposed once per call and thread. The weight gradient keeps up to 18 sums in registers over many rows, and
// on wider maps slides likewise. Accumulation: fp32; the weight gradient is summed in pieces of about a thousand
// positions, which are added in order. Bytes: x and y once each, the rows of x that a filter shares from L1 or L2.
// FLOPs: 2 n p q k G per tap that reads data. Limits: fp32 and bf16.

namespace fastconv::cpu::FASTCONV_ISA_NS {

template <int N>
struct Constant {
  static constexpr int value = N;
};

// Lane i: channel j of the group of G channels that lane i is in.
template <int G>
FASTCONV_INLINE f32v of_group(f32v x, int j) {
  if (G == 1) return x;
  return __builtin_shuffle(x, (lane_numbers<float>() & -G) + j);
}

// Q outputs side by side, whose inputs lie `step` elements apart and whose places `at_step`: V vectors of channels from
// c on, of the last one `rest` lanes where PART. SLIDE: neighbours in a row, so that a line's next tap needs one new
// input.
template <class T, int G, int Q, int V, bool PART, bool SLIDE>
FASTCONV_INLINE void grouped_outputs(const GroupedTask<T>& t, const T* in, int64_t step, const float* panel,
                                     const GroupedLine* line, const GroupedLine* end, int64_t at0, int64_t at_step,
                                     int64_t c, int rest) {
  constexpr int kSide = FASTCONV_VEC_BYTES == 64 ? V : 1;  // vectors at a time: AVX2 has half the registers
  f32v acc[Q][V];
  for (int q = 0; q < Q; ++q)
    for (int v = 0; v < V; ++v) acc[q][v] = f32v{};
  const T* from[Q];  // a register each, so that a load's address takes no instruction
  for (int q = 0; q < Q; ++q) from[q] = in + q * step;
  for (; line != end; ++line) {
    for (int u = 0; u < V; u += kSide) {
      int64_t at = line->in + u * kLanes;
      const float* mine = panel + line->panel + u / kTileVecs * t.block + u % kTileVecs * kLanes;
      const auto input = [&](int q, int v) __attribute__((always_inline)) {
        return load(from[q] + at + v * kLanes, !PART || u + v < V - 1, rest);
      };
      f32v x[Q][kSide];
      const auto add = [&]() __attribute__((always_inline)) {
        for (int v = 0; v < kSide; ++v) {
#pragma GCC unroll 16
          for (int j = 0; j < G; ++j) {
            const f32v b = Vec<float>::load(mine + v / kTileVecs * t.block + v % kTileVecs * kLanes + j * kTileCols);
            for (int q = 0; q < Q; ++q) acc[q][u + v] += of_group<G>(x[q][v], j) * b;
          }
        }
      };
      for (int q = 0; q < Q; ++q)
        for (int v = 0; v < kSide; ++v) x[q][v] = input(q, v);
      for (int64_t i = 1; i < line->count; ++i) {
        add();
        mine += line->next;
        at += SLIDE ? step : t.advance;
        for (int v = 0; v < kSide; ++v) {
          for (int q = 0; q < Q - 1; ++q) x[q][v] = SLIDE ? x[q + 1][v] : input(q, v);
          x[Q - 1][v] = input(Q - 1, v);
        }
      }
      add();
    }
  }
  if (is_plain(t.epilogue)) {
    for (int q = 0; q < Q; ++q)
      for (int v = 0; v < V; ++v)
        store(t.epilogue.out + at0 + q * at_step + c + v * kLanes, acc[q][v], !PART || v < V - 1, rest);
    return;
  }
  int64_t at[Q];
  for (int q = 0; q < Q; ++q) at[q] = at0 + q * at_step;
  for (int first = 0; first < V; first += kTileVecs) {
    f32v sums[Q * kTileVecs];  // not acc: its address must not be taken
    for (int q = 0; q < Q; ++q)
      for (int v = 0; v < kTileVecs && first + v < V; ++v) sums[q * kTileVecs + v] = acc[q][first + v];
    const int n = (V - first) * kLanes - (PART ? kLanes - rest : 0);
    finish(t.epilogue, at, c + first * kLanes, sums, Q, n < kTileCols ? n : kTileCols);
  }
}

// `count` outputs in a line, all channels in [c0, c1): memory is read in its order, which the prefetcher follows. One
// block of channels at a time over a whole row was up to 1.6 times slower where the rows do not lie in L1.
template <class T, int G, bool SLIDE>
void grouped_line(const GroupedTask<T>& t, const T* in, int64_t step, const GroupedLine* line, const GroupedLine* end,
                  int64_t at, int64_t at_step, int64_t count, int64_t c0, int64_t c1) {
  const int64_t blocks = (c1 - c0) / kTileCols;
  const int n = (int)(c1 - c0 - blocks * kTileCols);
  const auto outputs = [&](auto side) __attribute__((always_inline)) {
    constexpr int Q = decltype(side)::value;
    const float* panel = t.panels;
    int64_t c = c0, left = blocks;
    if (Q == 1)  // too few sums to hide their latency: two blocks side by side
      for (; left >= 2; left -= 2, c += 2 * kTileCols, panel += 2 * t.block)
        grouped_outputs<T, G, Q, 2 * kTileVecs, false, SLIDE>(t, in + c, step, panel, line, end, at, at_step, c, 0);
    for (; left > 0; --left, c += kTileCols, panel += t.block)
      grouped_outputs<T, G, Q, kTileVecs, false, SLIDE>(t, in + c, step, panel, line, end, at, at_step, c, 0);
    if (n > kLanes)
      grouped_outputs<T, G, Q, 2, true, SLIDE>(t, in + c, step, panel, line, end, at, at_step, c, n - kLanes);
    else if (n == kLanes)
      grouped_outputs<T, G, Q, 1, false, SLIDE>(t, in + c, step, panel, line, end, at, at_step, c, 0);
    else if (n > 0)
      grouped_outputs<T, G, Q, 1, true, SLIDE>(t, in + c, step, panel, line, end, at, at_step, c, n);
    in += Q * step, at += Q * at_step, count -= Q;
  };
  if constexpr (SLIDE && FASTCONV_VEC_BYTES == 64)  // 7 are 4 + 3, 8 are 4 + 4
    while (count == 6 || count > 8) outputs(Constant<6>{});
  while (count >= 4) outputs(Constant<4>{});
  if (count == 3) outputs(Constant<3>{});
  if (count == 2) outputs(Constant<2>{});
  if (count == 1) outputs(Constant<1>{});
}

// Rows [row0, row1) of all groups of `at_once` images, channels [c0, c1); c0 a multiple of kTileCols, c1 too or the
// last. Outputs stand side by side along the row where its run is long enough, else they are one of every image.
template <class T, int G>
void grouped(const GroupedTask<T>& t, int64_t row0, int64_t row1, int64_t c0, int64_t c1) {
  const int64_t out_image = t.out_h * t.out_w * t.channels;
  const auto along_row = t.advance == t.step ? grouped_line<T, G, true> : grouped_line<T, G, false>;
  for (int64_t row = row0; row < row1; ++row) {
    const int64_t h = row % t.out_h, n0 = row / t.out_h * t.at_once;
    const int64_t images = t.n - n0 < t.at_once ? t.n - n0 : t.at_once;
    const T* first = t.input + n0 * t.in_image + t.rows[h].in;
    for (int64_t i = 0; i < t.n_runs; ++i) {
      const GroupedRun run = t.runs[i];
      const int64_t* list = t.line_begin + t.rows[h].run * t.n_runs + i;
      const GroupedLine *line = t.lines + list[0], *end = t.lines + list[1];
      const int64_t at_first = ((n0 * t.out_h + h) * t.out_w + run.out) * t.channels, at_run = run.step * t.channels;
      const bool along = images == 1 || run.count >= kGroupedSide;
      if (along) {
        for (int64_t k = 0; k < images; ++k)
          along_row(t, first + k * t.in_image, t.step, line, end, at_first + k * out_image, at_run, run.count, c0, c1);
      } else {
        for (int64_t k = 0; k < run.count; ++k)
          grouped_line<T, G, false>(t, first + k * t.step, t.in_image, line, end, at_first + k * at_run, out_image,
                                    images, c0, c1);
      }
    }
  }
}

// weight [k][taps][G] to panels of the channels [c0, c1) that come out. W: T, or fp32 and rounded to T, as a copy in T
// would be.
template <class T, class W, int G>
void grouped_pack(const W* weight, int64_t taps, bool transposed, int64_t c0, int64_t c1, float* panels) {
  for (int64_t c = c0; c < c1; c += kTileCols) {
    const int n = (int)(c1 - c < kTileCols ? c1 - c : kTileCols);
    for (int64_t tap = 0; tap < taps; ++tap) {
      for (int j = 0; j < G; ++j, panels += kTileCols) {
        W lanes[kTileCols] = {};
        for (int i = 0; i < n; ++i) {
          const int64_t k = transposed ? (c + i) / G * G + j : c + i, from = transposed ? (c + i) % G : j;
          lanes[i] = weight[(k * taps + tap) * G + from];
        }
        for (int v = 0; v < kTileCols; v += kLanes) {
          f32v b = Vec<W>::load(lanes + v);
          if constexpr (sizeof(W) != sizeof(T)) b = widen(T{}, narrow(T{}, b));
          Vec<float>::store(panels + v, b);
        }
      }
    }
  }
}

// Whether the sums of NT taps, their inputs and dz fit in registers, of V vectors each.
template <int NT>
constexpr bool slides(int V) {
  return FASTCONV_VEC_BYTES == 64 && NT * V * 2 + V < 32;
}

// `count` outputs of a row from dz on, `step` elements apart: the gradients of NR filter rows of S taps, whose first
// taps read x[0], x[1], ... at the first output. Inputs slide through registers, SHIFT taps from one output to the
// next.
template <class T, int NR, int S, int SHIFT, int V, bool FULL>
FASTCONV_INLINE void grouped_wgrad_slide(const T* dz, const T* const* x, int64_t tap, int64_t step, int64_t count,
                                         int n, f32v (*acc)[V]) {
  f32v window[NR][S][V];
  const auto read = [&](int r, int s, int64_t at) __attribute__((always_inline)) {
    for (int v = 0; v < V; ++v) window[r][s][v] = load(x[r] + at * tap + v * kLanes, FULL, n - v * kLanes);
  };
  for (int r = 0; r < NR; ++r)
    for (int s = 0; s < S - SHIFT; ++s) read(r, s, s);
  for (int64_t i = 0; i < count; ++i, dz += step) {
    for (int r = 0; r < NR; ++r)
      for (int s = S - SHIFT; s < S; ++s) read(r, s, i * SHIFT + s);
    for (int v = 0; v < V; ++v) {
      const f32v g = load(dz + v * kLanes, FULL, n - v * kLanes);
      for (int r = 0; r < NR; ++r)
        for (int s = 0; s < S; ++s) acc[r * S + s][v] += g * window[r][s][v];
      for (int r = 0; r < NR; ++r)
        for (int s = 0; s < S - SHIFT; ++s) window[r][s][v] = window[r][s + SHIFT][v];
    }
  }
}

// sums[tap][j][kTileCols] += the gradient of NT taps over the output rows [row0, row1), V vectors of channels from c.
template <class T, int G, int NT, int V, bool FULL>
FASTCONV_INLINE void grouped_wgrad_vectors(const GroupedWgradTask<T>& t, int64_t row0, int64_t row1, int64_t c, int n,
                                           float* sums) {
  constexpr uint32_t kAll = (1u << NT) - 1;
  constexpr int kRow = grouped_row_taps(NT);
  constexpr bool kSlides = G == 1 && kRow > 0 && slides<NT>(V);
  f32v acc[NT * G][V];
  for (int i = 0; i < NT * G; ++i)
    for (int v = 0; v < V; ++v) acc[i][v] = f32v{};
  int64_t offsets[NT];
  for (int i = 0; i < NT; ++i) offsets[i] = t.offsets[i] + c;
  for (int64_t row = row0; row < row1; ++row) {
    const int64_t p = row % t.p, image = row / t.p;
    const uint32_t row_mask = t.row_mask[p];
    if (row_mask == 0) continue;
    int64_t origin = ((image * t.h + p * t.stride_h - t.pad_h) * t.w - t.pad_w) * t.channels;
    const T* dz = t.dz + row * t.q * t.channels + c;
    for (int64_t q = 0; q < t.q; ++q, dz += t.channels, origin += t.stride_w * t.channels) {
      if constexpr (kSlides) {
        if (t.shift > 0 && q == t.slide_begin && row_mask == kAll) {
          constexpr int kRows = NT / kRow;
          const T* x[kRows];
          for (int r = 0; r < kRows; ++r) x[r] = t.x + (origin + offsets[r * kRow]);
          const int64_t tap = offsets[1] - offsets[0], count = t.slide_end - q;
          if (t.shift == 1)
            grouped_wgrad_slide<T, kRows, kRow, 1, V, FULL>(dz, x, tap, t.channels, count, n, acc);
          else
            grouped_wgrad_slide<T, kRows, kRow, 2, V, FULL>(dz, x, tap, t.channels, count, n, acc);
          q += count, dz += count * t.channels, origin += count * t.stride_w * t.channels;
          if (q == t.q) break;
        }
      }
      const uint32_t mask = row_mask & t.column_mask[q];
      f32v g[V];
      for (int v = 0; v < V; ++v) g[v] = load(dz + v * kLanes, FULL, n - v * kLanes);
      const auto add = [&](int i) __attribute__((always_inline)) {
        const T* from = t.x + (origin + offsets[i]);
        for (int v = 0; v < V; ++v) {
          const f32v x = load(from + v * kLanes, FULL, n - v * kLanes);
#pragma GCC unroll 16
          for (int j = 0; j < G; ++j) acc[i * G + j][v] += g[v] * of_group<G>(x, j);
        }
      };
      if (mask == kAll) {
#pragma GCC unroll 9
        for (int i = 0; i < NT; ++i) add(i);
      } else {
#pragma GCC unroll 9
        for (int i = 0; i < NT; ++i)
          if (mask >> i & 1) add(i);
      }
    }
  }
  for (int i = 0; i < NT * G; ++i)
    for (int v = 0; v < V; ++v) {
      float* to = sums + i * kTileCols + v * kLanes;
      Vec<float>::store(to, Vec<float>::load(to) + acc[i][v]);
    }
}

// n of kTileCols channels from c, kSide vectors at a time.
template <class T, int G, int NT, int kSide>
void grouped_wgrad_side(const GroupedWgradTask<T>& t, int64_t row0, int64_t row1, int64_t c, int n, float* sums) {
  for (int v = 0; v < kTileVecs && n > v * kLanes; v += kSide) {
    const int left = n - v * kLanes;
    for (int u = 0; u < kSide && left < kSide * kLanes && left > u * kLanes; ++u) {  // not all of them
      if (left >= (u + 1) * kLanes) {
        grouped_wgrad_vectors<T, G, NT, 1, true>(t, row0, row1, c + (v + u) * kLanes, left - u * kLanes,
                                                 sums + (v + u) * kLanes);
      } else {
        grouped_wgrad_vectors<T, G, NT, 1, false>(t, row0, row1, c + (v + u) * kLanes, left - u * kLanes,
                                                  sums + (v + u) * kLanes);
      }
    }
    if (left >= kSide * kLanes)
      grouped_wgrad_vectors<T, G, NT, kSide, true>(t, row0, row1, c + v * kLanes, left, sums + v * kLanes);
  }
}

// AVX2 has half the registers: one vector at a time, as 16 sums of a tap have, and nine taps that slide.
template <class T, int G, int NT>
void grouped_wgrad_taps(const GroupedWgradTask<T>& t, int64_t row0, int64_t row1, int64_t c, int n, float* sums) {
  constexpr int kSide = FASTCONV_VEC_BYTES == 64 && G < 16 ? kTileVecs : 1;
  if (kSide > 1 && t.shift > 0 && !slides<NT>(kSide)) return grouped_wgrad_side<T, G, NT, 1>(t, row0, row1, c, n, sums);
  grouped_wgrad_side<T, G, NT, kSide>(t, row0, row1, c, n, sums);
}

// At most grouped_taps(G) taps.
template <class T, int G>
void grouped_wgrad(const GroupedWgradTask<T>& t, int64_t taps, int64_t row0, int64_t row1, int64_t c, int n,
                   float* sums) {
  constexpr int kMost = grouped_taps(G);
#define FASTCONV_TAPS(NT) \
  if (NT <= kMost && taps == NT) return grouped_wgrad_taps<T, G, NT <= kMost ? NT : 1>(t, row0, row1, c, n, sums);
  FASTCONV_TAPS(1)
  FASTCONV_TAPS(2)
  FASTCONV_TAPS(3)
  FASTCONV_TAPS(4)
  FASTCONV_TAPS(5)
  FASTCONV_TAPS(6)
  FASTCONV_TAPS(7)
  FASTCONV_TAPS(8)
  FASTCONV_TAPS(9)
#undef FASTCONV_TAPS
}

// dw[channel][taps][group] of n channels, at the taps of the list, from `parts` sums [tap][j][kTileCols] that are added
// in order.
template <class D>
void grouped_wgrad_put(const float* sums, int64_t parts, int64_t part, const int64_t* list, int64_t count, int64_t taps,
                       int group, int n, D* dw) {
  for (int64_t k = 0; k < count * group; ++k) {
    D lanes[kTileCols];
    for (int v = 0; v < kTileCols; v += kLanes) {
      f32v sum = Vec<float>::load(sums + k * kTileCols + v);
      for (int64_t i = 1; i < parts; ++i) sum += Vec<float>::load(sums + i * part + k * kTileCols + v);
      Vec<D>::store(lanes + v, sum);
    }
    for (int i = 0; i < n; ++i) dw[(i * taps + list[k / group]) * group + k % group] = lanes[i];
  }
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
