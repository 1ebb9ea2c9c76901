// Host helpers of the row-class convolution: the buffers that threads keep, and inputs that the kernels need in another
// form.
#pragma once

#include <ATen/Parallel.h>

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <new>
#include <type_traits>

#include "isa.h"
#include "kernels/conv_rows_plan.h"
#include "kernels/conv_rows_types.h"

// The active set's version of a kernel of vectors, and of one on T that has another for tile registers, which are of
// bf16 alone.
#if FASTCONV_X86
#define FASTCONV_VECTORS_PICK(...)                                                           \
  ([] {                                                                                      \
    if (active_isa() >= Isa::avx512_bf16) return &::fastconv::cpu::avx512_bf16::__VA_ARGS__; \
    return FASTCONV_PICK(__VA_ARGS__);                                                       \
  }())
#define FASTCONV_ROWS_PICK(T, ...)                                                       \
  ([] {                                                                                  \
    if constexpr (sizeof(T) == 2) {                                                      \
      if (active_isa() == Isa::amx_bf16) return &::fastconv::cpu::amx_bf16::__VA_ARGS__; \
    }                                                                                    \
    return FASTCONV_VECTORS_PICK(__VA_ARGS__);                                           \
  }())
#else
#define FASTCONV_VECTORS_PICK(...) FASTCONV_PICK(__VA_ARGS__)
#define FASTCONV_ROWS_PICK(T, ...) FASTCONV_PICK(__VA_ARGS__)
#endif

namespace fastconv::cpu::rows_host {

constexpr int64_t kPanelCache = 512 << 10;  // half of a 1 MB L2 for packed panels
constexpr double kSerialWork = 1 << 18;     // multiply-adds; below, a parallel region (2-5 us) costs more than it saves
constexpr int64_t kKeptBytes = 16 << 20;    // a larger buffer goes back at the next smaller request
constexpr int64_t kGatherColumns = 512;     // of a gathered row: beyond, taps have channels enough of their own

template <class T>
inline bool tile_registers() {
  return sizeof(T) == 2 && active_isa() == Isa::amx_bf16;
}

constexpr RowsShape kVectorTile{8, 32};  // of AVX-512

template <class T>
inline RowsShape tile_shape() {
  if (tile_registers<T>()) return {32, 32, 16};
  if (active_isa() >= Isa::avx512) return kVectorTile;
  if (active_isa() == Isa::avx2) return {6, 16};
  return {6, 8};
}

// Half of this machine's L2.
inline int64_t wide_panel_cache() {
#ifdef _SC_LEVEL2_CACHE_SIZE
  static const int64_t bytes = std::clamp<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE) / 2, kPanelCache, 4 * kPanelCache);
  return bytes;
#else
  return kPanelCache;
#endif
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<char, Free>;

inline Buffer allocate(int64_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 64, std::max<int64_t>(bytes, 64)) != 0) throw std::bad_alloc();
  return Buffer(static_cast<char*>(p));
}

// The calling thread's buffers (0: of a share of the work, 1: of a copied input): kept from call to call, so that their
// pages are mapped and in cache. A copied input of one call is read by all threads of that call.
template <int WHICH>
inline char* workspace(int64_t bytes) {
  thread_local Buffer buffer;
  thread_local int64_t size = 0;
  if (bytes > size || (size > kKeptBytes && bytes <= kKeptBytes)) {
    buffer.reset();
    size = 0;
    buffer = allocate(bytes);
    size = bytes;
  }
  return buffer.get();
}

// What the calling thread keeps of a convolution's geometry (plans, tables): making it costs microseconds, as much as a
// small convolution. `variant`: what else it was made from; make() gives a new one.
constexpr size_t kKeptGeometries = 1024;  // several networks' worth; then all are dropped

template <class Made, class Make>
std::shared_ptr<const Made> kept(const ConvParams& p, const std::array<int64_t, 3>& variant, const Make& make) {
  static_assert(std::is_trivially_copyable_v<ConvParams> && sizeof(ConvParams) % sizeof(int64_t) == 0);
  std::array<int64_t, sizeof(ConvParams) / sizeof(int64_t) + 3> key;
  std::memcpy(key.data(), &p, sizeof(p));
  std::copy(variant.begin(), variant.end(), key.end() - 3);
  thread_local std::map<decltype(key), std::shared_ptr<const Made>> all;
  const auto found = all.find(key);
  if (found != all.end()) return found->second;
  std::shared_ptr<const Made> made = make();
  if (all.size() >= kKeptGeometries) all.clear();
  all.emplace(key, made);
  return made;
}

inline int64_t round64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Copies [rows][from] to [rows][to], to > from, with zeros behind.
template <class T>
const T* widen_channels(const T* x, int64_t rows, int64_t from, int64_t to) {
  T* out = reinterpret_cast<T*>(workspace<1>(rows * to * static_cast<int64_t>(sizeof(T))));
  at::parallel_for(0, rows, 4096, [&](int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; ++r) {
      std::memcpy(out + r * to, x + r * from, from * sizeof(T));
      std::memset(out + r * to + from, 0, (to - from) * sizeof(T));
    }
  });
  return out;
}

template <class T>
constexpr int64_t even(int64_t channels) {
  return sizeof(T) == 2 ? (channels + 1) / 2 * 2 : channels;
}

// Few channels (the stem): all taps of a row are gathered to one run of r * s * c elements, from an input with its
// padding written out.
inline bool gathers(const ConvParams& p) {
  return p.c < 16 && p.s > 1 && p.dil_w == 1 && p.r * p.s * p.c <= kGatherColumns;
}

// Forward fp32 reads a filter row as one segment instead, with no copy: 1160 us against 1400 for the stem at batch 64.
// bf16 would need four channels to a pixel for that, and gathers: 750 against 1030.
inline bool gathers_forward(const ConvParams& p, int64_t element) { return element == 2 && gathers(p); }

inline int64_t padded_h(const ConvParams& p) { return p.h + 2 * p.pad_h; }
inline int64_t padded_w(const ConvParams& p) { return p.w + 2 * p.pad_w; }

// The input with its zero padding written out; copies of pieces may read 63 bytes behind it.
template <class T>
const T* pad_input(const ConvParams& p, const T* x) {
  const int64_t hp = padded_h(p), wp = padded_w(p);
  T* out = reinterpret_cast<T*>(workspace<1>(p.n * hp * wp * p.c * static_cast<int64_t>(sizeof(T)) + 64));
  at::parallel_for(0, p.n * hp, 16, [&](int64_t r0, int64_t r1) {
    for (int64_t r = r0; r < r1; ++r) {
      T* row = out + r * wp * p.c;
      const int64_t n = r / hp, h = r % hp - p.pad_h;
      std::memset(static_cast<void*>(row), 0, wp * p.c * sizeof(T));
      if (h >= 0 && h < p.h) std::memcpy(row + p.pad_w * p.c, x + (n * p.h + h) * p.w * p.c, p.w * p.c * sizeof(T));
    }
  });
  return out;
}

}  // namespace fastconv::cpu::rows_host
