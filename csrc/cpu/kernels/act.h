// exp, log-free elementary functions, the activations y = act(x) and their derivatives, on vectors.
//
// fp32: polynomials fitted here (relative error of exp 2e-9, of erf 1e-9, of tanh 4e-9 before rounding: the result is
// good to about 1 ulp; 2 ulp at the ends of exp). fp64 calls libm lane by lane: it serves gradient checks, not speed.
// A comparison with a NaN is false; each select below is written so that a NaN reaches the result, as in PyTorch.

namespace fastconv::cpu::FASTCONV_ISA_NS {

#if FASTCONV_VEC_BYTES == 64
// AVX-512 scales by 2^n in one instruction, over and under the range of fp32 too. min and max return x where it is a
// NaN.
FASTCONV_INLINE f32v vexp(f32v x) {
  x = (f32v)_mm512_max_ps(_mm512_set1_ps(-104.0f), _mm512_min_ps(_mm512_set1_ps(89.0f), (__m512)x));
  const f32v n = (f32v)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const f32v r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  f32v p = r * 1.383583075e-3f + 8.375645233e-3f;
  p = p * r + 4.166828821e-2f;
  p = p * r + 1.666641024e-1f;
  p = p * r + 4.999999160e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return (f32v)_mm512_scalef_ps((__m512)p, (__m512)n);
}
#else
FASTCONV_INLINE f32v vexp(f32v x) {
  x = (x > 89.0f) ? (f32v{} + 89.0f) : x;              // exp(89) overflows to infinity below, as it must
  x = (x < -104.0f) ? (f32v{} - 104.0f) : x;           // exp(-104) rounds to zero
  const f32v shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer, kept in the low bits
  const i32v n = (i32v)shifted - 0x4b400000;
  const f32v nf = shifted - 12582912.0f;
  const f32v r = (x - nf * 0.693359375f) + nf * 2.12194440e-4f;  // ln 2 in two parts
  f32v p = r * 1.383583075e-3f + 8.375645233e-3f;
  p = p * r + 4.166828821e-2f;
  p = p * r + 1.666641024e-1f;
  p = p * r + 4.999999160e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const i32v half = n >> 1;  // 2^n in two factors: n reaches 128, and -150 for results below the normal range
  return p * (f32v)((half + 127) << 23) * (f32v)((n - half + 127) << 23);
}
#endif

FASTCONV_INLINE f32v vabs(f32v x) { return (f32v)((u32v)x & 0x7fffffffu); }
FASTCONV_INLINE f32v copy_sign(f32v magnitude, f32v sign) {
  return (f32v)(((u32v)magnitude & 0x7fffffffu) | ((u32v)sign & 0x80000000u));
}

FASTCONV_INLINE f32v vtanh(f32v x) {
  const f32v a = vabs(x);
  const f32v s = x * x;
  f32v p = s * -5.659988212e-3f + 2.059098755e-2f;  // tanh(x) / x in x^2 on |x| < 0.625
  p = p * s - 5.372106775e-2f;
  p = p * s + 1.333112753e-1f;
  p = p * s - 3.333326053e-1f;
  const f32v small = x + x * s * p;
  const f32v large = copy_sign(1.0f - 2.0f / (vexp(a + a) + 1.0f), x);
  return (a < 0.625f) ? small : ((x != x) ? x : large);
}

FASTCONV_INLINE f32v verf(f32v x) {
  const f32v a = vabs(x);
  const f32v s = x * x;
  f32v p = s * 7.853867343e-5f - 8.010195448e-4f;  // erf(x) / x in x^2 on |x| < 1
  p = p * s + 5.188327895e-3f;
  p = p * s - 2.685381205e-2f;
  p = p * s + 1.128358515e-1f;
  p = p * s - 3.761262582e-1f;
  p = p * s + 1.128379166f;
  const f32v small = x * p;
  const f32v t = 1.0f / (a * 0.5f + 1.0f);  // erfc(x) exp(x^2) in t on 1 <= x <= 4.2; beyond, exp(-x^2) < 2^-25
  f32v q = t * 1.176767322e-1f - 4.654697916e-1f;
  q = q * t + 5.549211140e-1f;
  q = q * t - 9.690997625e-2f;
  q = q * t + 3.445999805e-1f;
  q = q * t + 2.605989928e-1f;
  q = q * t + 2.847695570e-1f;
  q = q * t - 1.446432142e-4f;
  const f32v large = copy_sign(1.0f - vexp(-s) * q, x);
  return (a < 1.0f) ? small : ((x != x) ? x : large);
}

#define FASTCONV_LANEWISE(name, fn)                                               \
  inline f64v name(f64v x) {                                                      \
    for (unsigned i = 0; i < sizeof(f64v) / sizeof(double); ++i) x[i] = fn(x[i]); \
    return x;                                                                     \
  }
FASTCONV_LANEWISE(vexp, __builtin_exp)
FASTCONV_LANEWISE(vtanh, __builtin_tanh)
FASTCONV_LANEWISE(verf, __builtin_erf)
#undef FASTCONV_LANEWISE

template <class A, class V>
FASTCONV_INLINE V sigmoid(V x) {
  return A(1) / (A(1) + vexp(-x));
}

// Not inlined: one copy per vector type instead of one per kernel; a call per vector is small against the arithmetic
// here.
template <class A, class V = typename Lanes<A>::V>
__attribute__((noinline)) V act_any(V x, Act act) {
  switch (act) {
    case Act::identity:
      return x;
    case Act::relu:
      return (x <= A(0)) ? V{} : x;
    case Act::relu6:
      x = (x <= A(0)) ? V{} : x;
      return (x >= A(6)) ? broadcast<A>(6) : x;
    case Act::leaky_relu:
      return (x > A(0)) ? x : x * A(kLeakySlope);
    case Act::sigmoid:
      return sigmoid<A>(x);
    case Act::tanh:
      return vtanh(x);
    case Act::silu:
      return x / (A(1) + vexp(-x));
    case Act::gelu:
      return x * A(0.5) * (A(1) + verf(x * A(0.70710678118654752440)));
    case Act::hardswish: {
      V t = x + A(3);
      t = (t <= A(0)) ? V{} : t;
      t = (t >= A(6)) ? broadcast<A>(6) : t;
      return x * t / A(6);
    }
  }
  return x;
}

// g * act'(.), where s is the output for relu .. tanh and the pre-activation for silu, gelu and hardswish.
template <class A, class V = typename Lanes<A>::V>
__attribute__((noinline)) V act_grad_any(V g, V s, Act act) {
  switch (act) {
    case Act::identity:
      return g;
    case Act::relu:
      return (s <= A(0)) ? V{} : g;
    case Act::relu6:
      return (s <= A(0)) ? V{} : ((s >= A(6)) ? V{} : g);
    case Act::leaky_relu:  // y > 0 exactly where x > 0: the slope is positive
      return (s > A(0)) ? g : g * A(kLeakySlope);
    case Act::sigmoid:  // y' = y (1 - y)
      return g * s * (A(1) - s);
    case Act::tanh:  // y' = 1 - y^2
      return g * (A(1) - s * s);
    case Act::silu: {  // (x sig(x))' = sig (1 + x (1 - sig))
      const V sig = sigmoid<A>(s);
      return g * sig * (A(1) + s * (A(1) - sig));
    }
    case Act::gelu: {  // (x Phi(x))' = Phi(x) + x phi(x)
      const V cdf = A(0.5) * (A(1) + verf(s * A(0.70710678118654752440)));
      const V pdf = vexp(s * s * A(-0.5)) * A(0.39894228040143267794);
      return g * (cdf + s * pdf);
    }
    case Act::hardswish:
      return (s <= A(-3)) ? V{} : ((s < A(3)) ? g * (s / A(3) + A(0.5)) : g);
  }
  return g;
}

// The activation as a template argument where it is cheap, so that the inner loop has no call in it.
enum ActKind { kActIdentity, kActRelu, kActAny };

template <class A, int KIND, class V>
FASTCONV_INLINE V apply_act(V x, Act act) {
  if (KIND == kActIdentity) return x;
  if (KIND == kActRelu) return (x <= A(0)) ? V{} : x;
  return act_any<A>(x, act);
}
template <class A, int KIND, class V>
FASTCONV_INLINE V apply_act_grad(V g, V s, Act act) {
  if (KIND == kActIdentity) return g;
  if (KIND == kActRelu) return (s <= A(0)) ? V{} : g;
  return act_grad_any<A>(g, s, act);
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
