// Host side of csrc/cuda/kernels/ptx.cuh: the same functions, emulated by the fragment layouts of the PTX manual
// (ISA 8.x, "Matrix fragments for mma.m16n8k16 / m16n8k8", "ldmatrix", "cp.async").
#pragma once

#include "simt_run.h"

namespace fastconv::ptx {

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline float half_bits_to_float(uint16_t h) {
  _Float16 v;
  std::memcpy(&v, &h, 2);
  return static_cast<float>(v);
}

struct MmaF16 {
  static float get(uint16_t v) { return half_bits_to_float(v); }
};
struct MmaBf16 {
  static float get(uint16_t v) { return bits_to_float(static_cast<uint32_t>(v) << 16); }
};

struct MmaArg {
  float* d;
  const uint32_t* a;
  const uint32_t* b;
};

// Lane = 4 * group + t. D: rows group, group + 8; columns 2t, 2t + 1.
template <int K>
void mma_accumulate(void* const* args, const float (&a)[16][K], const float (&b)[8][K]) {
  for (int lane = 0; lane < 32; ++lane) {
    auto* arg = static_cast<MmaArg*>(args[lane]);
    for (int i = 0; i < 4; ++i) {
      const float* ra = a[lane / 4 + (i / 2) * 8];
      const float* rb = b[(lane % 4) * 2 + (i & 1)];
      float sum = 0;
      for (int k = 0; k < K; ++k) sum += ra[k] * rb[k];
      arg->d[i] += sum;
    }
  }
  ++simt::g.counters.mma;
}

template <class Format>
void mma16_warp(void* const* args, unsigned) {
  float a[16][16], b[8][16];
  for (int lane = 0; lane < 32; ++lane) {
    auto* arg = static_cast<MmaArg*>(args[lane]);
    int group = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r)  // a0: (g, 2t) a1: (g+8, 2t) a2: (g, 2t+8) a3: (g+8, 2t+8), two values each
      for (int e = 0; e < 2; ++e)
        a[group + (r & 1) * 8][t * 2 + e + (r >> 1) * 8] = Format::get(static_cast<uint16_t>(arg->a[r] >> (16 * e)));
    for (int r = 0; r < 2; ++r)  // b0: (k = 2t, n = g) b1: (k = 2t + 8, n = g)
      for (int e = 0; e < 2; ++e)
        b[group][t * 2 + e + r * 8] = Format::get(static_cast<uint16_t>(arg->b[r] >> (16 * e)));
  }
  mma_accumulate(args, a, b);
}

inline void mma_tf32_warp(void* const* args, unsigned) {
  float a[16][8], b[8][8];
  for (int lane = 0; lane < 32; ++lane) {
    auto* arg = static_cast<MmaArg*>(args[lane]);
    int group = lane / 4, t = lane % 4;
    for (int r = 0; r < 4; ++r)  // the hardware reads 19 bits of each operand
      a[group + (r & 1) * 8][t + (r >> 1) * 4] = bits_to_float(arg->a[r] & 0xffffe000u);
    for (int r = 0; r < 2; ++r) b[group][t + r * 4] = bits_to_float(arg->b[r] & 0xffffe000u);
  }
  mma_accumulate(args, a, b);
}

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __half, SIMT_HERE) {
  MmaArg arg{d, a, b};
  simt::collective(simt::kFullMask, mma16_warp<MmaF16>, &arg, file, line);
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], __nv_bfloat16, SIMT_HERE) {
  MmaArg arg{d, a, b};
  simt::collective(simt::kFullMask, mma16_warp<MmaBf16>, &arg, file, line);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SIMT_HERE) {
  MmaArg arg{d, a, b};
  simt::collective(simt::kFullMask, mma_tf32_warp, &arg, file, line);
}

// cvt.rna.tf32.f32: to 10 mantissa bits, ties away from zero.
inline uint32_t to_tf32(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  if ((u & 0x7f800000u) == 0x7f800000u) return u;
  return (u + 0x1000u) & 0xffffe000u;
}

