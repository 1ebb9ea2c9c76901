// Vectors of one instruction set, by GCC's vector extensions: FASTCONV_VEC_BYTES wide, in namespace FASTCONV_ISA_NS.
//
// Arithmetic is fp32 (fp64 for double); 16-bit elements are widened on load and rounded to nearest even on store.
// Vec<T>::load / store move N elements; load_n / store_n the first n < N of them (the rest reads as zero).

namespace fastconv::cpu::FASTCONV_ISA_NS {

#define FASTCONV_INLINE __attribute__((always_inline)) inline

typedef float f32v __attribute__((vector_size(FASTCONV_VEC_BYTES)));
typedef int32_t i32v __attribute__((vector_size(FASTCONV_VEC_BYTES)));
typedef uint32_t u32v __attribute__((vector_size(FASTCONV_VEC_BYTES)));
typedef double f64v __attribute__((vector_size(FASTCONV_VEC_BYTES)));
typedef int64_t i64v __attribute__((vector_size(FASTCONV_VEC_BYTES)));
typedef uint16_t u16v __attribute__((vector_size(FASTCONV_VEC_BYTES / 2)));
typedef uint8_t u8v32 __attribute__((vector_size(FASTCONV_VEC_BYTES / 4)));  // as many lanes as f32v
typedef uint8_t u8v64 __attribute__((vector_size(FASTCONV_VEC_BYTES / 8)));  // as many lanes as f64v

// The same, where memory is not aligned.
typedef f32v f32v_u __attribute__((aligned(4), may_alias));
typedef f64v f64v_u __attribute__((aligned(8), may_alias));
typedef u16v u16v_u __attribute__((aligned(2), may_alias));
typedef u8v32 u8v32_u __attribute__((aligned(1), may_alias));
typedef u8v64 u8v64_u __attribute__((aligned(1), may_alias));

FASTCONV_INLINE f32v widen(bf16, u16v bits) { return (f32v)(__builtin_convertvector(bits, u32v) << 16); }

#ifdef FASTCONV_DPBF16
// One instruction; it takes subnormal numbers as zero, as the pair dot product does.
FASTCONV_INLINE u16v narrow(bf16, f32v x) { return (u16v)_mm512_cvtneps_pbh((__m512)x); }
#else
FASTCONV_INLINE u16v narrow(bf16, f32v x) {
  const u32v bits = (u32v)x;
  const u32v rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u32v quiet = (bits >> 16) | 0x40u;  // a NaN stays one: rounding could carry it to infinity
  return __builtin_convertvector((x != x) ? quiet : rounded, u16v);
}
#endif

FASTCONV_INLINE f32v widen(f16, u16v bits) {
  const u32v h = __builtin_convertvector(bits, u32v);
  const u32v sign = (h & 0x8000u) << 16;
  const u32v magnitude = (h & 0x7fffu) << 13;
  // 2^112 moves fp16's exponent bias to fp32's, and normalises fp16 subnormals on the way.
  const u32v scaled = (u32v)((f32v)magnitude * 0x1p112f);
  return (f32v)(((magnitude >= (0x7c00u << 13)) ? (scaled | 0x7f800000u) : scaled) | sign);
}

FASTCONV_INLINE u16v narrow(f16, f32v x) {
  const u32v bits = (u32v)x;
  const u32v sign = (bits >> 16) & 0x8000u;
  const u32v magnitude = bits & 0x7fffffffu;
  const u32v normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const u32v subnormal = (u32v)((f32v)magnitude + 0.5f) - 0x3f000000u;  // 0.5's last place is fp16's smallest number
  u32v h = (magnitude < 0x38800000u) ? subnormal : normal;
  h = (magnitude >= 0x477ff000u) ? (u32v{} + 0x7c00u) : h;  // 65520 and above round to infinity
  h = (magnitude > 0x7f800000u) ? (u32v{} + 0x7e00u) : h;   // NaN
  return __builtin_convertvector(h | sign, u16v);
}

template <class A>
struct Lanes;
template <>
struct Lanes<float> {
  using V = f32v;
  using Bytes = u8v32;
  using Bytes_u = u8v32_u;
  using Mask = i32v;
  using Int = int32_t;
};
template <>
struct Lanes<double> {
  using V = f64v;
  using Bytes = u8v64;
  using Bytes_u = u8v64_u;
  using Mask = i64v;
  using Int = int64_t;
};

// Bytes to and from integers as wide as the lanes of V, by doubling and halving: GCC 12 takes the direct conversion
// apart into scalars.
typedef uint16_t u16v64 __attribute__((vector_size(FASTCONV_VEC_BYTES / 4)));
typedef uint32_t u32v64 __attribute__((vector_size(FASTCONV_VEC_BYTES / 2)));
FASTCONV_INLINE i32v widen_bytes(u8v32 b) { return __builtin_convertvector(__builtin_convertvector(b, u16v), i32v); }
FASTCONV_INLINE u8v32 narrow_bytes(i32v v) { return __builtin_convertvector(__builtin_convertvector(v, u16v), u8v32); }
FASTCONV_INLINE i64v widen_bytes(u8v64 b) {
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(b, u16v64), u32v64), i64v);
}
FASTCONV_INLINE u8v64 narrow_bytes(i64v v) {
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(v, u32v64), u16v64), u8v64);
}

