// A GPU on the CPU: runs CUDA kernels, unchanged, under the host compiler.
//
// Every thread of a block is a fiber with its own stack; a hand-written switch (about 7 ns) moves between them.
// Barriers and warp-collective instructions (shuffles, ldmatrix, mma.sync) are the only places where a fiber gives way.
// Blocks run one after another. With seed 0 the order is fixed; any other seed shuffles the order of blocks, warps and
// lanes, and makes a fiber give way at random after a collective, so that a missing barrier shows as a wrong value.
//
// What makes faults visible: shared memory is filled with 0xFF (NaN) for every block; cp.async reads at issue, poisons
// its destination and fills it only at the covering wait (simt_ptx.h); threads that meet at different barriers, or
// leave while others wait, are an error that names both places; dynamic shared memory is one heap block of exactly the
// requested size, so AddressSanitizer sees an overrun. What it cannot show: time, memory-model reordering, clusters.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <sys/mman.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#ifndef __launch_bounds__
#define __launch_bounds__(...)
#undef __grid_constant__
#define __grid_constant__
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char* file, int line);
extern "C" void AnnotateIgnoreReadsEnd(const char* file, int line);
extern "C" void AnnotateIgnoreWritesBegin(const char* file, int line);
extern "C" void AnnotateIgnoreWritesEnd(const char* file, int line);
#endif

