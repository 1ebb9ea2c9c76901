// Optimizer steps over n elements: weights w, gradients g, state m (and v), all fp32 and contiguous, in one pass.
//
//   SGD    d = g + decay w;  m = momentum m + d;  w -= lr (nesterov ? d + momentum m : m)      (no m: w -= lr d)
//   Adam   d = g + l2 w;  w *= keep;  m += (1 - beta1)(d - m);  v = beta2 v + (1 - beta2) d^2
//          w -= rate m / (sqrt(v) / root + eps)
// with rate = lr / (1 - beta1^t), root = sqrt(1 - beta2^t), keep = 1 - lr decay (AdamW) and l2 = decay (Adam). Formulas
// and their order are torch.optim's. half: the new weights once more in bf16, for the next forward pass; or null.
// Bytes: w, m (and v) once in and out, g once in; half once out.
//
// What the convolutions multiply by (half, or w where there is none) goes past the caches where it is large: every core
// has read it in the forward pass and the data gradient, so a plain store waits until the others have given the line
// up. On a virtual machine whose two cores did not always share a last-level cache, a third of the processes spent
// seconds on end with 37 ms (bf16; fp32 28) instead of 8 for the updates of ResNet50 at 32 px, one thread alone 12;
// with these stores none of 18 did, and the updates take the same 8 otherwise. Asking for the lines 512 elements ahead
// with intent to write, or cutting the work as the data gradient is cut, did not help.

namespace fastconv::cpu::FASTCONV_ISA_NS {

inline f32v square_root(f32v x) {
#if FASTCONV_VEC_BYTES == 64
  return (f32v)_mm512_sqrt_ps((__m512)x);
#elif FASTCONV_VEC_BYTES == 32
  return (f32v)_mm256_sqrt_ps((__m256)x);
#else
  for (int i = 0; i < FASTCONV_VEC_BYTES / 4; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

// Where the new weights go.
struct NewWeights {
  float* w;
  bf16* half;
  bool past;

  NewWeights(const WeightStep& s, int64_t first, int64_t n, bool large)
      : w(s.w + first),
        half(s.half ? s.half + first : nullptr),
        past(large && n % Vec<float>::N == 0 && (half ? (uintptr_t)half : (uintptr_t)w) % 64 == 0) {}
  FASTCONV_INLINE void put(int64_t i, f32v x, bool full, int rest) const {
    if (half) {
      store(w + i, x, full, rest);
      past ? stream(half + i, x) : store(half + i, x, full, rest);
    } else {
      past ? stream(w + i, x) : store(w + i, x, full, rest);
    }
  }
  FASTCONV_INLINE void finish() const {
    if (past) stream_fence();
  }
};

// The step of elements [first, first + n): operator()(i, ...) takes the vector at first + i, x the weights and d their
// gradient; `rest` of its elements where it is not `full`. ahead(i): asks for the state there.
template <bool MOMENTUM>
struct SgdRule {
  static constexpr bool kUpdates = true;
  SgdStep s;
  float* m;
  NewWeights to;

  SgdRule(const WeightStep& t, int64_t first, int64_t n)
      : s(t.sgd), m(MOMENTUM ? t.m + first : nullptr), to(t, first, n, t.sgd.large) {}
  FASTCONV_INLINE void operator()(int64_t i, f32v x, f32v d, bool full, int rest) const {
    d += x * s.decay;
    if (MOMENTUM) {
      const f32v buf = load(m + i, full, rest) * s.momentum + d;
      store(m + i, buf, full, rest);
      d = s.nesterov ? d + buf * s.momentum : buf;
    }
    x -= d * s.lr;
    to.put(i, x, full, rest);
  }
  FASTCONV_INLINE void ahead(int64_t i) const {
    if (MOMENTUM) __builtin_prefetch(m + i, 1, 2);
  }
};

struct AdamRule {
  static constexpr bool kUpdates = true;
  AdamStep s;
  float *m, *v;
  NewWeights to;

  AdamRule(const WeightStep& t, int64_t first, int64_t n)
      : s(t.averages), m(t.m + first), v(t.v + first), to(t, first, n, t.averages.large) {}
  FASTCONV_INLINE void operator()(int64_t i, f32v x, f32v d, bool full, int rest) const {
    f32v first = load(m + i, full, rest), second = load(v + i, full, rest);
    d += x * s.l2;
    x *= s.keep;
    first += (d - first) * s.gain1;
    second = second * s.beta2 + d * d * s.gain2;
    x -= first / (square_root(second) / s.root + s.eps) * s.rate;
    store(m + i, first, full, rest);
    store(v + i, second, full, rest);
    to.put(i, x, full, rest);
  }
  FASTCONV_INLINE void ahead(int64_t i) const {
    __builtin_prefetch(m + i, 1, 2);
    __builtin_prefetch(v + i, 1, 2);
  }
};

// f(rule) with the step's rule.
template <class F>
FASTCONV_INLINE void with_rule(const WeightStep& t, int64_t first, int64_t n, const F& f) {
  if (t.adam)
    f(AdamRule(t, first, n));
  else if (t.m)
    f(SgdRule<true>(t, first, n));
  else
    f(SgdRule<false>(t, first, n));
}

// Elements [first, first + n), g the gradient of the first.
inline void weight_step(const WeightStep& t, int64_t first, int64_t n, const float* g) {
  with_rule(t, first, n, [&](const auto rule) {
    for (int64_t i = 0; i < n; i += Vec<float>::N) {
      const bool full = i + Vec<float>::N <= n;
      const int rest = (int)(n - i);
      rule(i, load(rule.to.w + i, full, rest), load(g + i, full, rest), full, rest);
    }
    rule.to.finish();
  });
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
