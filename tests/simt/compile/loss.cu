// Instantiates every kernel of the family for FASTCONV_DTYPE: resources.py compiles it for each architecture, no GPU
// needed.
#include "cross_entropy_backward.cuh"

namespace fastconv {
#define FASTCONV_INSTANTIATE(T)                                          \
  template Status launch_cross_entropy<T>(const LossParams<T>&, Stream); \
  template Status launch_cross_entropy_backward<T>(const LossBackwardParams<T>&, Stream);
FASTCONV_INSTANTIATE(FASTCONV_DTYPE)
}  // namespace fastconv
