// From ConvCall to the launch functions of one dtype. conv_<dtype>.cu instantiate it, so that they compile side by
// side.
#pragma once

#include "api.h"
#include "kernels/conv_depthwise.cuh"
#include "kernels/conv_launch.cuh"

namespace fastconv {

template <class T>
ConvProblem<T> conv_problem(const ConvCall& c) {
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
                static_cast<const T*>(c.norm_x),
                c.norm_mean,
                c.norm_invstd,
                c.norm_weight,
                c.norm_bias,
                c.sum_g,
                c.sum_gx,
                static_cast<Activation>(c.act)};
  p.tile = c.tile;
  p.splits = c.splits;
  p.tensor = c.tensor != 0;
  p.keep_parts = c.keep_parts != 0;
  return p;
}

template <class T>
Status call_conv(const ConvCall& c, Stream stream) {
  const ConvProblem<T> p = conv_problem<T>(c);
  const DepthwiseParams<T> d{p.a, p.b, p.shape, p.prologue, p.epilogue, p.splits};
  switch (c.kind) {
    case kFprop:
      return launch_conv_fprop(p, stream);
    case kDgrad:
      return launch_conv_dgrad(p, stream);
    case kWgrad:
      return launch_conv_wgrad(p, stream);
    case kDepthwiseFprop:
      return launch_depthwise<T, false>(d, stream);
    case kDepthwiseDgrad:
      return launch_depthwise<T, true>(d, stream);
    case kDepthwiseWgrad:
      return launch_depthwise_wgrad(d, stream);
    default:
      return {"conv: unknown kind"};
  }
}

template <class T>
int call_conv_tile_rows(const ConvCall& c) {
  const ConvProblem<T> p = conv_problem<T>(c);
  return c.kind == kDgrad ? conv_tile_rows<T, true>(p) : conv_tile_rows<T, false>(p);
}

}  // namespace fastconv
