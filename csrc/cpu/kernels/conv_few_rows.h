// Gradients of a convolution on a few rows, from the weights where they lie, and the optimizer's step on them:
//   dx[i, c] = sum over taps and k of dz[o, k] * w[k, tap, c],   dw[k, tap, c] = sum over the tap's pairs of dz[o, k] *
//   x[i, c],
// a tap's pairs being the rows (o, i) of output and input that it joins, at most kFewRows. Then w is stepped by dw.
//
// Each weight meets a handful of rows, so what a step costs is the memory traffic of the weights and their state: this
// reads each once, for both gradients and the step, and writes it once; no gradient goes to memory. Lanes are channels
// c. kFewFilters filters at a time run along a block of columns, whose x and dx stay in L1, [columns of a
// vector][pairs], while all of the part's filters pass; the filters kFewAhead further on are asked for. dx takes the
// sum over kFewFilters filters at a time, which also shortens the chains of additions. bf16: products of bf16 values,
// exact in fp32; weights W = float are rounded as they are read.
//
// Threads own parts, filters side by side, whose dx are added up at the end: parts do not depend on the number of
// threads. Cut by columns there would be nothing to add, but processes then fell into a state where 175 us became 700
// (1024 -> 256, 16 rows, bf16): suspected are prefetchers that run over the end of a row into lines that the other core
// writes. FLOPs: 4 * pairs * K * C. Bytes: w, m (and v) once in and out; half once out.
//
// Measured, 2 cores of a Zen 4, weights and momentum from memory, us, data gradient and then update : here, fp32 and
// bf16: 1024 -> 256 with 16 rows 243 : 153 and 168 : 148; 3x3x256 on 2x2, batch 4 371 : 238 and 345 : 265; 2048 -> 512
// with 4 rows 561 : 358 and 588 : 433. bf16 without pairs (widened, as for AVX2) 179 with 16 rows. 8 filters at a time
// lose a tenth. A tile of 8 filters that walks down the weight instead (16 rows: 231 fp32) loads and stores at one
// offset of all pages.

namespace fastconv::cpu::FASTCONV_ISA_NS {

// No step: the data gradient alone.
struct NoRule {
  static constexpr bool kUpdates = false;
  FASTCONV_INLINE void operator()(int64_t, f32v, f32v, bool, int) const {}
  FASTCONV_INLINE void ahead(int64_t) const {}
};

// With a dot product of bf16 pairs, a unit is two rows (dw) or two filters (dx); else bf16 is widened.
#ifdef FASTCONV_DPBF16
template <class T>
constexpr bool kPaired = sizeof(T) == 2;
#else
template <class T>
constexpr bool kPaired = false;
#endif

FASTCONV_INLINE float one_float(float x) { return x; }
FASTCONV_INLINE float one_float(bf16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}

// Filters a and b (or rows), rounded to bf16 and interleaved as pairs; zip_units() of registers.
FASTCONV_INLINE u32v zip_filters(f32v a, f32v b) {
#ifdef FASTCONV_DPBF16
  typedef uint16_t u16w __attribute__((vector_size(FASTCONV_VEC_BYTES)));
  u16w order;
  for (int i = 0; i < 2 * kLanes; ++i) order[i] = (uint16_t)(i / 2 + (i % 2) * kLanes);
  return (u32v)_mm512_permutexvar_epi16((__m512i)order, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
#else
  return ((u32v)rounded(bf16{}, a) >> 16) | (u32v)rounded(bf16{}, b);
#endif
}

// What kFewFilters filters meet, and what is asked for: `ahead` elements further on.
template <class T, class W, int R>
struct FewRowsRun {
  static constexpr int kUnits = kPaired<T> ? R / 2 : R;  // of a filter and of x
  const W* weight;
  int64_t filter, at, vectors, ahead;  // elements from one filter to the next, to the first; vectors of columns
  const uint32_t *rows, *filters;      // dz for dw [kFewFilters][kUnits] and for dx: pairs [kFewFilters / 2][R]
  const u32v* x;                       // [vectors][kUnits]
  f32v* dx;                            // [vectors][R]
};

template <class T, class W, class Rule, int R>
__attribute__((noinline)) void few_rows_run(const FewRowsRun<T, W, R>& t, const Rule& rule_) {
  constexpr int U = FewRowsRun<T, W, R>::kUnits;
  const Rule rule = rule_;  // in registers: a store could otherwise change it
  const int64_t filter = t.filter, ahead = t.ahead, end = t.at + t.vectors * kLanes;
  const W* const weight = t.weight;
  const uint32_t *const rows = t.rows, *const filters = t.filters;
  const u32v* x = t.x;
  f32v* dx = t.dx;
  const auto dz = [](const uint32_t* p) { return u32v{} + *p; };
  for (int64_t at = t.at; at < end; at += kLanes, x += U, dx += R) {
    f32v w[kFewFilters], d[kFewFilters];
#pragma GCC unroll 4
    for (int f = 0; f < kFewFilters; ++f) {
      const int64_t k = at + f * filter;
      __builtin_prefetch(weight + k + ahead, 0, 2);
      rule.ahead(k + ahead);
      w[f] = Vec<W>::load(weight + k);
      d[f] = f32v{};
    }
    if constexpr (kPaired<T>) {
      u32v two[kFewFilters / 2];
      for (int h = 0; h < kFewFilters / 2; ++h) two[h] = zip_filters(w[2 * h], w[2 * h + 1]);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        f32v sum{};
        for (int h = 0; h < kFewFilters / 2; ++h) sum = dot(T{}, sum, dz(filters + h * R + r), two[h]);
        dx[r] += sum;
      }
#pragma GCC unroll 16
      for (int r = 0; r < (Rule::kUpdates ? U : 0); ++r)
        for (int f = 0; f < kFewFilters; ++f) d[f] = dot(T{}, d[f], dz(rows + f * U + r), x[r]);
    } else {
      f32v used[kFewFilters];
      for (int f = 0; f < kFewFilters; ++f) used[f] = sizeof(W) > sizeof(T) ? rounded(bf16{}, w[f]) : w[f];
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        f32v sum{};
        for (int f = 0; f < kFewFilters; ++f) {
          const f32v g = (f32v)dz(rows + f * U + r);
          sum = f == 0 ? g * used[0] : sum + g * used[f];
          if (Rule::kUpdates) d[f] += g * (f32v)x[r];
        }
        dx[r] += sum;
      }
    }
    if constexpr (Rule::kUpdates) {
#pragma GCC unroll 4
      for (int f = 0; f < kFewFilters; ++f) rule(at + f * filter, w[f], d[f], true, kLanes);
    }
  }
}

