// Cross-entropy with class indices or probabilities, class weights and label smoothing e.
//
//   logp_j = x_j - lse,  lse = m + log sum_j exp(x_j - m),  m = max_j x_j
//   loss = -sum_j t_j logp_j,  t_j = e/C w_j + (1-e) w_y [j = y]   (class index y)
//                              t_j = w_j ((1-e) p_j + e/C)         (probabilities p)
//   dx_j = g (sum_k t_k exp(x_j - lse) - t_j)      dp_j = g (1-e) w_j (lse - x_j)
//
// The loss is formed as sum_k t_k log s - sum_k t_k (x_k - m), s = sum exp(x_k - m), never through lse: lse = m + log s
// rounds off log s where |m| is large. For the same reason the backward divides by its own sum of exponentials where
// |lse| > 32.
//
// Rows layout [positions, C]: vectors along C, online softmax over blocks of 512 logits (one look at memory, two at
// L1). Columns layout [N, C, D]: vectors along D, so that no transposing copy is needed. Accumulation: fp32 (fp64 for
// double); the sum over positions in fp64 per fixed chunk of positions. Bytes: forward reads x once (again from L1/L2
// for smoothing or probabilities); backward reads x and writes dx once.

namespace fastconv::cpu::FASTCONV_ISA_NS {

FASTCONV_INLINE float scalar_log(float x) { return __builtin_logf(x); }
FASTCONV_INLINE double scalar_log(double x) { return __builtin_log(x); }
FASTCONV_INLINE float scalar_exp(float x) { return __builtin_expf(x); }
FASTCONV_INLINE double scalar_exp(double x) { return __builtin_exp(x); }

template <class T>
FASTCONV_INLINE acc_t<T> scalar_load(const T* p) {
  return Vec<T>::load_n(p, 1)[0];
}

// max and sum of exp(x - max) of c contiguous logits.
template <class T>
FASTCONV_INLINE void row_softmax(const T* x, int64_t c, acc_t<T>* max_out, acc_t<T>* sum_out) {
  using A = acc_t<T>;
  using V = typename Vec<T>::V;
  constexpr int N = Vec<T>::N;
  constexpr int64_t kBlock = 512;
  constexpr int kChains = 4;  // independent ones: each step of a maximum or a sum waits four cycles for the last
  const A lowest = -(A)__builtin_inf();
  A m = lowest, total = 0;
  for (int64_t b = 0; b < c; b += kBlock) {
    const int64_t e = b + kBlock < c ? b + kBlock : c;
    V top[kChains];
    for (int k = 0; k < kChains; ++k) top[k] = broadcast<A>(lowest);
    int64_t j = b;
    for (; j + kChains * N <= e; j += kChains * N) {
      for (int k = 0; k < kChains; ++k) {
        const V v = Vec<T>::load(x + j + k * N);
        top[k] = v > top[k] ? v : top[k];
      }
    }
    for (; j < e; j += N) {
      const int n = (int)(e - j);
      const V v = j + N <= e ? Vec<T>::load(x + j) : keep<A>(Vec<T>::load_n(x + j, n), lowest, n);
      top[0] = v > top[0] ? v : top[0];
    }
    for (int k = 1; k < kChains; ++k) top[0] = top[k] > top[0] ? top[k] : top[0];
    const A block_max = lane_max(top[0]);
    if (block_max > m) {
      if (b > 0) total *= scalar_exp(m - block_max);
      m = block_max;
    }
    // All logits so far -inf: their exponentials count nothing until a finite one comes (a NaN must still show).
    const A base = m == lowest ? A(0) : m;
    V sum[kChains];
    for (int k = 0; k < kChains; ++k) sum[k] = V{};
    for (j = b; j + kChains * N <= e; j += kChains * N) {
      for (int k = 0; k < kChains; ++k) sum[k] += vexp(Vec<T>::load(x + j + k * N) - base);
    }
    for (; j < e; j += N) {
      const int n = (int)(e - j);
      sum[0] += vexp((j + N <= e ? Vec<T>::load(x + j) : keep<A>(Vec<T>::load_n(x + j, n), lowest, n)) - base);
    }
    for (int k = 1; k < kChains; ++k) sum[0] += sum[k];
    total += lane_sum(sum[0]);
  }
  *max_out = m;
  *sum_out = total;
}

// sums[0] += losses of positions [begin, end), sums[1] += weights of the kept targets. Returns the first position whose
// target is no class, or -1.
template <class T>
int64_t cross_entropy_rows(const CrossEntropyArgs<T>* args, const CrossEntropyParams* params, acc_t<T>* loss,
                           acc_t<T>* lse, double* sums, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = typename Vec<T>::V;
  constexpr int N = Vec<T>::N;
  const CrossEntropyArgs<T> a = *args;
  const int64_t classes = params->c;
  const A smooth = A(params->label_smoothing), spread = smooth / A(classes);
  for (int64_t i = begin; i < end; ++i) {
    const T* x = a.x + i * classes;
    A m, s;
    row_softmax(x, classes, &m, &s);
    const A log_s = scalar_log(s);
    lse[i] = m + log_s;
    V dot{}, mass{};  // sum t (x - m) and sum t, of the smoothed or given part of the target
    if (a.probs || smooth != 0) {
      for (int64_t j = 0; j < classes; j += N) {
        const bool full = j + N <= classes;
        const int n = (int)(classes - j);
        V t = load(a.weight + j, full, n);
        t *= a.probs ? load(a.probs + i * classes + j, full, n) * (A(1) - smooth) + spread : broadcast(spread);
        V part = t * (load(x + j, full, n) - m);
        if (!full) part = keep<A>(part, A(0), n);
        dot += part;
        mass += t;
      }
    }
    A value = lane_sum(mass) * log_s - lane_sum(dot);
    if (a.target) {
      const int64_t y = a.target[i];
      if (y == params->ignore_index) {
        loss[i] = 0;
        continue;
      }
      if (y < 0 || y >= classes) return i;
      value += (A(1) - smooth) * a.weight[y] * (log_s - (scalar_load(x + y) - m));
      sums[1] += a.weight[y];
    }
    loss[i] = value;
    sums[0] += value;
  }
  return -1;
}

// The same in the columns layout; [begin, end) are positions n * d + l.
template <class T>
int64_t cross_entropy_columns(const CrossEntropyArgs<T>* args, const CrossEntropyParams* params, acc_t<T>* loss,
                              acc_t<T>* lse, double* sums, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = typename Vec<T>::V;
  constexpr int N = Vec<T>::N;
  const CrossEntropyArgs<T> a = *args;
  const int64_t classes = params->c, d = params->d;
  const A smooth = A(params->label_smoothing), spread = smooth / A(classes);
  const A lowest = -(A)__builtin_inf();
  for (int64_t i = begin; i < end;) {
    const int64_t at = i / d * classes * d + i % d;
    int64_t count = d - i % d < end - i ? d - i % d : end - i;
    if (count > N) count = N;
    const bool full = count == N;
    const int n = (int)count;
    V m = broadcast<A>(lowest);
    for (int64_t j = 0; j < classes; ++j) {
      const V v = load(a.x + at + j * d, full, n);
      m = v > m ? v : m;
    }
    const V base = m == lowest ? V{} : m;
    V s{}, dot{}, mass{};
    for (int64_t j = 0; j < classes; ++j) {
      const V v = load(a.x + at + j * d, full, n);
      s += vexp(v - base);
      if (a.probs || smooth != 0) {
        V t = broadcast(a.weight[j]);
        t *= a.probs ? load(a.probs + at + j * d, full, n) * (A(1) - smooth) + spread : broadcast(spread);
        dot += t * (v - m);
        mass += t;
      }
    }
    for (int l = 0; l < n; ++l) {
      const A log_s = scalar_log(s[l]);
      lse[i + l] = m[l] + log_s;
      A value = mass[l] * log_s - dot[l];
      if (a.target) {
        const int64_t y = a.target[i + l];
        if (y == params->ignore_index) {
          loss[i + l] = 0;
          continue;
        }
        if (y < 0 || y >= classes) return i + l;
        value += (A(1) - smooth) * a.weight[y] * (log_s - (scalar_load(a.x + at + y * d + l) - m[l]));
        sums[1] += a.weight[y];
      }
      loss[i + l] = value;
      sums[0] += value;
    }
    i += n;
  }
  return -1;
}

// dx and dprobs (null: not wanted) of positions [begin, end). g: one gradient per position (g_step 1) or one for all
// (0), times factor.
template <class T>
void cross_entropy_backward_rows(const CrossEntropyArgs<T>* args, const CrossEntropyParams* params, const acc_t<T>* g,
                                 int64_t g_step, acc_t<T> factor, const acc_t<T>* lse, T* dx, acc_t<T>* dprobs,
                                 int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = typename Vec<T>::V;
  constexpr int N = Vec<T>::N;
  const CrossEntropyArgs<T> a = *args;
  const int64_t classes = params->c;
  const A smooth = A(params->label_smoothing), spread = smooth / A(classes);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t at = i * classes;
    const int64_t y = a.target ? a.target[i] : -1;
    if (a.target && (y == params->ignore_index || y < 0 || y >= classes)) {
      for (int64_t j = 0; dx && j < classes; j += N) store(dx + at + j, V{}, j + N <= classes, (int)(classes - j));
      continue;
    }
    const A gi = g[i * g_step] * factor, log_sum = lse[i];
    if (dprobs) {
      for (int64_t j = 0; j < classes; j += N) {
        const bool full = j + N <= classes;
        const int n = (int)(classes - j);
        const V grad = gi * (A(1) - smooth) * load(a.weight + j, full, n) * (log_sum - load(a.x + at + j, full, n));
        store(dprobs + at + j, grad, full, n);
      }
    }
    if (!dx) continue;
    A mass;  // sum of t
    if (a.probs) {
      V sum{};
      for (int64_t j = 0; j < classes; j += N) {
        const bool full = j + N <= classes;
        const int n = (int)(classes - j);
        sum += load(a.weight + j, full, n) * (load(a.probs + at + j, full, n) * (A(1) - smooth) + spread);
      }
      mass = lane_sum(sum);
    } else {
      mass = (A(1) - smooth) * a.weight[y] + spread * a.weight_sum;
    }
    A scale = 1;
    if (log_sum > A(32) || log_sum < A(-32)) {
      V sum{};
      for (int64_t j = 0; j < classes; j += N) {
        const bool full = j + N <= classes;
        const int n = (int)(classes - j);
        V e = vexp(load(a.x + at + j, full, n) - log_sum);
        if (!full) e = keep<A>(e, A(0), n);
        sum += e;
      }
      scale = A(1) / lane_sum(sum);
    }
    const A share = mass * scale;
    for (int64_t j = 0; j < classes; j += N) {
      const bool full = j + N <= classes;
      const int n = (int)(classes - j);
      V t = load(a.weight + j, full, n);
      t *= a.probs ? load(a.probs + at + j, full, n) * (A(1) - smooth) + spread : broadcast(spread);
      if (y >= j && y < j + N) t[y - j] += (A(1) - smooth) * a.weight[y];
      store(dx + at + j, gi * (share * vexp(load(a.x + at + j, full, n) - log_sum) - t), full, n);
    }
  }
}

