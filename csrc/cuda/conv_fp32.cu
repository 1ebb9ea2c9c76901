// The convolution kernels in fp32.
#include "launch_conv.cuh"

namespace fastconv {

template Status call_conv<float>(const ConvCall&, Stream);
template int call_conv_tile_rows<float>(const ConvCall&);

}  // namespace fastconv
