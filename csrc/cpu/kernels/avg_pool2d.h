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

// x / divisor; a power of two is multiplied by its inverse, which is the same number and ten times as fast.
template <class A, class V>
FASTCONV_INLINE V divide(V x, int64_t divisor) {
  return (divisor & (divisor - 1)) == 0 ? x * (A(1) / A(divisor)) : x / A(divisor);
}

// The sum of a window's rows x columns pixels, G vectors of channels side by side: a pixel is read in pieces of at
// least 256 bytes where it has them, which the prefetcher follows (7x7x2048 fp32: twice as fast as one vector at a
// time).
template <class T, int G>
FASTCONV_INLINE void window_sum(const T* first, int64_t row_step, int64_t pixel_step, int64_t rows, int64_t columns,
                                typename Vec<T>::V* sum, bool full, int rest) {
  for (int g = 0; g < G; ++g) sum[g] = typename Vec<T>::V{};
  for (int64_t h = 0; h < rows; ++h) {
    const T* from = first + h * row_step;
    for (int64_t w = 0; w < columns; ++w, from += pixel_step) {
      for (int g = 0; g < G; ++g) sum[g] += load(from + g * Vec<T>::N, full, rest);
    }
  }
}

// Output positions [begin, end), channels [c0, c1).
template <class T>
void avg_pool2d(const T* x, T* y, const PoolWindows* windows, int64_t begin, int64_t end, int64_t c0, int64_t c1) {
  using V = typename Vec<T>::V;
  constexpr int N = Vec<T>::N;
  const PoolWindows a =
      *windows;  // a copy: stores to y could otherwise change it, and it would be read again each time
  int64_t q = begin % a.q, p = begin / a.q % a.p, n = begin / (a.q * a.p);
  for (int64_t o = begin; o < end; ++o, next_position(n, p, a.p, q, a.q)) {
    const int64_t h0 = a.h_begin[p], w0 = a.w_begin[q];
    const int64_t rows = a.h_end[p] - h0, columns = a.w_end[q] - w0;
    const bool empty = rows <= 0 || columns <= 0;
    const int64_t divisor = empty ? 1 : a.h_count[p] * a.w_count[q];
    const T* first = x + ((n * a.h + h0) * a.w + w0) * a.c;
    T* out = y + o * a.c;
    int64_t c = c0;
    for (; c + 4 * N <= c1; c += 4 * N) {
      V sum[4];
      window_sum<T, 4>(first + c, a.w * a.c, a.c, rows, columns, sum, true, 0);
      for (int g = 0; g < 4; ++g) store(out + c + g * N, divide<acc_t<T>>(sum[g], divisor), true, 0);
    }
    for (; c < c1; c += N) {
      const bool full = c + N <= c1;
      const int rest = (int)(c1 - c);
      V sum;
      window_sum<T, 1>(first + c, a.w * a.c, a.c, rows, columns, &sum, full, rest);
      store(out + c, divide<acc_t<T>>(sum, divisor), full, rest);
    }
  }
}

// Input positions [begin, end), channels [c0, c1).
template <class T>
void avg_pool2d_backward(const T* dy, T* dx, const PoolWindows* windows, int64_t begin, int64_t end, int64_t c0,
                         int64_t c1) {
  using V = typename Vec<T>::V;
  constexpr int N = Vec<T>::N;
  const PoolWindows a = *windows;
  int64_t w = begin % a.w, h = begin / a.w % a.h, n = begin / (a.w * a.h);
  for (int64_t i = begin; i < end; ++i, next_position(n, h, a.h, w, a.w)) {
    const int64_t p0 = a.p_begin[h], p1 = a.p_end[h], q0 = a.q_begin[w], q1 = a.q_end[w];
    const T* first = dy + ((n * a.p + p0) * a.q + q0) * a.c;
    T* out = dx + i * a.c;
    if (p1 - p0 == 1 && q1 - q0 == 1) {  // windows side by side: the usual case, a plain copy loop
      const int64_t divisor = a.h_count[p0] * a.w_count[q0];
      for (int64_t c = c0; c < c1; c += N) {
        const bool full = c + N <= c1;
        const int rest = (int)(c1 - c);
        store(out + c, divide<acc_t<T>>(load(first + c, full, rest), divisor), full, rest);
      }
      continue;
    }
    for (int64_t c = c0; c < c1; c += N) {
      const bool full = c + N <= c1;
      const int rest = (int)(c1 - c);
      V sum{};
      for (int64_t p = p0; p < p1; ++p) {
        const T* from = first + (p - p0) * a.q * a.c + c;
        for (int64_t q = q0; q < q1; ++q, from += a.c) {
          sum += divide<acc_t<T>>(load(from, full, rest), a.h_count[p] * a.w_count[q]);
        }
      }
      store(out + c, sum, full, rest);
    }
  }
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
