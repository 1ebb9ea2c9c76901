// Max pooling, NHWC.   y[n,p,q,c] = max over (r,s) of x[n, p*stride - pad + r*dil, q*stride - pad + s*dil, c], inside
// the input only.
//
// offsets[n,p,q,c] = r * S + s of the maximum (uint8): an eighth of PyTorch's int64 indices. First maximum wins; a NaN
// beats everything and a later NaN beats an earlier one, as in PyTorch. Backward: dx[n,h,w,c] = sum of dy over the
// windows whose offset points here: a gather per input position, so no atomics and a fixed order of summation.
// Accumulation: fp32 (fp64 for double). Bytes: forward x in (windows overlap in L1), y and offsets out; backward dy and
// offsets in, dx out, each once from memory.

namespace fastconv::cpu::FASTCONV_ISA_NS {

// Output positions [begin, end) of n*p*q, channels [c0, c1); offsets may be null.
template <class T>
void max_pool2d(const T* x, T* y, uint8_t* offsets, const PoolParams* params, int64_t begin, int64_t end, int64_t c0,
                int64_t c1) {
  using A = acc_t<T>;
  using V = typename Vec<T>::V;
  using L = Lanes<A>;
  using Mask = typename L::Mask;
  constexpr int N = Vec<T>::N;
  const PoolParams a = *params;  // a copy: stores to y could otherwise change it, and it would be read again each time
  const V lowest = broadcast<A>(-(A)__builtin_inf());
  int64_t q = begin % a.q, p = begin / a.q % a.p, n = begin / (a.q * a.p);
  for (int64_t o = begin; o < end; ++o, next_position(n, p, a.p, q, a.q)) {
    const int64_t h0 = p * a.stride_h - a.pad_h, w0 = q * a.stride_w - a.pad_w;
    int64_t r0 = 0, r1 = a.r, s0 = 0, s1 = a.s;  // taps inside the input
    while (r0 < r1 && h0 + r0 * a.dil_h < 0) ++r0;
    while (r1 > r0 && h0 + (r1 - 1) * a.dil_h >= a.h) --r1;
    while (s0 < s1 && w0 + s0 * a.dil_w < 0) ++s0;
    while (s1 > s0 && w0 + (s1 - 1) * a.dil_w >= a.w) --s1;
    for (int64_t c = c0; c < c1; c += N) {
      const bool full = c + N <= c1;
      const int rest = (int)(c1 - c);
      V best = lowest;
      Mask where = Mask{} + (typename L::Int)(r0 < r1 && s0 < s1 ? r0 * a.s + s0 : 0);
      for (int64_t r = r0; r < r1; ++r) {
        const T* row = x + ((n * a.h + h0 + r * a.dil_h) * a.w + w0) * a.c + c;
        for (int64_t s = s0; s < s1; ++s) {
          const V v = load(row + s * a.dil_w * a.c, full, rest);
          const Mask take = (v > best) | (v != v);
          best = take ? v : best;
          if (offsets) where = take ? (Mask{} + (typename L::Int)(r * a.s + s)) : where;
        }
      }
      store(y + o * a.c + c, best, full, rest);
      if (offsets) store_bytes<A>(offsets + o * a.c + c, narrow_bytes(where), full, rest);
    }
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
