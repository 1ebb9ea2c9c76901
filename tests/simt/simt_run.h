// The names that CUDA gives a kernel (threadIdx, __syncthreads, shuffles, shared memory), and the launch.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <type_traits>

#include "simt.h"

#define threadIdx (::simt::g.cur->tid)
#define blockIdx (::simt::g.block_id)
#define blockDim (::simt::g.block)
#define gridDim (::simt::g.grid)

namespace simt {

// One allocation per declaration site and template instance; every thread of a block gets the same address.
inline unsigned char* static_smem(const void* key, size_t bytes) {
  Hidden hidden;
  for (auto& s : g.statics)
    if (s.key == key) return s.data;
  auto* data = static_cast<unsigned char*>(std::aligned_alloc(128, (bytes + 127) / 128 * 128));
  std::memset(data, kPoison, bytes);
  g.statics.push_back({key, data, bytes});
  return data;
}

inline void run_block() {
  Hidden hidden;
  for (int t = 0; t < g.threads; ++t) reset_fiber(t);
  for (int w = 0; w < g.nwarps; ++w) {
    g.warps[w].ready = kFullMask;
    g.warps[w].arrived = 0;
  }
  for (auto& s : g.statics) std::memset(s.data, kPoison, s.bytes);
  if (g.dyn_bytes) std::memset(g.dyn_smem, kPoison, g.dyn_bytes);
  g.alive = g.threads;
  g.barrier_count = 0;
  ++g.counters.blocks;
  Fiber* first = next_ready(g.nwarps - 1, 31);
  ordered_before(&g.start_tag);
  switch_fiber(&g.main_sp, first, first->sp);
  ordered_after(&g.end_tag);
}

template <class Kernel, class... Args>
std::string run(Kernel kernel, dim3 grid, dim3 block, size_t smem, Args... args) {
  g.error.clear();
  ++g.launches[reinterpret_cast<const void*>(kernel)];
  g.grid = grid;
  g.block = block;
  g.threads = static_cast<int>(block.x * block.y * block.z);
  g.nwarps = g.threads / 32;
  if (g.threads < 32 || g.threads > kMaxThreads || g.threads % 32)
    return "block size must be a multiple of 32, at most 1024";
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) return "grid is too large";
  if (smem > 227 * 1024) return "more than 227 KiB of dynamic shared memory";
  int64_t blocks = static_cast<int64_t>(grid.x) * grid.y * grid.z;
  if (blocks == 0) return "empty grid";
  auto call = [&] { kernel(args...); };
  g.entry = [](void* p) { (*static_cast<decltype(call)*>(p))(); };
  g.entry_arg = &call;
  g.dyn_bytes = smem;
  void* dyn = nullptr;
  if (smem && posix_memalign(&dyn, 1024, smem)) return "no memory";
  g.dyn_smem = static_cast<unsigned char*>(dyn);
  g.rng = g.seed * 0x9E3779B97F4A7C15ull + 0x1234567ull;
#if defined(__SANITIZE_ADDRESS__)
  {  // the bounds of this thread's own stack, which the fibers come back to
    pthread_attr_t attr;
    void* base = nullptr;
    pthread_getattr_np(pthread_self(), &attr);
    pthread_attr_getstack(&attr, &base, &g.main_stack_bytes);
    pthread_attr_destroy(&attr);
    g.main_stack = base;
  }
#endif
#if defined(__SANITIZE_THREAD__)
  g.main_tsan = __tsan_get_current_fiber();
#endif
  // A step coprime to the count visits every block once, in an order that the seed chooses.
  int64_t step = 1, start = 0;
  if (g.seed && blocks > 1) {
    start = random_u32() % blocks;
    do step = 1 + random_u32() % blocks;
    while (std::gcd(step, blocks) != 1);
  }
  for (int64_t i = 0, b = start; i < blocks && g.error.empty(); ++i, b = (b + step) % blocks) {
    g.block_id.x = static_cast<unsigned>(b % grid.x);
    g.block_id.y = static_cast<unsigned>(b / grid.x % grid.y);
    g.block_id.z = static_cast<unsigned>(b / grid.x / grid.y);
    run_block();
  }
  g.cur = nullptr;
  for (auto& s : g.statics) std::free(s.data);
  g.statics.clear();
  std::free(dyn);
  g.dyn_smem = nullptr;
  return g.error;
}

template <class T, class Pick>
T shuffle(unsigned mask, T value, int width, Pick pick, const char* file, int line) {
  struct Arg {
    T in, out;
    int source;
  };
  int lane = g.cur->lane;
  int base = lane / width * width;
  int source = pick(lane - base);
  Arg arg{value, value, source >= 0 && source < width ? base + source : lane};
  collective(
      mask,
      [](void* const* args, unsigned m) {
        for (int i = 0; i < 32; ++i) {
          if (!(m >> i & 1)) continue;
          auto* a = static_cast<Arg*>(args[i]);
          if (!(m >> a->source & 1)) fail("shuffle reads a lane outside its mask");
          a->out = static_cast<Arg*>(args[a->source])->in;
        }
      },
      &arg, file, line);
  return arg.out;
}

}  // namespace simt

#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(SIMT_HERE) { simt::barrier(file, line); }
inline void __syncwarp(unsigned mask = simt::kFullMask, SIMT_HERE) {
  if (!simt::skipped(file, line)) simt::collective(mask, nullptr, nullptr, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32, SIMT_HERE) {
  return simt::shuffle(mask, v, width, [x](int lane) { return lane ^ x; }, file, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, int d, int width = 32, SIMT_HERE) {
  return simt::shuffle(mask, v, width, [d](int lane) { return lane + d; }, file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, int d, int width = 32, SIMT_HERE) {
  return simt::shuffle(mask, v, width, [d](int lane) { return lane - d; }, file, line);
}
template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, SIMT_HERE) {
  return simt::shuffle(mask, v, width, [source](int) { return source; }, file, line);
}

// Shared memory: the same two macros exist for nvcc in ptx.cuh.
#define SMEM_ARRAY(type, name, count) \
  static char name##_key;             \
  auto& name = *reinterpret_cast<type(*)[count]>(::simt::static_smem(&name##_key, sizeof(type) * (count)))
#define DYN_SMEM(name) unsigned char* name = ::simt::g.dyn_smem
// x86 takes what a GPU faults on.
#define VECTOR_ACCESS(p, bytes)                                           \
  if (reinterpret_cast<uintptr_t>(static_cast<const void*>(p)) % (bytes)) \
  ::simt::fail("misaligned access of " + std::to_string(bytes) + " bytes")

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
