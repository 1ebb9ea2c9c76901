// Instantiates every kernel of the family for FASTCONV_DTYPE: resources.py compiles it for each architecture, no GPU
// needed.
#include "act_backward.cuh"
#include "batch_norm_backward.cuh"
#include "batch_norm_fold.cuh"

namespace fastconv {
#define FASTCONV_INSTANTIATE(T)                                                     \
  template Status launch_act_backward<T>(const ActBackwardParams<T>&, Stream);      \
  template Status launch_batch_norm<T>(const BatchNormParams<T>&, int64_t, Stream); \
  template Status launch_batch_norm_fold<T>(const BatchNormFold&, Stream);          \
  template Status launch_batch_norm_backward<T>(const BatchNormBackwardParams<T>&, int64_t, Stream);
FASTCONV_INSTANTIATE(FASTCONV_DTYPE)
}  // namespace fastconv
