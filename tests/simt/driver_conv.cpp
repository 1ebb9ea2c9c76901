// Entry points of the convolution kernels for ctypes (tests/simt/simt_lib.py mirrors the struct).
#include "conv_depthwise.cuh"
#include "conv_launch.cuh"
#include "driver.h"

#include <cxxabi.h>

#include <typeinfo>

using namespace fastconv;

struct ConvCall {
  const void *a, *b, *bias, *residual, *grad_saved;
  const float *scale, *shift, *pro_scale, *pro_shift;
  void *out, *preact;
  float *stat_mean, *stat_m2, *partial;
  ConvShape shape;
  int dtype, act, pro_act, tile, splits, tensor, kind;  // kind: 0 fprop, 1 dgrad, 2 wgrad; +3: depthwise
};

#ifndef FASTCONV_SIMT_DTYPES
#define FASTCONV_SIMT_DTYPES 7
#endif

template <class T>
static Status call(const ConvCall& c) {
  ConvProblem<T> p{};
  p.a = static_cast<const T*>(c.a);
  p.b = static_cast<const T*>(c.b);
  p.shape = c.shape;
  p.prologue = {c.pro_scale, c.pro_shift, static_cast<Activation>(c.pro_act)};
  p.epilogue = {static_cast<T*>(c.out),
                static_cast<const T*>(c.bias),
                c.scale,
                c.shift,
                static_cast<const T*>(c.residual),
                static_cast<T*>(c.preact),
                static_cast<const T*>(c.grad_saved),
                c.stat_mean,
                c.stat_m2,
                c.partial,
                static_cast<Activation>(c.act)};
  p.tile = c.tile;
  p.splits = c.splits;
  p.tensor = c.tensor != 0;
  if (c.kind == 0) return launch_conv_fprop(p, nullptr);
  if (c.kind == 1) return launch_conv_dgrad(p, nullptr);
  if (c.kind == 2) return launch_conv_wgrad(p, nullptr);
  DepthwiseParams<T> d{p.a, p.b, p.shape, p.prologue, p.epilogue, p.splits};
  if (c.kind == 3) return launch_depthwise<T, false>(d, nullptr);
  if (c.kind == 4) return launch_depthwise<T, true>(d, nullptr);
  return launch_depthwise_wgrad(d, nullptr);
}

extern "C" int simt_conv(const ConvCall* c) {
#if FASTCONV_SIMT_DTYPES == 7
  return for_dtype(c->dtype, [&](auto t) { return call<decltype(t)>(*c); });
#else
  return report(call<__nv_bfloat16>(*c));
#endif
}

extern "C" int simt_conv_tile_rows(const ConvCall* c) {
  ConvProblem<__half> h{};  // alignment and channel count in 2-byte elements
  ConvProblem<float> f{};
  h.a = static_cast<const __half*>(c->a), h.b = static_cast<const __half*>(c->b);
  f.a = static_cast<const float*>(c->a), f.b = static_cast<const float*>(c->b);
  h.shape = f.shape = c->shape;
  h.tile = f.tile = c->tile;
  h.tensor = f.tensor = c->tensor != 0;
  return c->dtype == 0 ? conv_tile_rows(f) : conv_tile_rows(h);
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
