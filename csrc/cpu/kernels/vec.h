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

// 16-bit lanes to 32 and back. GCC 12 takes the conversion of a whole 512-bit vector apart into halves.
#if FASTCONV_VEC_BYTES == 64
FASTCONV_INLINE u32v widen_lanes(u16v v) { return (u32v)_mm512_cvtepu16_epi32((__m256i)v); }
FASTCONV_INLINE u16v narrow_lanes(u32v v) { return (u16v)_mm512_cvtepi32_epi16((__m512i)v); }
#else
FASTCONV_INLINE u32v widen_lanes(u16v v) { return __builtin_convertvector(v, u32v); }
FASTCONV_INLINE u16v narrow_lanes(u32v v) { return __builtin_convertvector(v, u16v); }
#endif

FASTCONV_INLINE f32v widen(bf16, u16v bits) { return (f32v)(widen_lanes(bits) << 16); }

#ifdef FASTCONV_DPBF16
// One instruction; it takes subnormal numbers as zero, as the pair dot product does.
FASTCONV_INLINE u16v narrow(bf16, f32v x) { return (u16v)_mm512_cvtneps_pbh((__m512)x); }
FASTCONV_INLINE f32v rounded(bf16, f32v x) { return widen(bf16{}, narrow(bf16{}, x)); }
#else
FASTCONV_INLINE u32v bf16_bits(f32v x) {
  const u32v bits = (u32v)x;
  const u32v near = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const u32v quiet = (bits >> 16) | 0x40u;  // a NaN stays one: rounding could carry it to infinity
  return (x != x) ? quiet : near;
}
FASTCONV_INLINE u16v narrow(bf16, f32v x) { return narrow_lanes(bf16_bits(x)); }
FASTCONV_INLINE f32v rounded(bf16, f32v x) { return (f32v)(bf16_bits(x) << 16); }  // lanes stay where they are
#endif

#if FASTCONV_VEC_BYTES == 64
FASTCONV_INLINE f32v widen(f16, u16v bits) { return (f32v)_mm512_cvtph_ps((__m256i)bits); }
FASTCONV_INLINE u16v narrow(f16, f32v x) { return (u16v)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT); }
#elif FASTCONV_VEC_BYTES == 32
FASTCONV_INLINE f32v widen(f16, u16v bits) { return (f32v)_mm256_cvtph_ps((__m128i)bits); }
FASTCONV_INLINE u16v narrow(f16, f32v x) { return (u16v)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT); }
#else
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
#endif

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
#if FASTCONV_VEC_BYTES == 64
FASTCONV_INLINE i32v widen_bytes(u8v32 b) { return (i32v)_mm512_cvtepu8_epi32((__m128i)b); }
FASTCONV_INLINE u8v32 narrow_bytes(i32v v) { return (u8v32)_mm512_cvtepi32_epi8((__m512i)v); }
#else
FASTCONV_INLINE i32v widen_bytes(u8v32 b) { return __builtin_convertvector(__builtin_convertvector(b, u16v), i32v); }
FASTCONV_INLINE u8v32 narrow_bytes(i32v v) { return __builtin_convertvector(__builtin_convertvector(v, u16v), u8v32); }
#endif
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

