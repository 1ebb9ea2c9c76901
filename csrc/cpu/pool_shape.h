// The threads of the pooling kernels.
#pragma once

#include "../host/pool_check.h"
#include "host.h"
#include "parallel.h"

namespace fastconv::cpu {

// f(begin, end, c0, c1) over positions, and over channels too where there are few positions (a global pool of a small
// batch).
template <class F>
void parallel_positions(int64_t positions, int64_t channels, int64_t elements, const F& f) {
  constexpr int64_t width = 2 * kChannelBlock;
  const int64_t parts = positions >= 4 * at::get_num_threads() ? 1 : (channels + width - 1) / width;
  if (parts <= 1) {
    parallel_tasks(positions, elements, [&](int64_t begin, int64_t end) { f(begin, end, int64_t{0}, channels); });
    return;
  }
  parallel_tasks(positions * parts, elements, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t o = t / parts, c0 = t % parts * width;
      f(o, o + 1, c0, std::min(channels, c0 + width));
    }
  });
}

}  // namespace fastconv::cpu
