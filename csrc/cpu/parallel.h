// How the per-channel kernels split [rows, channels] over threads.
//
// Sums over rows are formed per span of rows and then joined in order. The spans depend on the number of rows alone, so
// that results do not depend on the number of threads. Threads share the spans and read whole rows: slices of rows, one
// thread's channels each, keep a thread's data together, but were up to 3 times slower (bf16 16x112x112x64: 5.8
// ms, 1.7) where the tensor is larger than the cache, by strides that the prefetcher gives up on. Only a single span
// (64 rows or fewer) is shared out by channels; then a forward pass needs one parallel region.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdint>
#include <new>
#include <numeric>

namespace fastconv::cpu {

constexpr int64_t kSerialElements = 16384;  // below: a parallel region (1-3 us) costs more than it saves
constexpr int64_t kChannelBlock = 32;       // 128 bytes of fp32, 64 of bf16: threads never share a cache line

// Uninitialised memory of one call. A tensor costs a microsecond, which is what the whole of a small batch norm takes.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t n) : memory_(static_cast<A*>(::operator new(n * sizeof(A), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(memory_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  A* get() const { return memory_; }

 private:
  A* memory_;
};

// Rows of few channels fill no vector: `fold` of them side by side, as one row of fold * channels, fill whole ones. The
// last rows (fewer than `fold`) are left over.
struct FoldedRows {
  int64_t fold, rows, channels, rest;
  FoldedRows(int64_t all, int64_t c)
      : fold(c < 16 ? 16 / std::gcd(c, int64_t{16}) : 1), rows(all / fold), channels(c * fold), rest(all % fold) {}
};

struct Spans {
  int64_t rows, channels;
  int64_t span;  // rows per span, a multiple of 64
  int64_t spans;
  int64_t parts;  // channel parts
  int64_t width;  // channels per part, a multiple of kChannelBlock
  bool threads_own_channels;

  Spans(int64_t rows, int64_t channels) : rows(rows), channels(channels) {
    span = std::max<int64_t>(64, (rows + 64 * 64 - 1) / (64 * 64) * 64);
    spans = std::max<int64_t>(1, (rows + span - 1) / span);
    const int64_t threads = rows * channels < kSerialElements ? 1 : at::get_num_threads();
    const int64_t blocks = (channels + kChannelBlock - 1) / kChannelBlock;
    width = std::max<int64_t>(1, (blocks + threads - 1) / threads) * kChannelBlock;
    parts = std::max<int64_t>(1, (channels + width - 1) / width);
    threads_own_channels = spans == 1;
    if (!threads_own_channels) {
      width = std::max<int64_t>(channels, 1);
      parts = 1;
    }
  }

  int64_t row_begin(int64_t i) const { return i * span; }
  int64_t row_end(int64_t i) const { return std::min(rows, (i + 1) * span); }
  int64_t channel_begin(int64_t j) const { return j * width; }
  int64_t channel_end(int64_t j) const { return std::min(channels, (j + 1) * width); }
};

// f(begin, end) over tasks; on one thread if there is little work in all.
template <class F>
void parallel_tasks(int64_t tasks, int64_t elements, const F& f) {
  if (tasks <= 0) return;
  if (elements < kSerialElements || tasks == 1) {
    f(int64_t{0}, tasks);
  } else {
    at::parallel_for(0, tasks, std::max<int64_t>(1, tasks * kSerialElements / 2 / std::max<int64_t>(1, elements)), f);
  }
}

// f(span, r0, r1, c0, c1) over the grid; a thread gets neighbouring spans of the same channels.
template <class F>
void parallel_spans(const Spans& s, const F& f) {
  parallel_tasks(s.parts * s.spans, s.rows * s.channels, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t j = t / s.spans, i = t % s.spans;
      f(i, s.row_begin(i), s.row_end(i), s.channel_begin(j), s.channel_end(j));
    }
  });
}

}  // namespace fastconv::cpu