// dz of one tap and the filters [k0, k1) as few_rows_run() takes it.
template <class T, class W, int R>
inline void place_dz(const FewRowsTask<T, W>& t, const FewRowsTap& tap, int64_t k0, int64_t k1, uint32_t* rows,
                     uint32_t* filters) {
  const auto pair = [](T low, T high) {
    uint32_t unit;
    const T both[2] = {low, high};
    __builtin_memcpy(&unit, both, 4);
    return unit;
  };
  const T* from[R];
  for (int r = 0; r < R; ++r) from[r] = r < tap.pairs ? t.dz + tap.z[r] * t.filters : nullptr;
  for (int r = 0; r < R; r += kPaired<T> ? 2 : 1) {
    for (int64_t k = k0; k < k1; k += 2) {  // kFewFilters is even
      T e[2][2] = {};                       // [row][filter]
      for (int i = 0; i < (kPaired<T> ? 2 : 1); ++i)
        if (from[r + i]) e[i][0] = from[r + i][k], e[i][1] = from[r + i][k + 1];
      for (int f = 0; f < 2; ++f) {
        if constexpr (kPaired<T>) {
          rows[(k - k0 + f) * (R / 2) + r / 2] = pair(e[0][f], e[1][f]);
          filters[(k - k0) / 2 * R + r + f] = pair(e[f][0], e[f][1]);
        } else {
          const float x = one_float(e[0][f]);
          __builtin_memcpy(rows + (k - k0 + f) * R + r, &x, 4);
        }
      }
    }
  }
}

// x of one tap as few_rows_run() takes it.
template <class T, class W>
inline void place_x(const FewRowsTask<T, W>& t, const FewRowsTap& tap, u32v* x) {
  const int64_t vectors = t.columns / kLanes;
  const auto row = [&](int r) { return r < tap.pairs ? t.x + tap.x[r] * t.columns : nullptr; };
  const auto load = [](const T* p, int64_t v) { return p ? Vec<T>::load(p + v * kLanes) : f32v{}; };
  constexpr int E = kPaired<T> ? 2 : 1;
  for (int u = 0; u < tap.padded / E; ++u) {
    const T *low = row(u * E), *high = row(u * E + E - 1);
    for (int64_t v = 0; v < vectors; ++v)
      x[v * (tap.padded / E) + u] = kPaired<T> ? zip_filters(load(low, v), load(high, v)) : (u32v)load(low, v);
  }
}

