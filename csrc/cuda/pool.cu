// Entry point of the pooling kernels.
#include "api.h"
#include "kernels/pool.cuh"
#include "launch_dtype.cuh"

namespace fastconv {

std::string pool(const PoolCall& c, LaunchStream stream) {
  return for_dtype(c.dtype, [&](auto t) {
    using T = decltype(t);
    const PoolParams<T> p{static_cast<const T*>(c.in), static_cast<T*>(c.out), c.offsets, c.shape};
    return launch_pool(c.kind, c.backward != 0, p, static_cast<Stream>(stream));
  });
}

}  // namespace fastconv