extern "C" __attribute__((visibility("hidden"))) void simt_switch(void** save_sp, void* load_sp);
asm(R"(
.text
.hidden simt_switch
.weak simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");

namespace simt {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kMaxThreads = 1024;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kPoison = 0xFF;

struct Site {
  const char* file = "";
  int line = 0;
  bool operator==(const Site& o) const { return line == o.line && std::strcmp(file, o.file) == 0; }
  std::string str() const { return std::string(file) + ":" + std::to_string(line); }
};

struct AsyncCopy {
  void* dst;
  int bytes;
  unsigned char data[16];
};

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  uint3 tid{};
  int warp = 0, lane = 0;
  bool done = false;
  bool at_barrier = false;
  Site site;
  std::vector<AsyncCopy> open_copies;               // issued, not yet committed
  std::vector<std::vector<AsyncCopy>> copy_groups;  // committed, oldest first
#if defined(__SANITIZE_THREAD__)
  void* tsan = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

using CollectiveFn = void (*)(void* const* args, unsigned mask);

struct Warp {
  unsigned ready = 0;
  unsigned arrived = 0;
  unsigned mask = 0;
  CollectiveFn fn = nullptr;
  Site site;
  void* args[32];
};

// Counted over a launch, read by the tests: proof that a variant took the path that it says it takes.
struct Counters {
  int64_t ldmatrix = 0;            // 8x8 tiles read by ldmatrix
  int64_t ldmatrix_conflicts = 0;  // shared-memory wavefronts beyond the one that each tile needs
  int64_t mma = 0;
  int64_t cp_async16 = 0;
  int64_t cp_async_small = 0;
  int64_t barriers = 0;
  int64_t blocks = 0;
};

struct Gpu {
  Fiber fibers[kMaxThreads];
  Warp warps[kMaxThreads / 32];
  Fiber* cur = nullptr;
  void* main_sp = nullptr;
  int threads = 0, nwarps = 0, alive = 0, barrier_count = 0;
  uint3 block_id{};
  dim3 grid{1, 1, 1}, block{1, 1, 1};
  unsigned char* dyn_smem = nullptr;
  size_t dyn_bytes = 0;
  struct Static {
    const void* key;
    unsigned char* data;
    size_t bytes;
  };
  std::vector<Static> statics;
  uint64_t rng = 0;
  uint64_t seed = 0;
  std::string error;
  Counters counters;
  std::map<const void*, int64_t> launches;  // by kernel
  void (*entry)(void*) = nullptr;
  void* entry_arg = nullptr;
#if defined(__SANITIZE_THREAD__)
  void* main_tsan = nullptr;
#endif
  char sync_tag = 0, start_tag = 0,
       end_tag = 0;  // addresses that stand for an order: of barriers, of a block's start and end
#if defined(__SANITIZE_ADDRESS__)
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
#endif
};

inline Gpu g;

// ThreadSanitizer sees each fiber as a thread. Inside one of these scopes the emulator's own bookkeeping is hidden from
// it; ordered_before / ordered_after state the order that barriers and warp collectives really give.
struct Hidden {
#if defined(__SANITIZE_THREAD__)
  Hidden() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Hidden() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  Hidden() {}
#endif
};
#if defined(__SANITIZE_THREAD__)
inline void ordered_before(void* tag) { __tsan_release(tag); }
inline void ordered_after(void* tag) { __tsan_acquire(tag); }
#else
inline void ordered_before(void*) {}
inline void ordered_after(void*) {}
#endif

// The mutation script's switch: FASTCONV_SIMT_SKIP=file.cuh:line makes the barrier, wait or commit written there do
// nothing.
inline bool skipped(const char* file, int line) {
  static const std::string target = std::getenv("FASTCONV_SIMT_SKIP") ? std::getenv("FASTCONV_SIMT_SKIP") : "";
  if (target.empty()) return false;
  const char* base = std::strrchr(file, '/');
  return target == std::string(base ? base + 1 : file) + ":" + std::to_string(line);
}

inline uint32_t random_u32() {
  g.rng ^= g.rng << 13;
  g.rng ^= g.rng >> 7;
  g.rng ^= g.rng << 17;
  return static_cast<uint32_t>(g.rng >> 32);
}

inline void switch_fiber(void** save, Fiber* to, void* to_sp) {
#if defined(__SANITIZE_ADDRESS__)
  Fiber* from = g.cur;
  void* main_fake = nullptr;
  __sanitizer_start_switch_fiber(from ? &from->fake_stack : &main_fake, to ? to->stack : g.main_stack,
                                 to ? kStackBytes : g.main_stack_bytes);
#endif
  g.cur = to;
#if defined(__SANITIZE_THREAD__)
  // no_sync: only barriers order memory, so that a missing one is a data race
  __tsan_switch_to_fiber(to ? to->tsan : g.main_tsan, 1u);
#endif
  simt_switch(save, to_sp);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from ? from->fake_stack : main_fake, nullptr, nullptr);
#endif
}

[[noreturn]] inline void leave_to_main() {
  void* unused;
  switch_fiber(&unused, nullptr, g.main_sp);
  std::abort();
}

[[noreturn]] inline void fail(const std::string& what) {
  if (g.error.empty()) {
    g.error = what;
    if (g.cur) {
      const Fiber& f = *g.cur;
      g.error += " [block (" + std::to_string(g.block_id.x) + "," + std::to_string(g.block_id.y) + "," +
                 std::to_string(g.block_id.z) + ") thread (" + std::to_string(f.tid.x) + "," + std::to_string(f.tid.y) +
                 "," + std::to_string(f.tid.z) + ")]";
    }
  }
  if (g.cur) leave_to_main();
  std::fprintf(stderr, "simt: %s\n", g.error.c_str());
  std::abort();
}

inline int pick_bit(unsigned mask, int after) {
  int start = g.seed ? static_cast<int>(random_u32() & 31) : (after + 1) & 31;
  unsigned rot = (mask >> start) | (start ? mask << (32 - start) : 0u);
  return (start + __builtin_ctz(rot)) & 31;
}

[[noreturn]] inline void report_deadlock() {
  std::string what = "deadlock: not every thread can reach the same place;";
  int shown = 0;
  for (int t = 0; t < g.threads && shown < 4; ++t) {
    const Fiber& f = g.fibers[t];
    bool seen = false;
    for (int u = 0; u < t; ++u)
      seen |= !g.fibers[u].done && !f.done && g.fibers[u].site == f.site && g.fibers[u].at_barrier == f.at_barrier;
    if (f.done || seen) continue;
    what += " thread " + std::to_string(t) + (f.at_barrier ? " waits at the barrier " : " waits in the warp at ") +
            f.site.str() + ";";
    ++shown;
  }
  if (g.alive < g.threads) what += " " + std::to_string(g.threads - g.alive) + " threads have exited";
  fail(what);
}

// The next fiber that can run: same warp first, so that a warp stays together as on a GPU.
inline Fiber* next_ready(int warp, int lane) {
  if (g.warps[warp].ready) return &g.fibers[warp * 32 + pick_bit(g.warps[warp].ready, lane)];
  int start = g.seed ? static_cast<int>(random_u32() % g.nwarps) : warp + 1;
  for (int i = 0; i < g.nwarps; ++i) {
    int w = (start + i) % g.nwarps;
    if (g.warps[w].ready) return &g.fibers[w * 32 + pick_bit(g.warps[w].ready, 31)];
  }
  return nullptr;
}

inline void give_way() {
  Fiber* self = g.cur;
  Fiber* next = next_ready(self->warp, self->lane);
  if (!next) report_deadlock();
  if (next != self) switch_fiber(&self->sp, next, next->sp);
}

inline void maybe_give_way() {
  if (!g.seed || (random_u32() & 7)) return;
  Fiber* self = g.cur;
  int w = static_cast<int>(random_u32() % g.nwarps);
  Fiber* next = next_ready(w, 31);
  if (next && next != self) switch_fiber(&self->sp, next, next->sp);
}

// All lanes of `mask` meet here; the last one runs fn over all their arguments, which live on the lanes' own stacks.
inline void collective(unsigned mask, CollectiveFn fn, void* arg, const char* file, int line) {
  Hidden hidden;
  Fiber* self = g.cur;
  Warp& w = g.warps[self->warp];
  unsigned bit = 1u << self->lane;
  self->site = {file, line};
  if (!(mask & bit)) fail("warp operation at " + self->site.str() + ": the calling lane is not in its own mask");
  if (!w.arrived) {
    w.fn = fn;
    w.mask = mask;
    w.site = self->site;
  } else if (w.fn != fn || w.mask != mask || !(w.site == self->site)) {
    fail("divergent warp: lanes meet at " + w.site.str() + " and at " + self->site.str());
  }
  w.args[self->lane] = arg;
  w.arrived |= bit;
  ordered_before(&w);
  if (w.arrived == w.mask) {
    w.arrived = 0;
    if (fn) fn(w.args, mask);
    w.ready |= mask;
    maybe_give_way();
  } else {
    w.ready &= ~bit;
    give_way();
  }
  ordered_after(&w);
}

inline void barrier(const char* file, int line) {
  Hidden hidden;
  if (skipped(file, line)) return;
  Fiber* self = g.cur;
  self->site = {file, line};
  self->at_barrier = true;
  ordered_before(&g.sync_tag);
  if (++g.barrier_count == g.threads) {
    for (int t = 0; t < g.threads; ++t)
      if (!(g.fibers[t].site == self->site))
        fail("divergent barrier: threads meet at " + g.fibers[t].site.str() + " and at " + self->site.str());
    g.barrier_count = 0;
    ++g.counters.barriers;
    for (int t = 0; t < g.threads; ++t) g.fibers[t].at_barrier = false;
    for (int w = 0; w < g.nwarps; ++w) g.warps[w].ready = kFullMask;
    maybe_give_way();
  } else {
    g.warps[self->warp].ready &= ~(1u << self->lane);
    give_way();
  }
  ordered_after(&g.sync_tag);
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  ordered_after(&g.start_tag);  // the launch, and the poisoning of shared memory
  g.entry(g.entry_arg);
  ordered_before(&g.end_tag);
  Hidden hidden;
  Fiber* self = g.cur;
  self->done = true;
  --g.alive;
  g.warps[self->warp].ready &= ~(1u << self->lane);
  if (g.alive) give_way();
  leave_to_main();
}

inline void reset_fiber(int t) {
  Fiber& f = g.fibers[t];
  if (!f.stack) {
    void* mem = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mem == MAP_FAILED) fail("no memory for a fiber's stack");
    f.stack = static_cast<char*>(mem);
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(f.stack, kStackBytes);
  f.fake_stack = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  if (!f.tsan) f.tsan = __tsan_create_fiber(0);
#endif
  f.warp = t / 32;
  f.lane = t % 32;
  f.tid.x = t % g.block.x;
  f.tid.y = t / g.block.x % g.block.y;
  f.tid.z = t / (g.block.x * g.block.y);
  f.done = f.at_barrier = false;
  f.site = {"start", 0};
  f.open_copies.clear();
  f.copy_groups.clear();
  void** sp = reinterpret_cast<void**>(f.stack + kStackBytes);
  *--sp = nullptr;  // keeps the stack 16-byte aligned at entry, as after a call
  *--sp = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  f.sp = sp;
}

}  // namespace simt
