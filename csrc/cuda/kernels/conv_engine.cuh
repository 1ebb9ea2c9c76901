// The multiply-accumulate of one warp over one k-tile in shared memory, and how its results leave the registers.
//
// TensorEngine: mma.sync m16n8k16 (fp16, bf16) or m16n8k8 (tf32); a k-step is 32 bytes of k for either, so that both
// share every address. SimtEngine: fp32 FFMA, lanes in a 4 x 8 grid. A and B may each be K-major or MN-major. fp32
// accumulation.
#pragma once

#include <type_traits>

#include "conv_tile.cuh"

namespace fastconv {

template <class T, int WM_, int WN_, int KBytes, bool AMn, bool BMn, int BM, int BN>
struct TensorEngine {
  static constexpr int WM = WM_, WN = WN_;
  static constexpr bool kFloat = std::is_same_v<T, float>;
  static constexpr int kElem = static_cast<int>(sizeof(T));
  static constexpr int kStepK = 32 / kElem;  // k per mma
  static constexpr int kSteps = KBytes / 32;
  static constexpr int kMi = WM / 16, kNi = WN / 8;
  static constexpr int kPerChunk = 16 / kElem;
  using SwizzleA = Swizzle<AMn ? BM * kElem : KBytes, AMn && kFloat>;
  using SwizzleB = Swizzle<BMn ? BN * kElem : KBytes, BMn && kFloat>;
  static_assert(WM % 16 == 0 && WN % 16 == 0, "a warp tile is made of 16x16 fragments");
  static_assert(KBytes % 32 == 0, "a k-tile is a whole number of mma steps");

  float acc[kMi][kNi][4];

  __device__ __forceinline__ void zero() {
#pragma unroll
    for (int i = 0; i < kMi; ++i)
#pragma unroll
      for (int j = 0; j < kNi; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.0f;
  }

  // One value of an fp32 MN-major tile: ldmatrix.trans moves 16-bit pairs and cannot transpose 32-bit values.
  template <class Sw>
  __device__ __forceinline__ static uint32_t load_mn(const unsigned char* tile, int k, int mn) {
    return *reinterpret_cast<const uint32_t*>(tile + Sw::offset(k, mn >> 2) + (mn & 3) * 4);
  }
  template <int N>
  __device__ __forceinline__ static void round_tf32(uint32_t (&r)[N]) {
    if constexpr (kFloat) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float x;
        memcpy(&x, &r[i], 4);
        r[i] = ptx::to_tf32(x);  // without it the tensor core truncates: twice the error
      }
    }
  }

  __device__ __forceinline__ static void load_a(uint32_t (&a)[4], const unsigned char* tile, int kk, int m, int lane) {
    if constexpr (!AMn) {
      ptx::ldmatrix_x4(a, tile + SwizzleA::offset(m + (lane & 15), kk * 2 + (lane >> 4)));
    } else if constexpr (!kFloat) {
      int k = kk * 16 + ((lane >> 4) << 3) + (lane & 7);
      ptx::ldmatrix_x4_trans(a, tile + SwizzleA::offset(k, m / 8 + (lane >> 3 & 1)));
    } else {
      int g = lane >> 2, t = lane & 3;
#pragma unroll
      for (int e = 0; e < 4; ++e) a[e] = load_mn<SwizzleA>(tile, kk * 8 + t + (e >> 1) * 4, m + g + (e & 1) * 8);
    }
    round_tf32(a);
  }

  // Two fragments of 8 columns: b[0..1] for columns n.., b[2..3] for n + 8...
  __device__ __forceinline__ static void load_b(uint32_t (&b)[4], const unsigned char* tile, int kk, int n, int lane) {
    if constexpr (!BMn) {
      ptx::ldmatrix_x4(b, tile + SwizzleB::offset(n + ((lane >> 4) << 3) + (lane & 7), kk * 2 + (lane >> 3 & 1)));
    } else if constexpr (!kFloat) {
      int k = kk * 16 + ((lane >> 3 & 1) << 3) + (lane & 7);
      ptx::ldmatrix_x4_trans(b, tile + SwizzleB::offset(k, n / 8 + (lane >> 4)));
    } else {
      int g = lane >> 2, t = lane & 3;
#pragma unroll
      for (int e = 0; e < 4; ++e) b[e] = load_mn<SwizzleB>(tile, kk * 8 + t + (e & 1) * 4, n + g + (e >> 1) * 8);
    }
    round_tf32(b);
  }

