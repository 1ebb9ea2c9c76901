// The convolution kernels and their entry points (csrc/cuda), for ctypes and for the host side (host.cpp).
#ifndef FASTCONV_SIMT_DTYPES
#define FASTCONV_SIMT_DTYPES 7
#endif
#if FASTCONV_SIMT_DTYPES == 7
#include "conv.cu"
#include "conv_bf16.cu"
#include "conv_fp16.cu"
#include "conv_fp32.cu"
#else
#include "launch_conv.cuh"
#endif

#include "conv2d_config.h"
#include "driver.h"
#include "launch_table.cuh"

using namespace fastconv;

extern "C" int simt_conv(const ConvCall* c) {
#if FASTCONV_SIMT_DTYPES == 7
  return report(conv(*c, nullptr));
#else
  return report(call_conv<__nv_bfloat16>(*c, nullptr));
#endif
}

extern "C" int simt_conv_tile_rows(const ConvCall* c) {
#if FASTCONV_SIMT_DTYPES == 7
  return conv_tile_rows(*c);
#else
  return call_conv_tile_rows<__nv_bfloat16>(*c);
#endif
}

// The host side's choice: tile * 1000 + splits.
extern "C" int simt_choose_conv(const ConvShape* shape, int kind, int element, int multiprocessors, int stats) {
  const cuda::ConvChoice c =
      cuda::choose_conv(*shape, static_cast<ConvKind>(kind), element, multiprocessors, stats != 0);
  return c.tile * 1000 + c.splits;
}

extern "C" const char* simt_launch_table() {
  static std::string out;
  out = launch_table();
  return out.c_str();
}
