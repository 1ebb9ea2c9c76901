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

#include <cxxabi.h>

#include <typeinfo>

#include "conv2d_config.h"
#include "driver.h"

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

// "traits|threads|dynamic shared memory" of every convolution kernel, for resources.py: what the compiler cannot see.
template <class Tr>
static void describe(std::string& out) {
  char* name = abi::__cxa_demangle(typeid(Tr).name(), nullptr, nullptr, nullptr);
  out += std::string(name) + "|" + std::to_string(Tr::kThreads) + "|" + std::to_string(Tr::kSmem) + "\n";
  std::free(name);
}
template <class T, bool D, bool P>
static void describe_tiles(std::string& out) {
  describe<TensorTile<T, D, P, 0>>(out), describe<TensorTile<T, D, P, 1>>(out), describe<TensorTile<T, D, P, 2>>(out);
  describe<TensorTile<T, D, P, 3>>(out), describe<TensorTile<T, D, P, 4>>(out), describe<TensorTile<T, D, P, 5>>(out);
  describe<NarrowTile<T, D, P>>(out);
}
template <bool D, bool P>
static void describe_exact(std::string& out) {
  describe<ExactTile<D, P, 0>>(out), describe<ExactTile<D, P, 1>>(out), describe<ExactTile<D, P, 2>>(out);
  describe<ExactNarrowTile<D, P>>(out);
}
template <class T, bool X>
static void describe_wgrad(std::string& out) {
  constexpr int kOne = sizeof(T);
  describe<WgradTile<T, X, 0, 16, 16>>(out), describe<WgradTile<T, X, 1, 16, 16>>(out);
  describe<WgradTile<T, X, 0, 16, kOne>>(out), describe<WgradTile<T, X, 0, kOne, kOne>>(out);
}
template <class T>
static void describe_all(std::string& out) {
  describe_tiles<T, false, false>(out), describe_tiles<T, false, true>(out), describe_tiles<T, true, false>(out);
  describe_wgrad<T, true>(out);
}

extern "C" const char* simt_conv_table() {
  static std::string out;
  out.clear();
  describe_all<__half>(out), describe_all<__nv_bfloat16>(out), describe_all<float>(out);
  describe_exact<false, false>(out), describe_exact<false, true>(out), describe_exact<true, false>(out);
  describe_wgrad<float, false>(out);
  return out.c_str();
}
