// Small kernels that pin the fragment layouts and the emulator's own faults. They use nothing but ptx.cuh, so the same
// checks can run once on a GPU.
#pragma once

#include "common.cuh"
#include "launch.cuh"

namespace fastconv {

// d[16][8] = a[16][16] b[16][8] by one mma; a, b, d row-major. Fragments are filled by the documented layout.
template <class T>
__global__ void mma16_kernel(const T* a, const T* b, float* d) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  auto pack = [](T lo, T hi) {
    Vec<T, 2> v{{lo, hi}};
    uint32_t u;
    memcpy(&u, &v, 4);
    return u;
  };
  uint32_t fa[4], fb[2];
  for (int e = 0; e < 4; ++e) {
    const T* p = a + (g + (e & 1) * 8) * 16 + t * 2 + (e >> 1) * 8;
    fa[e] = pack(p[0], p[1]);
  }
  for (int e = 0; e < 2; ++e) fb[e] = pack(b[(t * 2 + e * 8) * 8 + g], b[(t * 2 + e * 8 + 1) * 8 + g]);
  float acc[4] = {0, 0, 0, 0};
  ptx::mma_m16n8k16(acc, fa, fb, T{});
  for (int e = 0; e < 4; ++e) d[(g + (e >> 1) * 8) * 8 + t * 2 + (e & 1)] = acc[e];
}

// d[16][8] = a[16][8] b[8][8] in tf32.
__global__ inline void mma_tf32_kernel(const float* a, const float* b, float* d) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  uint32_t fa[4], fb[2];
  for (int e = 0; e < 4; ++e) fa[e] = ptx::to_tf32(a[(g + (e & 1) * 8) * 8 + t + (e >> 1) * 4]);
  for (int e = 0; e < 2; ++e) fb[e] = ptx::to_tf32(b[(t + e * 4) * 8 + g]);
  float acc[4] = {0, 0, 0, 0};
  ptx::mma_m16n8k8_tf32(acc, fa, fb);
  for (int e = 0; e < 4; ++e) d[(g + (e >> 1) * 8) * 8 + t * 2 + (e & 1)] = acc[e];
}

// out[lane][8]: the 8 values that lane holds after ldmatrix.x4 of four 8x8 tiles stored one after another, rows `pitch`
// apart.
__global__ inline void ldmatrix_kernel(const uint16_t* tiles, uint16_t* out, int trans, int pitch) {
  SMEM_ARRAY(uint4, shared, 32 * 8);
  auto* words = reinterpret_cast<uint16_t*>(shared);
  const int lane = threadIdx.x;
  for (int i = 0; i < 8; ++i) words[lane * pitch + i] = tiles[lane * 8 + i];
  __syncwarp();
  uint32_t r[4];
  if (trans) {
    ptx::ldmatrix_x4_trans(r, words + lane * pitch);
  } else {
    ptx::ldmatrix_x4(r, words + lane * pitch);
  }
  memcpy(out + lane * 8, r, 16);
}

// Reverses 64 values through shared memory by cp.async; fault: 0 none, 1 no wait, 2 no barrier, 3 misaligned source,
// 4 divergent barrier, 5 a thread leaves early, 6 warps shuffle at different places, 7 past the end of dynamic shared
// memory.
__global__ inline void fault_kernel(const float* in, float* out, int fault) {
  DYN_SMEM(smem);
  auto* shared = reinterpret_cast<float*>(smem);
  const int t = threadIdx.x;
  if (fault == 5 && t == 40) return;
  if (fault == 6) {
    if (t % 2) {
      out[t] = __shfl_xor_sync(kFullMask, in[t], 1);
    } else {
      out[t] = __shfl_xor_sync(kFullMask, in[t], 2);
    }
  }
  if (fault == 3) {
    if (t < 16) ptx::cp_async<16>(shared + t * 4, in + t * 4 + 1, t < 15);
  } else if (t < 16) {
    ptx::cp_async<16>(shared + t * 4, in + t * 4, true);
  }
  ptx::cp_async_commit();
  if (fault != 1) ptx::cp_async_wait<0>();
  if (fault == 4) {
    if (t < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if (fault != 2) {
    __syncthreads();
  }
  if (fault == 7) shared[64 + t] = 1.0f;
  out[t] = shared[63 - t];
}

}  // namespace fastconv
