// The convolution's entry points: one dtype from three.
#include "api.h"
#include "kernels/launch.cuh"
#include "launch_dtype.cuh"

namespace fastconv {

template <class T>
Status call_conv(const ConvCall& c, Stream stream);
template <class T>
int call_conv_tile_rows(const ConvCall& c);
#define FASTCONV_EXTERN(T)                                      \
  extern template Status call_conv<T>(const ConvCall&, Stream); \
  extern template int call_conv_tile_rows<T>(const ConvCall&);
FASTCONV_EXTERN(float)
FASTCONV_EXTERN(__half)
FASTCONV_EXTERN(__nv_bfloat16)

std::string conv(const ConvCall& c, LaunchStream stream) {
  return for_dtype(c.dtype, [&](auto t) { return call_conv<decltype(t)>(c, static_cast<Stream>(stream)); });
}

int conv_tile_rows(const ConvCall& c) {
  return c.dtype == 0   ? call_conv_tile_rows<float>(c)
         : c.dtype == 1 ? call_conv_tile_rows<__half>(c)
                        : call_conv_tile_rows<__nv_bfloat16>(c);
}

}  // namespace fastconv
