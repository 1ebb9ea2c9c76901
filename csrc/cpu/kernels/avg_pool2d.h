// Average pooling, NHWC, fixed windows and adaptive ones alike.
//
//   y[n,p,q,c] = sum over h in [h_begin[p], h_end[p]), w in [w_begin[q], w_end[q]) of x[n,h,w,c] / (h_count[p] *
//   w_count[q]) dx[n,h,w,c] = sum over the windows (p,q) that hold (h,w) of dy[n,p,q,c] / (h_count[p] * w_count[q])
//
// The host turns kernel size, stride, padding, ceil_mode, count_include_pad and divisor_override, or the adaptive rule,
// into these tables. Begins and ends grow with p, so the windows over one position are neighbours: [p_begin[h],
// p_end[h]) x [q_begin[w], q_end[w]). An empty window gives 0. Accumulation: fp32 (fp64 for double), fixed order;
// backward gathers, so no atomics. Bytes: x in and y out, once each from memory.

namespace fastconv::cpu::FASTCONV_ISA_NS {

// Output positions [begin, end), channels [c0, c1).
template <class T>
void avg_pool2d(const T* x, T* y, const PoolWindows* windows, int64_t begin, int64_t end, int64_t c0, int64_t c1) {
  using A = acc_t<T>;
  using V = typename Vec<T>::V;
  constexpr int N = Vec<T>::N;
  const PoolWindows& a = *windows;
  for (int64_t o = begin; o < end; ++o) {
    const int64_t q = o % a.q, p = o / a.q % a.p, n = o / (a.q * a.p);
    const int64_t h0 = a.h_begin[p], h1 = a.h_end[p], w0 = a.w_begin[q], w1 = a.w_end[q];
    const bool empty = h0 >= h1 || w0 >= w1;
    const A divisor = empty ? A(1) : A(a.h_count[p] * a.w_count[q]);
    for (int64_t c = c0; c < c1; c += N) {
      const bool full = c + N <= c1;
      const int rest = (int)(c1 - c);
      V sum{};
      for (int64_t h = h0; h < h1; ++h) {
        const T* row = x + (n * a.h + h) * a.w * a.c + c;
        for (int64_t w = w0; w < w1; ++w) sum += load(row + w * a.c, full, rest);
      }
      store(y + o * a.c + c, sum / divisor, full, rest);
    }
  }
}

// Input positions [begin, end), channels [c0, c1).
template <class T>
void avg_pool2d_backward(const T* dy, T* dx, const PoolWindows* windows, int64_t begin, int64_t end, int64_t c0,
                         int64_t c1) {
  using A = acc_t<T>;
  using V = typename Vec<T>::V;
  constexpr int N = Vec<T>::N;
  const PoolWindows& a = *windows;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t w = i % a.w, h = i / a.w % a.h, n = i / (a.w * a.h);
    for (int64_t c = c0; c < c1; c += N) {
      const bool full = c + N <= c1;
      const int rest = (int)(c1 - c);
      V sum{};
      for (int64_t p = a.p_begin[h]; p < a.p_end[h]; ++p) {
        const T* row = dy + (n * a.p + p) * a.q * a.c + c;
        for (int64_t q = a.q_begin[w]; q < a.q_end[w]; ++q) {
          sum += load(row + q * a.c, full, rest) / A(a.h_count[p] * a.w_count[q]);
        }
      }
      store(dx + i * a.c + c, sum, full, rest);
    }
  }
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
