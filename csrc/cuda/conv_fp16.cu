// The convolution kernels in fp16.
#include "launch_conv.cuh"

namespace fastconv {

template Status call_conv<__half>(const ConvCall&, Stream);
template int call_conv_tile_rows<__half>(const ConvCall&);

}  // namespace fastconv
