// Instantiates every kernel of the family for FASTCONV_DTYPE: resources.py compiles it for each architecture, no GPU
// needed.
#include "pool.cuh"

namespace fastconv {
#define FASTCONV_INSTANTIATE(T) template Status launch_pool<T>(PoolKind, bool, const PoolParams<T>&, Stream);
FASTCONV_INSTANTIATE(FASTCONV_DTYPE)
}  // namespace fastconv
