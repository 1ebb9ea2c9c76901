// The convolution kernels in bf16.
#include "launch_conv.cuh"

namespace fastconv {

template Status call_conv<__nv_bfloat16>(const ConvCall&, Stream);
template int call_conv_tile_rows<__nv_bfloat16>(const ConvCall&);

}  // namespace fastconv
