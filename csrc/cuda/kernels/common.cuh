// Small things that every kernel uses: conversions, vectors of elements, division by an invariant, warp and block sums.
#pragma once

#include <cstddef>

#include "ptx.cuh"

namespace fastconv {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t ceil_div64(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int min_int(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int max_int(int a, int b) { return a > b ? a : b; }
__host__ __device__ constexpr int floor_div(int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }  // b > 0

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// N elements that move as one access of N * sizeof(T) bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16, "one access moves at most 16 bytes");
  T v[N];
};

template <class T>
constexpr int kVec16 = 16 / static_cast<int>(sizeof(T));  // elements in a 16-byte access

template <int N, class T>
__device__ __forceinline__ void load_floats(float (&out)[N], const T* p) {
  constexpr int kStep = N < kVec16<T> ? N : kVec16<T>;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    VECTOR_ACCESS(p + i, sizeof(Vec<T, kStep>));
    Vec<T, kStep> v = *reinterpret_cast<const Vec<T, kStep>*>(p + i);
#pragma unroll
    for (int j = 0; j < kStep; ++j) out[i + j] = to_float(v.v[j]);
  }
}

template <int N, class T>
__device__ __forceinline__ void store_floats(T* p, const float (&in)[N]) {
  constexpr int kStep = N < kVec16<T> ? N : kVec16<T>;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    Vec<T, kStep> v;
#pragma unroll
    for (int j = 0; j < kStep; ++j) v.v[j] = from_float<T>(in[i + j]);
    VECTOR_ACCESS(p + i, sizeof(v));
    *reinterpret_cast<Vec<T, kStep>*>(p + i) = v;
  }
}

// n / d and n % d for 0 <= n < 2^31, 1 <= d < 2^31: one multiply-high, an add and a shift (Granlund and Montgomery
// 1994).
struct FastDiv {
  unsigned d = 1, mul = 0, shift = 0;
  FastDiv() = default;
  __host__ __device__ explicit FastDiv(int divisor) : d(static_cast<unsigned>(divisor)) {
    shift = 0;
    while ((1u << shift) < d) ++shift;
    mul = static_cast<unsigned>(((1ull << 32) * ((1ull << shift) - d)) / d + 1);
  }
  __device__ __forceinline__ int div(int n) const {
    unsigned u = static_cast<unsigned>(n);
    return static_cast<int>((__umulhi(u, mul) + u) >> shift);
  }
  __device__ __forceinline__ void divmod(int n, int& q, int& r) const {
    q = div(n);
    r = n - q * static_cast<int>(d);
  }
};

// The same for n * d < 2^32, made in the kernel: one 32-bit division, where a FastDiv takes one of 64 bits.
struct SmallDiv {
  unsigned d, mul;
  __device__ __forceinline__ explicit SmallDiv(int divisor)
      : d(static_cast<unsigned>(divisor)), mul(0xffffffffu / d + 1u) {}  // 0 where d = 1
  __device__ __forceinline__ void divmod(int n, int& q, int& r) const {
    q = d == 1 ? n : static_cast<int>(__umulhi(static_cast<unsigned>(n), mul));
    r = n - q * static_cast<int>(d);
  }
};

// n / d and n % d for 0 <= n, in 32 bits where that is enough: a 64-bit division is a hundred instructions.
__device__ __forceinline__ void divide_rows(int64_t n, int d, int64_t& q, int& r) {
  if (n <= 0x7fffffff) {
    const unsigned small = static_cast<unsigned>(n) / static_cast<unsigned>(d);
    q = small;
    r = static_cast<int>(static_cast<unsigned>(n) - small * static_cast<unsigned>(d));
  } else {
    q = n / d;
    r = static_cast<int>(n - q * d);
  }
}

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int i = kWarp / 2; i > 0; i >>= 1) x += __shfl_xor_sync(kFullMask, x, i);
  return x;
}

// Mean and sum of squared deviations of `count` samples; two of them merge exactly (Chan, Golub, LeVeque 1979).
struct Moments {
  float count, mean, m2;
};
__device__ __forceinline__ Moments merge(const Moments& a, const Moments& b) {
  float n = a.count + b.count;
  if (n == 0.0f) return {0.0f, 0.0f, 0.0f};
  float delta = b.mean - a.mean, share = b.count / n;
  return {n, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

}  // namespace fastconv