// The first n of a vector's elements; the rest reads as zero and stays unwritten.
template <class V, class T>
FASTCONV_INLINE V first_of(const T* p, int n) {
  V t{};
  for (int i = 0; i < n; ++i) t[i] = p[i];
  return t;
}
template <class V, class T>
FASTCONV_INLINE void put_first(T* p, V v, int n) {
  for (int i = 0; i < n; ++i) p[i] = v[i];
}
#if FASTCONV_VEC_BYTES == 64  // one masked instruction, where the loop over lanes goes through memory
FASTCONV_INLINE f32v first_of_16(const float* p, int n) {
  return (f32v)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
}
FASTCONV_INLINE u16v first_of_16(const uint16_t* p, int n) {
  return (u16v)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
}
FASTCONV_INLINE u8v32 first_of_16(const uint8_t* p, int n) {
  return (u8v32)_mm_maskz_loadu_epi8((__mmask16)((1u << n) - 1), p);
}
FASTCONV_INLINE void put_first_16(float* p, f32v v, int n) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1), (__m512)v);
}
FASTCONV_INLINE void put_first_16(uint16_t* p, u16v v, int n) {
  _mm256_mask_storeu_epi16(p, (__mmask16)((1u << n) - 1), (__m256i)v);
}
FASTCONV_INLINE void put_first_16(uint8_t* p, u8v32 v, int n) {
  _mm_mask_storeu_epi8(p, (__mmask16)((1u << n) - 1), (__m128i)v);
}
#elif FASTCONV_VEC_BYTES == 32  // pieces of 8, 4, 2 and 1 elements, n <= 8
template <class E>
FASTCONV_INLINE uint64_t first_bits(const E* p, int n) {  // of up to 8 bytes
  uint64_t bits = 0;
  for (int i = 0, piece = 8 / (int)sizeof(E); piece; piece /= 2) {
    if (!(n & piece)) continue;
    uint64_t part = 0;
    __builtin_memcpy(&part, p + i, piece * sizeof(E));
    bits |= part << (i * 8 * sizeof(E));
    i += piece;
  }
  return bits;
}
template <class E>
FASTCONV_INLINE void put_first_bits(E* p, uint64_t bits, int n) {
  for (int piece = 8 / (int)sizeof(E); piece; piece /= 2) {
    if (!(n & piece)) continue;
    __builtin_memcpy(p, &bits, piece * sizeof(E));
    p += piece;
    if (piece * sizeof(E) < 8) bits >>= piece * 8 * sizeof(E);
  }
}
typedef uint64_t u64v2 __attribute__((vector_size(16)));
FASTCONV_INLINE f32v first_of_16(const float* p, int n) {
  const i32v mask = i32v{0, 1, 2, 3, 4, 5, 6, 7} < n;
  return (f32v)_mm256_maskload_ps(p, (__m256i)mask);
}
FASTCONV_INLINE u16v first_of_16(const uint16_t* p, int n) {
  return n >= 4 ? (u16v)u64v2{first_bits(p, 4), first_bits(p + 4, n - 4)} : (u16v)u64v2{first_bits(p, n), 0};
}
FASTCONV_INLINE u8v32 first_of_16(const uint8_t* p, int n) { return (u8v32)first_bits(p, n); }
// A masked store takes an AMD Zen 3 forty operations.
FASTCONV_INLINE void put_first_16(float* p, f32v v, int n) {
  __m128 part = _mm256_castps256_ps128((__m256)v);
  if (n >= 4) {
    _mm_storeu_ps(p, part);
    part = _mm256_extractf128_ps((__m256)v, 1);
    p += 4;
    n -= 4;
  }
  const u64v2 bits = (u64v2)part;
  put_first_bits(p, bits[0], n < 2 ? n : 2);
  if (n > 2) put_first_bits(p + 2, bits[1], n - 2);
}
FASTCONV_INLINE void put_first_16(uint16_t* p, u16v v, int n) {
  const u64v2 bits = (u64v2)v;
  put_first_bits(p, bits[0], n < 4 ? n : 4);
  if (n > 4) put_first_bits(p + 4, bits[1], n - 4);
}
FASTCONV_INLINE void put_first_16(uint8_t* p, u8v32 v, int n) { put_first_bits(p, (uint64_t)v, n); }
#else
FASTCONV_INLINE f32v first_of_16(const float* p, int n) { return first_of<f32v>(p, n); }
FASTCONV_INLINE u16v first_of_16(const uint16_t* p, int n) { return first_of<u16v>(p, n); }
FASTCONV_INLINE u8v32 first_of_16(const uint8_t* p, int n) { return first_of<u8v32>(p, n); }
FASTCONV_INLINE void put_first_16(float* p, f32v v, int n) { put_first(p, v, n); }
FASTCONV_INLINE void put_first_16(uint16_t* p, u16v v, int n) { put_first(p, v, n); }
FASTCONV_INLINE void put_first_16(uint8_t* p, u8v32 v, int n) { put_first(p, v, n); }
#endif

template <class T>
struct Vec {  // bf16, f16
  using A = float;
  using V = f32v;
  static constexpr int N = FASTCONV_VEC_BYTES / 4;
  static FASTCONV_INLINE V load(const T* p) { return widen(T{}, *(const u16v_u*)p); }
  static FASTCONV_INLINE void store(T* p, V v) { *(u16v_u*)p = narrow(T{}, v); }
  static FASTCONV_INLINE V load_n(const T* p, int n) { return widen(T{}, first_of_16(&p->bits, n)); }
  static FASTCONV_INLINE void store_n(T* p, V v, int n) { put_first_16(&p->bits, narrow(T{}, v), n); }
};

