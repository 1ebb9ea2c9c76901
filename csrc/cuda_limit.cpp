#include "cuda_limit.h"

#include <vector>

#include "cuda/kernels/size_limits.h"
#include "host/pool_check.h"
#include "params.h"

namespace fastconv {
namespace {

namespace py = pybind11;
using Sizes = std::vector<int64_t>;

Sizes sizes(const py::handle& tuple) {
  Sizes out;
  for (const py::handle v : py::reinterpret_borrow<py::tuple>(tuple)) out.push_back(v.cast<int64_t>());
  return out;
}

int64_t elements(const Sizes& shape, size_t from) {
  int64_t all = 1;
  for (size_t i = from; i < shape.size(); ++i) all = product({all, shape[i]});
  return all;
}

std::string conv2d(const Sizes& x, const Sizes& w, const py::tuple& settings, const py::tuple& grads) {
  const Sizes stride = sizes(settings[0]), pad = sizes(settings[1]), dil = sizes(settings[2]);
  ConvParams p{};
  p.n = x[0], p.c = x[1], p.h = x[2], p.w = x[3], p.k = w[0], p.r = w[2], p.s = w[3];
  p.stride_h = stride[0], p.stride_w = stride[1], p.pad_h = pad[0], p.pad_w = pad[1], p.dil_h = dil[0];
  p.dil_w = dil[1], p.groups = settings[3].cast<int64_t>();
  p.p = pool_size(p.h, p.r, p.stride_h, p.pad_h, p.dil_h, false);
  p.q = pool_size(p.w, p.s, p.stride_w, p.pad_w, p.dil_w, false);
  const int depthwise = is_depthwise(p) ? kDepthwiseFprop : kFprop;
  const auto limit = [&](ConvKind kind) { return conv_limit(p, static_cast<ConvKind>(kind + depthwise)); };
  std::string reason = limit(kFprop);
  if (reason.empty() && grads[0].cast<bool>()) reason = limit(kDgrad);
  if (reason.empty() && grads[1].cast<bool>()) reason = limit(kWgrad);
  return reason;
}

std::string pool(PoolKind kind, const Sizes& shape, const py::tuple& settings, bool grad) {
  const size_t first = shape.size() - 3;  // [N, C, H, W] or [C, H, W]
  PoolParams a{};
  a.n = first ? shape[0] : 1, a.c = shape[first], a.h = shape[first + 1], a.w = shape[first + 2];
  const Sizes window = sizes(settings[0]);
  if (kind == PoolKind::kAdaptiveAvg) {
    a.p = window[0], a.q = window[1];
    return pool_limit(a, kind, false);
  }
  const Sizes stride = sizes(settings[1]), pad = sizes(settings[2]);
  const bool max = kind == PoolKind::kMax;
  const Sizes dil = max ? sizes(settings[3]) : Sizes{1, 1};
  const bool ceil_mode = settings[max ? 4 : 3].cast<bool>();
  a.r = window[0], a.s = window[1], a.stride_h = stride[0], a.stride_w = stride[1], a.pad_h = pad[0];
  a.pad_w = pad[1], a.dil_h = dil[0], a.dil_w = dil[1];
  a.p = pool_size(a.h, a.r, a.stride_h, a.pad_h, a.dil_h, ceil_mode);
  a.q = pool_size(a.w, a.s, a.stride_w, a.pad_w, a.dil_w, ceil_mode);
  const bool divides = !max && !settings[5].is_none();
  return pool_limit(a, kind, max && grad, divides ? settings[5].cast<int64_t>() : 0);
}

}  // namespace

std::string cuda_limit(const std::string& op, const py::tuple& shapes, const py::tuple& settings,
                       const py::tuple& grads) {
  const Sizes x = sizes(shapes[0]);
  if (op == "conv2d_bias_act") return conv2d(x, sizes(shapes[1]), settings, grads);
  if (op == "conv2d_bn_act") {
    const Sizes w = sizes(shapes[1]);
    const std::string reason = conv2d(x, w, settings, grads);
    return reason.empty() ? channel_limit(w[0]) : reason;
  }
  if (op == "batch_norm_act") return channel_limit(x[1]);
  if (op == "max_pool2d") return pool(PoolKind::kMax, x, settings, grads[0].cast<bool>());
  if (op == "avg_pool2d") return pool(PoolKind::kAvg, x, settings, grads[0].cast<bool>());
  if (op == "adaptive_avg_pool2d") return pool(PoolKind::kAdaptiveAvg, x, settings, grads[0].cast<bool>());
  if (op == "cross_entropy") {
    if (x.size() == 1) return loss_limit(1, x[0], 1);
    const int64_t d = elements(x, 2);
    return loss_limit(product({x[0], d}), x[1], d);
  }
  throw py::value_error("cuda_limit: op expected a public operator, got " + op);
}

}  // namespace fastconv
