// Batch norm over the rows of x [rows, channels] (NHWC; rows = N*H*W), with residual and activation:
//
//   mean_c = sum_m x_mc / M     var_c = sum_m (x_mc - mean_c)^2 / M     y = act((x - mean) * invstd * weight + bias +
//   residual)
//
// Forward statistics: 64 rows x a few vectors of channels at a time, so that the second look at x (around the chunk's
// own mean) hits L1: x is read once from memory. Chunks are joined by Chan's formula; nowhere E[x^2] - E[x]^2.
//
// Backward, with dy = g * act'(.) and xhat = (x - mean) * invstd, in training:
//   dbias = sum dy     dweight = sum dy * xhat     dx = weight * invstd * (dy - dbias / M - xhat * dweight / M)
//   dresidual = dy
// (mean and var depend on x: d mean/dx = 1/M and d var/dx = 2 (x - mean) / M; collecting terms gives the two subtracted
// averages). In eval mode dx = weight * invstd * dy. Two passes: sums, with act' applied on the fly and dresidual
// written, then dx.
//
// Accumulation: fp32 (fp64 for double): sums of 64 rows in registers, then per span of rows, then over the spans in
// order, so the result does not depend on the number of threads. Bytes, forward: x twice (from cache where it
// fits), residual once in, y once out. Bytes, backward: g, x and y (or residual, where y is
// not saved) twice in, dx once out, dresidual once out (then g and y once only).

namespace fastconv::cpu::FASTCONV_ISA_NS {

constexpr int64_t kChunkRows = 64;  // 64 rows x 4 vectors of 64 bytes = 16 KB: a third of L1

// Joins (mean_b, m2_b) of count_b rows into (mean, m2) of count rows.
template <class A>
void bn_merge(A* mean, A* m2, int64_t count, const A* mean_b, const A* m2_b, int64_t count_b, int64_t c0, int64_t c1) {
  const A share = A(count_b) / A(count + count_b);
  const A weight = A(count) * share;
  for (int64_t c = c0; c < c1; ++c) {
    const A delta = mean_b[c] - mean[c];
    mean[c] += delta * share;
    m2[c] += m2_b[c] + delta * delta * weight;
  }
}

// Statistics of one chunk in G vectors of channels, joined into mean and m2 (which hold `count` rows so far). All means
// are relative to the pivot: far from zero the rounding of a mean, not that of the spread, would decide the variance.
template <class T, int G>
FASTCONV_INLINE void bn_chunk(const T* x, const T* pivot, int64_t channels, int64_t rows, int64_t count, acc_t<T>* mean,
                              acc_t<T>* m2, bool full, int n) {
  using A = acc_t<T>;
  using V = typename Vec<T>::V;
  constexpr int N = Vec<T>::N;
  V sum[G], square[G], avg[G], p[G];
  for (int j = 0; j < G; ++j) {
    sum[j] = square[j] = V{};
    p[j] = load(pivot + j * N, full, n);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int j = 0; j < G; ++j) sum[j] += load(x + r * channels + j * N, full, n) - p[j];
  }
  for (int j = 0; j < G; ++j) avg[j] = sum[j] / A(rows);
  for (int64_t r = 0; r < rows; ++r) {
    for (int j = 0; j < G; ++j) {
      const V d = load(x + r * channels + j * N, full, n) - p[j] - avg[j];
      square[j] += d * d;
    }
  }
  const A share = A(rows) / A(count + rows);
  const A weight = A(count) * share;
  for (int j = 0; j < G; ++j) {
    if (count == 0) {
      store(mean + j * N, avg[j], full, n);
      store(m2 + j * N, square[j], full, n);
    } else {
      const V old = load(mean + j * N, full, n);
      const V delta = avg[j] - old;
      store(mean + j * N, old + delta * share, full, n);
      store(m2 + j * N, load(m2 + j * N, full, n) + square[j] + delta * delta * weight, full, n);
    }
  }
}

// Statistics of rows [r0, r1) in channels [c0, c1); mean (relative to row 0 of x) and m2 are indexed by channel and
// overwritten.
template <class T>
void bn_stats(const T* x, int64_t channels, int64_t r0, int64_t r1, int64_t c0, int64_t c1, acc_t<T>* mean,
              acc_t<T>* m2) {
  constexpr int N = Vec<T>::N;
  for (int64_t r = r0; r < r1; r += kChunkRows) {
    const int64_t rows = r + kChunkRows < r1 ? kChunkRows : r1 - r;
    const T* row = x + r * channels;
    int64_t c = c0;
    for (; c + 4 * N <= c1; c += 4 * N)
      bn_chunk<T, 4>(row + c, x + c, channels, rows, r - r0, mean + c, m2 + c, true, 0);
    for (; c < c1; c += N) {
      bn_chunk<T, 1>(row + c, x + c, channels, rows, r - r0, mean + c, m2 + c, c + N <= c1, (int)(c1 - c));
    }
  }
}

// The means in x's own coordinates.
template <class T>
void bn_add_pivot(const T* x, acc_t<T>* mean, int64_t c0, int64_t c1) {
  constexpr int N = Vec<T>::N;
  for (int64_t c = c0; c < c1; c += N) {
    const bool full = c + N <= c1;
    const int n = (int)(c1 - c);
    store(mean + c, load(mean + c, full, n) + load(x + c, full, n), full, n);
  }
}

