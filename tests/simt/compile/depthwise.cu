// Instantiates every kernel of the family for FASTCONV_DTYPE: resources.py compiles it for each architecture, no GPU
// needed.
#include "conv_depthwise.cuh"

namespace fastconv {
#define FASTCONV_INSTANTIATE(T)                                                  \
  template Status launch_depthwise<T, false>(const DepthwiseParams<T>&, Stream); \
  template Status launch_depthwise<T, true>(const DepthwiseParams<T>&, Stream);  \
  template Status launch_depthwise_wgrad<T>(DepthwiseParams<T>, Stream);
FASTCONV_INSTANTIATE(FASTCONV_DTYPE)
}  // namespace fastconv
