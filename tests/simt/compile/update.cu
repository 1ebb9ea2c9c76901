// Instantiates every kernel of the family: resources.py compiles it for each architecture, no GPU needed. It takes any
// dtype at run time; FASTCONV_DTYPE changes nothing.
#include "update.cuh"

namespace fastconv {
#define FASTCONV_INSTANTIATE(RULE) \
  template Status launch_update<UpdateRule::RULE>(const double*, const UpdateTensor*, int, Stream);
FASTCONV_INSTANTIATE(kPlainSgd)
FASTCONV_INSTANTIATE(kSgd)
FASTCONV_INSTANTIATE(kAdam)
}  // namespace fastconv
