// Max pooling, NHWC.   y[n,p,q,c] = max over (r,s) of x[n, p*stride - pad + r*dil, q*stride - pad + s*dil, c], inside
// the input only.
//
// offsets[n,p,q,c] = r * S + s of the maximum (uint8): an eighth of PyTorch's int64 indices. First maximum wins; a NaN
// beats everything and a later NaN beats an earlier one, as in PyTorch. Backward: dx[n,h,w,c] = sum of dy over the
// windows whose offset points here: a gather per input position, so no atomics and a fixed order of summation.
// Accumulation: fp32 (fp64 for double). Bytes: forward x in (windows overlap in L1), y and offsets out; backward dy and
// offsets in, dx out, each once from memory.

namespace fastconv::cpu::FASTCONV_ISA_NS {

// Vectors of channels side by side, forward: half the time of one after the other (one thread of a Zen 3; backward no
// difference).
constexpr int kPoolSide = 4;

// The taps of a window that lie inside the input.
struct PoolWindow {
  int64_t r0, r1, s0, s1;
};

// One output position's maxima of VECTORS vectors of channels side by side: x at the window's first tap, inside or not.
template <class T, bool OFFSETS, int VECTORS>
FASTCONV_INLINE void max_pool2d_maxima(const T* x, T* y, uint8_t* offsets, const PoolParams& a, const PoolWindow& in,
                                       bool full, int rest) {
  using A = acc_t<T>;
  using V = typename Vec<T>::V;
  using L = Lanes<A>;
  using Mask = typename L::Mask;
  constexpr int N = Vec<T>::N;
  const bool any = in.r0 < in.r1 && in.s0 < in.s1;
  V best[VECTORS];
  Mask where[VECTORS];
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    best[v] = broadcast<A>(-(A)__builtin_inf());
    where[v] = Mask{} + (typename L::Int)(any ? in.r0 * a.s + in.s0 : 0);
  }
  for (int64_t r = in.r0; r < in.r1; ++r) {
    const T* from = x + (r * a.dil_h * a.w + in.s0 * a.dil_w) * a.c;
    for (int64_t s = in.s0; s < in.s1; ++s, from += a.dil_w * a.c) {
      const Mask tap = Mask{} + (typename L::Int)(r * a.s + s);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) {
        const V value = load(from + v * N, full, rest);
        const Mask take = (value > best[v]) | (value != value);
        best[v] = take ? value : best[v];
        if (OFFSETS) where[v] = take ? tap : where[v];
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) {
    store(y + v * N, best[v], full, rest);
    if (OFFSETS) store_bytes<A>(offsets + v * N, narrow_bytes(where[v]), full, rest);
  }
}

template <class T, bool OFFSETS>
FASTCONV_INLINE void max_pool2d_positions(const T* x, T* y, uint8_t* offsets, const PoolParams& a, int64_t begin,
                                          int64_t end, int64_t c0, int64_t c1) {
  constexpr int N = Vec<T>::N;
  int64_t q = begin % a.q, p = begin / a.q % a.p, n = begin / (a.q * a.p);
  for (int64_t o = begin; o < end; ++o, next_position(n, p, a.p, q, a.q)) {
    const int64_t h0 = p * a.stride_h - a.pad_h, w0 = q * a.stride_w - a.pad_w;
    PoolWindow in{0, a.r, 0, a.s};
    while (in.r0 < in.r1 && h0 + in.r0 * a.dil_h < 0) ++in.r0;
    while (in.r1 > in.r0 && h0 + (in.r1 - 1) * a.dil_h >= a.h) --in.r1;
    while (in.s0 < in.s1 && w0 + in.s0 * a.dil_w < 0) ++in.s0;
    while (in.s1 > in.s0 && w0 + (in.s1 - 1) * a.dil_w >= a.w) --in.s1;
    const int64_t first = ((n * a.h + h0) * a.w + w0) * a.c;
    const auto taps = [&](int64_t c) { return OFFSETS ? offsets + o * a.c + c : nullptr; };
    int64_t c = c0;
    for (; c + kPoolSide * N <= c1; c += kPoolSide * N)
      max_pool2d_maxima<T, OFFSETS, kPoolSide>(x + first + c, y + o * a.c + c, taps(c), a, in, true, N);
    for (; c < c1; c += N)
      max_pool2d_maxima<T, OFFSETS, 1>(x + first + c, y + o * a.c + c, taps(c), a, in, c + N <= c1, (int)(c1 - c));
  }
}

// Output positions [begin, end) of n*p*q, channels [c0, c1); offsets may be null.
template <class T>
void max_pool2d(const T* x, T* y, uint8_t* offsets, const PoolParams* params, int64_t begin, int64_t end, int64_t c0,
                int64_t c1) {
  const PoolParams a = *params;  // a copy: stores to y could otherwise change it, and it would be read again each time
  if (offsets) {
    max_pool2d_positions<T, true>(x, y, offsets, a, begin, end, c0, c1);
  } else {
    max_pool2d_positions<T, false>(x, y, nullptr, a, begin, end, c0, c1);
  }
}

// One input position's gradient from the windows that cover it: tap[k] = r * S + s of the position in window k,
// window[k] where the window's output starts. COUNT: their number, known ahead, or 0: `count`.
template <class T, int COUNT>
FASTCONV_INLINE void max_pool2d_gather(const T* dy, const uint8_t* offsets, T* dx, const int32_t* tap,
                                       const int64_t* window, int count, int64_t c0, int64_t c1) {
  using V = typename Vec<T>::V;
  using L = Lanes<acc_t<T>>;
  using Mask = typename L::Mask;
  constexpr int N = Vec<T>::N;
  const int windows = COUNT > 0 ? COUNT : count;
  for (int64_t c = c0; c < c1; c += N) {
    const bool full = c + N <= c1;
    const int rest = (int)(c1 - c);
    V sum{};
    for (int k = 0; k < windows; ++k) {
      const typename L::Bytes b = load_bytes<acc_t<T>>(offsets + window[k] + c, full, rest);
      const Mask mine = widen_bytes(b) == (Mask{} + (typename L::Int)tap[k]);
      sum += mine ? load(dy + window[k] + c, full, rest) : V{};
    }
    store(dx + c, sum, full, rest);
  }
}

// Input positions [begin, end) of n*h*w, channels [c0, c1).
template <class T>
void max_pool2d_backward(const T* dy, const uint8_t* offsets, T* dx, const PoolParams* params, const PoolTaps* rows,
                         const PoolTaps* columns, int64_t begin, int64_t end, int64_t c0, int64_t c1) {
  const PoolParams a = *params;
  const PoolTaps in_h = *rows, in_w = *columns;
  int32_t tap[256];  // at most the window's area, at most 256
  int64_t window[256];
  int64_t w = begin % a.w, h = begin / a.w % a.h, n = begin / (a.w * a.h);
  for (int64_t i = begin; i < end; ++i, next_position(n, h, a.h, w, a.w)) {
    int count = 0;
    for (int64_t j = in_h.first[h]; j < in_h.first[h + 1]; ++j) {
      const int64_t row = (n * a.p + in_h.window[j]) * a.q;
      const int64_t row_tap = in_h.tap[j] * a.s;
      for (int64_t k = in_w.first[w]; k < in_w.first[w + 1]; ++k) {
        tap[count] = (int32_t)(row_tap + in_w.tap[k]);
        window[count++] = (row + in_w.window[k]) * a.c;
      }
    }
    T* to = dx + i * a.c;
    switch (count) {  // a loop of known length: 2x2 windows take a third less, 3x3 with a stride of 2 a tenth
      case 1:
        max_pool2d_gather<T, 1>(dy, offsets, to, tap, window, count, c0, c1);
        break;
      case 2:
        max_pool2d_gather<T, 2>(dy, offsets, to, tap, window, count, c0, c1);
        break;
      case 4:
        max_pool2d_gather<T, 4>(dy, offsets, to, tap, window, count, c0, c1);
        break;
      default:
        max_pool2d_gather<T, 0>(dy, offsets, to, tap, window, count, c0, c1);
    }
  }
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