template <>
struct Vec<float> {
  using A = float;
  using V = f32v;
  static constexpr int N = FASTCONV_VEC_BYTES / 4;
  static FASTCONV_INLINE V load(const float* p) { return *(const f32v_u*)p; }
  static FASTCONV_INLINE void store(float* p, V v) { *(f32v_u*)p = v; }
  static FASTCONV_INLINE V load_n(const float* p, int n) { return first_of_16(p, n); }
  static FASTCONV_INLINE void store_n(float* p, V v, int n) { put_first_16(p, v, n); }
};

template <>
struct Vec<double> {
  using A = double;
  using V = f64v;
  static constexpr int N = FASTCONV_VEC_BYTES / 8;
  static FASTCONV_INLINE V load(const double* p) { return *(const f64v_u*)p; }
  static FASTCONV_INLINE void store(double* p, V v) { *(f64v_u*)p = v; }
  static FASTCONV_INLINE V load_n(const double* p, int n) { return first_of<V>(p, n); }
  static FASTCONV_INLINE void store_n(double* p, V v, int n) { put_first(p, v, n); }
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

// The same of bytes: one for each lane of A.
template <class A>
FASTCONV_INLINE typename Lanes<A>::Bytes load_bytes(const uint8_t* p, bool full, int n) {
  using Bytes = typename Lanes<A>::Bytes;
  if (full) return *(const typename Lanes<A>::Bytes_u*)p;
  if constexpr (sizeof(A) == 4) return first_of_16(p, n);
  return first_of<Bytes>(p, n);
}
template <class A>
FASTCONV_INLINE void store_bytes(uint8_t* p, typename Lanes<A>::Bytes v, bool full, int n) {
  if (full) {
    *(typename Lanes<A>::Bytes_u*)p = v;
  } else if constexpr (sizeof(A) == 4) {
    put_first_16(p, v, n);
  } else {
    put_first(p, v, n);
  }
}

// Past the caches: nobody reads the line soon, or another core holds it too and would have to be waited for. p aligned
// to the bytes of a vector of T; the writer ends with stream_fence().
FASTCONV_INLINE void stream(float* p, f32v v) {
#if FASTCONV_VEC_BYTES == 64
  _mm512_stream_ps(p, (__m512)v);
#elif FASTCONV_VEC_BYTES == 32
  _mm256_stream_ps(p, (__m256)v);
#else
  Vec<float>::store(p, v);
#endif
}
FASTCONV_INLINE void stream(bf16* p, f32v v) {
#if FASTCONV_VEC_BYTES == 64
  _mm256_stream_si256((__m256i*)p, (__m256i)narrow(bf16{}, v));
#elif FASTCONV_VEC_BYTES == 32
  _mm_stream_si128((__m128i*)p, (__m128i)narrow(bf16{}, v));
#else
  Vec<bf16>::store(p, v);
#endif
}
FASTCONV_INLINE void stream_fence() {
#if FASTCONV_VEC_BYTES >= 32
  _mm_sfence();
#endif
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

// Lane sums and maxima: halves onto halves, log2(lanes) steps where one lane after the other waits for each.
template <class A>
FASTCONV_INLINE typename Lanes<A>::Mask lane_numbers() {
  typename Lanes<A>::Mask m{};
  for (unsigned i = 0; i < sizeof(m) / sizeof(A); ++i) m[i] = (typename Lanes<A>::Int)i;
  return m;
}
template <class V>
FASTCONV_INLINE auto lane_sum(V v) {
  using A = __typeof__(v[0] + 0);
  for (unsigned step = sizeof(V) / sizeof(A) / 2; step; step /= 2) v += __builtin_shuffle(v, lane_numbers<A>() ^ step);
  return v[0];
}
template <class V>
FASTCONV_INLINE auto lane_max(V v) {
  using A = __typeof__(v[0] + 0);
  for (unsigned step = sizeof(V) / sizeof(A) / 2; step; step /= 2) {
    const V other = __builtin_shuffle(v, lane_numbers<A>() ^ step);
    v = other > v ? other : v;
  }
  return v[0];
}
// The first n lanes of x, the others replaced by `other`.
template <class A, class V>
FASTCONV_INLINE V keep(V x, A other, int n) {
  return lane_numbers<A>() < (typename Lanes<A>::Int)n ? x : broadcast<A>(other);
}

}  // namespace fastconv::cpu::FASTCONV_ISA_NS