// Where the activation's derivative comes from.
enum GradKind { kGradIdentity, kGradRelu, kGradOutput, kGradRecompute, kGradReluRecompute };

template <class T, int KIND, class V>
FASTCONV_INLINE V bn_dy(const BatchNormGrad<T>& p, int64_t at, int64_t c, V x, V mean, bool full, int n) {
  using A = acc_t<T>;
  const V g = load(p.g + at, full, n);
  if (KIND == kGradIdentity) return g;
  if (KIND == kGradRecompute || KIND == kGradReluRecompute) {
    V pre = (x - mean) * load(p.scale + c, full, n) + load(p.shift + c, full, n);
    if (p.residual) pre += load(p.residual + at, full, n);
    return apply_act_grad<A, KIND == kGradReluRecompute ? kActRelu : kActAny>(g, pre, p.act);
  }
  const V y = load(p.y + at, full, n);
  return apply_act_grad<A, KIND == kGradRelu ? kActRelu : kActAny>(g, y, p.act);
}

template <class T, int KIND, int G>
FASTCONV_INLINE void bn_backward_chunk(const BatchNormGrad<T>& p, int64_t r, int64_t rows, int64_t c, acc_t<T>* sum_dy,
                                       acc_t<T>* sum_dy_xmu, T* dresidual, bool full, int n) {
  using V = typename Vec<T>::V;
  constexpr int N = Vec<T>::N;
  V s[G], sx[G], mean[G];
  for (int j = 0; j < G; ++j) {
    s[j] = sx[j] = V{};
    mean[j] = load(p.mean + c + j * N, full, n);
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int j = 0; j < G; ++j) {
      const int64_t at = (r + i) * p.channels + c + j * N;
      const V x = load(p.x + at, full, n);
      const V dy = bn_dy<T, KIND>(p, at, c + j * N, x, mean[j], full, n);
      if (dresidual) store(dresidual + at, dy, full, n);
      s[j] += dy;
      sx[j] += dy * (x - mean[j]);
    }
  }
  for (int j = 0; j < G; ++j) {
    store(sum_dy + c + j * N, load(sum_dy + c + j * N, full, n) + s[j], full, n);
    store(sum_dy_xmu + c + j * N, load(sum_dy_xmu + c + j * N, full, n) + sx[j], full, n);
  }
}

// sum_dy and sum_dy_xmu (sum of dy * (x - mean)) of rows [r0, r1), indexed by channel, overwritten; dresidual = dy if
// not null.
template <class T, int KIND>
void bn_backward_sums(const BatchNormGrad<T>* params, int64_t r0, int64_t r1, int64_t c0, int64_t c1, acc_t<T>* sum_dy,
                      acc_t<T>* sum_dy_xmu, T* dresidual) {
  constexpr int N = Vec<T>::N;
  const BatchNormGrad<T> p = *params;  // a copy: stores could otherwise change it
  for (int64_t c = c0; c < c1; ++c) sum_dy[c] = sum_dy_xmu[c] = 0;
  for (int64_t r = r0; r < r1; r += kChunkRows) {
    const int64_t rows = r + kChunkRows < r1 ? kChunkRows : r1 - r;
    int64_t c = c0;
    for (; c + 2 * N <= c1; c += 2 * N)
      bn_backward_chunk<T, KIND, 2>(p, r, rows, c, sum_dy, sum_dy_xmu, dresidual, true, 0);
    for (; c < c1; c += N) {
      bn_backward_chunk<T, KIND, 1>(p, r, rows, c, sum_dy, sum_dy_xmu, dresidual, c + N <= c1, (int)(c1 - c));
    }
  }
}

// dx = dy * scale + (x - mean) * slope + offset, with slope = -scale * invstd^2 * sum_dy_xmu / M and offset = -scale *
// sum_dy / M (both 0 in eval mode).
template <class T, int KIND>
void bn_backward_apply(const BatchNormGrad<T>* params, const acc_t<T>* slope, const acc_t<T>* offset, T* dx, int64_t r0,
                       int64_t r1, int64_t c0, int64_t c1) {
  using V = typename Vec<T>::V;
  constexpr int N = Vec<T>::N;
  const BatchNormGrad<T> p = *params;     // a copy: stores could otherwise change it
  for (int64_t r = r0; r < r1; r += 4) {  // four rows share the loads of the channel vectors
    const int rows = r1 - r < 4 ? (int)(r1 - r) : 4;
    for (int64_t c = c0; c < c1; c += N) {
      const bool full = c + N <= c1;
      const int n = (int)(c1 - c);
      const V mean = load(p.mean + c, full, n), scale = load(p.scale + c, full, n);
      const V a = load(slope + c, full, n), b = load(offset + c, full, n);
      for (int i = 0; i < rows; ++i) {
        const int64_t at = (r + i) * p.channels + c;
        const V x = load(p.x + at, full, n);
        const V dy = bn_dy<T, KIND>(p, at, c, x, mean, full, n);
        store(dx + at, dy * scale + ((x - mean) * a + b), full, n);
      }
    }
  }
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