// One tap of one part: x [vectors][units] of all columns, dx [vectors][R] of the part, zero before.
template <class T, class W, class Rule, int R>
inline void few_rows_tap(const FewRowsTask<T, W>& t, const Rule& rule, const FewRowsTap& tap, int64_t k0, int64_t k1,
                         const u32v* x, f32v* dx) {
  using Run = FewRowsRun<T, W, R>;
  uint32_t *const rows = t.dz_pairs, *const filters = rows + (k1 - k0) * Run::kUnits;
  place_dz<T, W, R>(t, tap, k0, k1, rows, filters);
  constexpr int64_t kBlock = kFewBlock / R;  // vectors
  const int64_t all = t.columns / kLanes;
  for (int64_t v = 0; v < all; v += kBlock) {
    const int64_t vectors = all - v < kBlock ? all - v : kBlock;
    for (int64_t k = k0; k < k1; k += kFewFilters) {
      // The part's own lines alone: behind its last filters come the first ones of the next columns.
      int64_t ahead = kFewAhead * t.filter;
      if (k + kFewAhead >= k1)
        ahead =
            v + vectors < all && k + kFewAhead - k1 < k1 - k0 ? (kFewAhead + k0 - k1) * t.filter + vectors * kLanes : 0;
      const Run run{t.weight,
                    t.filter,
                    k * t.filter + tap.offset + v * kLanes,
                    vectors,
                    ahead,
                    rows + (k - k0) * Run::kUnits,
                    filters + (k - k0) / 2 * R,
                    x + v * Run::kUnits,
                    dx + v * R};
      few_rows_run<T, W, Rule, R>(run, rule);
    }
  }
}

// Parts [part_begin, part_end).
template <class T, class W, class Rule>
void few_rows_parts(const FewRowsTask<T, W>& t, const Rule& rule) {
  const int64_t vectors = t.columns / kLanes;
  const auto x_of = [&](const FewRowsTap& tap) {
    return (u32v*)t.x_pairs + tap.first * vectors / (kPaired<T> ? 2 : 1);
  };
  for (int64_t i = 0; i < t.n_taps && t.x; ++i) place_x(t, t.taps[i], x_of(t.taps[i]));
  for (int64_t part = t.part_begin; part < t.part_end; ++part) {
    const int64_t groups = t.filters / kFewFilters;
    const int64_t k0 = groups * part / t.parts * kFewFilters, k1 = groups * (part + 1) / t.parts * kFewFilters;
    f32v* dx = (f32v*)t.dx_pairs + part * t.pairs * vectors;
    __builtin_memset(dx, 0, t.pairs * vectors * sizeof(f32v));
    for (int64_t i = 0; i < t.n_taps; ++i) {
      const FewRowsTap& tap = t.taps[i];
      const auto run = [&](auto height) {
        few_rows_tap<T, W, Rule, decltype(height)::rows>(t, rule, tap, k0, k1, x_of(tap), dx + tap.first * vectors);
      };
      if (tap.padded == 4)
        run(TileHeight<4>{});
      else if (tap.padded == 8)
        run(TileHeight<8>{});
      else
        run(TileHeight<kFewRows>{});
    }
  }
}

// dx of columns [panel_begin, panel_end) from the parts'.
template <class T, class W>
void few_rows_join(const FewRowsTask<T, W>& t) {
  const int64_t vectors = t.columns / kLanes;
  f32v* const sums = (f32v*)t.sums;
  for (int64_t j = t.panel_begin; j < t.panel_end; ++j) {
    __builtin_memset(sums, 0, t.rows * kTileVecs * sizeof(f32v));
    for (int64_t part = 0; part < t.parts; ++part)
      for (int64_t i = 0; i < t.n_taps; ++i) {
        const FewRowsTap& tap = t.taps[i];
        const f32v* dx = (const f32v*)t.dx_pairs + (part * t.pairs + tap.first) * vectors + j * kTileVecs * tap.padded;
        for (int r = 0; r < tap.pairs; ++r)
          for (int h = 0; h < kTileVecs; ++h) sums[tap.x[r] * kTileVecs + h] += dx[h * tap.padded + r];
      }
    finish(t.epilogue, t.at, j * kTileCols, sums, (int)t.rows, kTileCols);
  }
}

template <class T, class W>
void few_rows_input_grad(const FewRowsTask<T, W>& t) {
  few_rows_parts<T, W>(t, NoRule{});
}

// t.weight: s.w, whatever T. Its lines lie in the cache of the core that writes them, which has read them, here and
// where conv_rows_dots.h shares filters out in the same way: plain stores are 10% faster. A bf16 copy is written past
// it.
template <class T>
void few_rows_step(const FewRowsTask<T, float>& t, const WeightStep& step) {
  WeightStep s = step;
  if (s.half == nullptr) s.sgd.large = s.averages.large = false;
  with_rule(s, 0, s.n, [&](const auto& rule) {
    few_rows_parts<T, float>(t, rule);
    rule.to.finish();
  });
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