struct LdmatrixArg {
  const void* row;
  uint32_t* out;
};

// Lanes 8i..8i+7 hold the row addresses of tile i; each row is 16 bytes. Plain: lane l gets the pair (row l/4, columns
// 2(l%4), +1). Transposed: lane l gets rows 2(l%4), +1 of column l/4.
template <bool Trans>
void ldmatrix4_warp(void* const* args, unsigned) {
  for (int tile = 0; tile < 4; ++tile) {
    uint16_t rows[8][8];
    int banks[8] = {0};
    for (int i = 0; i < 8; ++i) {
      const void* p = static_cast<LdmatrixArg*>(args[tile * 8 + i])->row;
      auto address = reinterpret_cast<uintptr_t>(p);
      if (address % 16) simt::fail("ldmatrix: a row address is not a multiple of 16");
      bool repeated = false;
      for (int j = 0; j < i; ++j) repeated |= static_cast<LdmatrixArg*>(args[tile * 8 + j])->row == p;
      if (!repeated) ++banks[address / 16 % 8];
      std::memcpy(rows[i], p, 16);
    }
    simt::g.counters.ldmatrix_conflicts += *std::max_element(banks, banks + 8) - 1;
    ++simt::g.counters.ldmatrix;
    for (int lane = 0; lane < 32; ++lane) {
      int x = lane / 4, y = (lane % 4) * 2;
      uint32_t lo = Trans ? rows[y][x] : rows[x][y];
      uint32_t hi = Trans ? rows[y + 1][x] : rows[x][y + 1];
      static_cast<LdmatrixArg*>(args[lane])->out[tile] = lo | hi << 16;
    }
  }
}

// The collective reads the rows on behalf of all lanes, hidden from ThreadSanitizer: each lane reads its own row in the
// open.
inline void touch_row([[maybe_unused]] const void* row) {
#if defined(__SANITIZE_THREAD__)
  unsigned char seen[16];
  std::memcpy(seen, row, 16);
  asm volatile("" ::"r"(seen) : "memory");
#endif
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, SIMT_HERE) {
  touch_row(row);
  LdmatrixArg arg{row, r};
  simt::collective(simt::kFullMask, ldmatrix4_warp<false>, &arg, file, line);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, SIMT_HERE) {
  touch_row(row);
  LdmatrixArg arg{row, r};
  simt::collective(simt::kFullMask, ldmatrix4_warp<true>, &arg, file, line);
}

template <int Bytes>
inline void cp_async(void* dst, const void* src, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  if (reinterpret_cast<uintptr_t>(dst) % Bytes) simt::fail("cp.async: misaligned shared-memory address");
  if (valid && reinterpret_cast<uintptr_t>(src) % Bytes) simt::fail("cp.async: misaligned global address");
  simt::AsyncCopy copy{dst, Bytes, {}};
  if (valid) std::memcpy(copy.data, src, Bytes);
  std::memset(dst, simt::kPoison, Bytes);
  simt::Hidden hidden;
  simt::g.cur->open_copies.push_back(copy);
  ++(Bytes == 16 ? simt::g.counters.cp_async16 : simt::g.counters.cp_async_small);
}
inline void cp_async_commit(SIMT_HERE) {
  simt::Hidden hidden;
  if (simt::skipped(file, line)) return;
  simt::Fiber& f = *simt::g.cur;
  f.copy_groups.push_back(std::move(f.open_copies));
  f.open_copies.clear();
}
template <int Pending>
inline void cp_async_wait(SIMT_HERE) {
  if (simt::skipped(file, line)) return;
  simt::Fiber& f = *simt::g.cur;
  int finish = static_cast<int>(f.copy_groups.size()) - Pending;
  for (int i = 0; i < finish; ++i)
    for (const auto& c : f.copy_groups[i]) std::memcpy(c.dst, c.data, c.bytes);
  if (finish > 0) f.copy_groups.erase(f.copy_groups.begin(), f.copy_groups.begin() + finish);
}

inline void pdl_wait() {}
inline void pdl_launch_dependents() {}

}  // namespace fastconv::ptx