  __device__ __forceinline__ void multiply(const unsigned char* a_tile, const unsigned char* b_tile, int m, int n,
                                           int lane) {
#pragma unroll
    for (int kk = 0; kk < kSteps; ++kk) {
      uint32_t a[kMi][4];
#pragma unroll
      for (int i = 0; i < kMi; ++i) load_a(a[i], a_tile, kk, m + i * 16, lane);
#pragma unroll
      for (int j = 0; j < kNi / 2; ++j) {
        uint32_t b[4];
        load_b(b, b_tile, kk, n + j * 16, lane);
        uint32_t lo[2] = {b[0], b[1]}, hi[2] = {b[2], b[3]};
#pragma unroll
        for (int i = 0; i < kMi; ++i) {
          if constexpr (kFloat) {
            ptx::mma_m16n8k8_tf32(acc[i][2 * j], a[i], lo);
            ptx::mma_m16n8k8_tf32(acc[i][2 * j + 1], a[i], hi);
          } else {
            ptx::mma_m16n8k16(acc[i][2 * j], a[i], lo, T{});
            ptx::mma_m16n8k16(acc[i][2 * j + 1], a[i], hi, T{});
          }
        }
      }
    }
  }

  // Rows [16 i, 16 i + 16) of the warp tile to stage[16][ld].
  __device__ __forceinline__ void store_slab(int i, float* stage, int ld, int lane) const {
    int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int ii = 0; ii < kMi; ++ii) {  // a loop over constants keeps the accumulators in registers
      if (ii != i) continue;
#pragma unroll
      for (int j = 0; j < kNi; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          *reinterpret_cast<float2*>(stage + (g + half * 8) * ld + j * 8 + t * 2) =
              make_float2(acc[ii][j][half * 2], acc[ii][j][half * 2 + 1]);
    }
  }
};

template <class T, int WM_, int WN_, int KBytes, bool AMn, bool BMn, int BM, int BN>
struct SimtEngine {
  static constexpr int WM = WM_, WN = WN_;
  static_assert(std::is_same_v<T, float>, "the exact engine is fp32");
  static_assert(WM % 16 == 0 && WN % 32 == 0, "lanes form a 4 x 8 grid of 4-wide vectors");
  static constexpr int kTm = WM / 4, kTn = WN / 8;
  static constexpr int kVecs = KBytes / 16;  // groups of 4 k
  using SwizzleA = Swizzle<AMn ? BM * 4 : KBytes, AMn>;
  using SwizzleB = Swizzle<BMn ? BN * 4 : KBytes, BMn>;

  float acc[kTm][kTn];

  __device__ __forceinline__ void zero() {
#pragma unroll
    for (int i = 0; i < kTm; ++i)
#pragma unroll
      for (int j = 0; j < kTn; ++j) acc[i][j] = 0.0f;
  }

  // Which row of the warp tile accumulator i of lane row `l` (of `lanes`) is. MN-major operands come 4 at a time along
  // mn; K-major ones interleave, so that neighbouring lanes read neighbouring shared rows (no bank conflict under the
  // swizzle).
  template <bool Mn>
  __device__ __forceinline__ static int index(int i, int l, int lanes) {
    return Mn ? (i >> 2) * lanes * 4 + l * 4 + (i & 3) : i * lanes + l;
  }

  // values[i][k] for 4 consecutive k.
  template <bool Mn, class Sw, int Count>
  __device__ __forceinline__ static void load(float (&values)[Count][4], const unsigned char* tile, int kv, int mn,
                                              int l, int lanes) {
    if constexpr (!Mn) {
#pragma unroll
      for (int i = 0; i < Count; ++i) {
        float4 v = *reinterpret_cast<const float4*>(tile + Sw::offset(mn + index<Mn>(i, l, lanes), kv));
        values[i][0] = v.x, values[i][1] = v.y, values[i][2] = v.z, values[i][3] = v.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < Count; i += 4)
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          float4 v =
              *reinterpret_cast<const float4*>(tile + Sw::offset(kv * 4 + k, (mn + index<Mn>(i, l, lanes)) >> 2));
          values[i][k] = v.x, values[i + 1][k] = v.y, values[i + 2][k] = v.z, values[i + 3][k] = v.w;
        }
    }
  }

  __device__ __forceinline__ void multiply(const unsigned char* a_tile, const unsigned char* b_tile, int m, int n,
                                           int lane) {
#pragma unroll
    for (int kv = 0; kv < kVecs; ++kv) {
      float a[kTm][4], b[kTn][4];
      load<AMn, SwizzleA>(a, a_tile, kv, m, lane >> 3, 4);
      load<BMn, SwizzleB>(b, b_tile, kv, n, lane & 7, 8);
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < kTm; ++i)
#pragma unroll
          for (int j = 0; j < kTn; ++j) acc[i][j] = fmaf(a[i][k], b[j][k], acc[i][j]);
    }
  }

  __device__ __forceinline__ void store_slab(int slab, float* stage, int ld, int lane) const {
    // either index() maps accumulators 4 s .. 4 s + 3 to rows 16 s .. 16 s + 15
#pragma unroll
    for (int s = 0; s < WM / 16; ++s) {
      if (s != slab) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < kTn; ++j)
          stage[index<AMn>(i, lane >> 3, 4) * ld + index<BMn>(j, lane & 7, 8)] = acc[s * 4 + i][j];
    }
  }
};

}  // namespace fastconv