template <class T>
void cross_entropy_backward_columns(const CrossEntropyArgs<T>* args, const CrossEntropyParams* params,
                                    const acc_t<T>* g, int64_t g_step, acc_t<T> factor, const acc_t<T>* lse, T* dx,
                                    acc_t<T>* dprobs, int64_t begin, int64_t end) {
  using A = acc_t<T>;
  using V = typename Vec<T>::V;
  using Mask = typename Lanes<A>::Mask;
  constexpr int N = Vec<T>::N;
  const CrossEntropyArgs<T> a = *args;
  const int64_t classes = params->c, d = params->d;
  const A smooth = A(params->label_smoothing), spread = smooth / A(classes);
  for (int64_t i = begin; i < end;) {
    const int64_t at = i / d * classes * d + i % d;
    int64_t count = d - i % d < end - i ? d - i % d : end - i;
    if (count > N) count = N;
    const bool full = count == N;
    const int n = (int)count;
    V gi{}, mass{}, hot{};
    Mask y = Mask{} - 1, kept = Mask{} - 1;
    const V log_sum = load(lse + i, full, n);
    bool large = false;
    for (int l = 0; l < n; ++l) {
      gi[l] = g[(i + l) * g_step] * factor;
      large |= log_sum[l] > A(32) || log_sum[l] < A(-32);
      if (!a.target) continue;
      const int64_t t = a.target[i + l];
      if (t == params->ignore_index || t < 0 || t >= classes) {
        kept[l] = 0;
      } else {
        y[l] = (typename Lanes<A>::Int)t;
        hot[l] = (A(1) - smooth) * a.weight[t];
        mass[l] = hot[l] + spread * a.weight_sum;
      }
    }
    V sum{};
    for (int64_t j = 0; j < classes; ++j) {
      const V x = load(a.x + at + j * d, full, n);
      if (dprobs) store(dprobs + at + j * d, gi * (A(1) - smooth) * a.weight[j] * (log_sum - x), full, n);
      if (a.probs) mass += a.weight[j] * (load(a.probs + at + j * d, full, n) * (A(1) - smooth) + spread);
      if (large) sum += vexp(x - log_sum);
    }
    if (dx) {
      const V one = broadcast<A>(1);
      const V share = mass * (((log_sum > A(32)) | (log_sum < A(-32))) ? one / sum : one);
      for (int64_t j = 0; j < classes; ++j) {
        V t = broadcast(a.weight[j]);
        t *= a.probs ? load(a.probs + at + j * d, full, n) * (A(1) - smooth) + spread : broadcast(spread);
        t += (y == (Mask{} + (typename Lanes<A>::Int)j)) ? hot : V{};
        const V grad = gi * (share * vexp(load(a.x + at + j * d, full, n) - log_sum) - t);
        store(dx + at + j * d, kept ? grad : V{}, full, n);
      }
    }
    i += n;
  }
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
