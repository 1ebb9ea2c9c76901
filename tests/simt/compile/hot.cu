// The kernels that ResNet50 spends its time in, few enough for every test run to compile them.
#include "conv_launch.cuh"

namespace fastconv {
using Hot = FASTCONV_DTYPE;
template Status run_conv_gemm<TensorTile<Hot, false, false, 2>>(ConvGemmParams<Hot>, Stream);
template Status run_conv_gemm<TensorTile<Hot, true, false, 2>>(ConvGemmParams<Hot>, Stream);
template Status run_conv_wgrad<WgradTile<Hot, true, 0, 16, 16>>(ConvWgradParams<Hot>, Stream);
}  // namespace fastconv