template <class A>
FASTCONV_INLINE typename Lanes<A>::V broadcast(A a) {
  return typename Lanes<A>::V{} + a;
}

template <class T>
struct Vec {  // bf16, f16
  using A = float;
  using V = f32v;
  static constexpr int N = FASTCONV_VEC_BYTES / 4;
  static FASTCONV_INLINE V load(const T* p) { return widen(T{}, *(const u16v_u*)p); }
  static FASTCONV_INLINE void store(T* p, V v) { *(u16v_u*)p = narrow(T{}, v); }
  static FASTCONV_INLINE V load_n(const T* p, int n) {
    u16v t{};
    for (int i = 0; i < n; ++i) t[i] = p[i].bits;
    return widen(T{}, t);
  }
  static FASTCONV_INLINE void store_n(T* p, V v, int n) {
    const u16v t = narrow(T{}, v);
    for (int i = 0; i < n; ++i) p[i].bits = t[i];
  }
};

template <>
struct Vec<float> {
  using A = float;
  using V = f32v;
  static constexpr int N = FASTCONV_VEC_BYTES / 4;
  static FASTCONV_INLINE V load(const float* p) { return *(const f32v_u*)p; }
  static FASTCONV_INLINE void store(float* p, V v) { *(f32v_u*)p = v; }
  static FASTCONV_INLINE V load_n(const float* p, int n) {
    V t{};
    for (int i = 0; i < n; ++i) t[i] = p[i];
    return t;
  }
  static FASTCONV_INLINE void store_n(float* p, V v, int n) {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
};

template <>
struct Vec<double> {
  using A = double;
  using V = f64v;
  static constexpr int N = FASTCONV_VEC_BYTES / 8;
  static FASTCONV_INLINE V load(const double* p) { return *(const f64v_u*)p; }
  static FASTCONV_INLINE void store(double* p, V v) { *(f64v_u*)p = v; }
  static FASTCONV_INLINE V load_n(const double* p, int n) {
    V t{};
    for (int i = 0; i < n; ++i) t[i] = p[i];
    return t;
  }
  static FASTCONV_INLINE void store_n(double* p, V v, int n) {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }
};

// Whole vectors where `full` (known at the call), else the first n lanes.
template <class T>
FASTCONV_INLINE typename Vec<T>::V load(const T* p, bool full, int n) {
  return full ? Vec<T>::load(p) : Vec<T>::load_n(p, n);
}
template <class T>
FASTCONV_INLINE void store(T* p, typename Vec<T>::V v, bool full, int n) {
  if (full) {
    Vec<T>::store(p, v);
  } else {
    Vec<T>::store_n(p, v, n);
  }
}

// The position after (n, h, w) in a tensor of h_size x w_size maps; a division per position costs as much as 64
// channels' work.
FASTCONV_INLINE void next_position(int64_t& n, int64_t& h, int64_t h_size, int64_t& w, int64_t w_size) {
  if (++w < w_size) return;
  w = 0;
  if (++h < h_size) return;
  h = 0;
  ++n;
}

// Lane sums and maxima, in a fixed order.
template <class V>
FASTCONV_INLINE auto lane_sum(V v) {
  auto s = v[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(s); ++i) s += v[i];
  return s;
}
template <class V>
FASTCONV_INLINE auto lane_max(V v) {
  auto m = v[0];
  for (unsigned i = 1; i < sizeof(V) / sizeof(m); ++i) m = v[i] > m ? v[i] : m;
  return m;
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
