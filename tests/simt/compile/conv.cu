// Instantiates every kernel of the family for FASTCONV_DTYPE: resources.py compiles it for each architecture, no GPU
// needed.
#include "conv_launch.cuh"

namespace fastconv {
#define FASTCONV_INSTANTIATE(T)                                        \
  template Status launch_conv_fprop<T>(const ConvProblem<T>&, Stream); \
  template Status launch_conv_dgrad<T>(const ConvProblem<T>&, Stream); \
  template Status launch_conv_wgrad<T>(const ConvProblem<T>&, Stream);
FASTCONV_INSTANTIATE(FASTCONV_DTYPE)
}  // namespace fastconv
