// Host side of batch_norm_act: check -> allocate -> split over threads -> kernels/batch_norm.h.

#include <torch/library.h>

#include <algorithm>
#include <cmath>

#include "batch_norm_act.h"
#include "host.h"
#include "parallel.h"

#define FASTCONV_KERNELS "kernels/batch_norm.h"
#include "foreach_isa.h"

namespace fastconv::cpu {
namespace {

template <class A>
void finish_statistics(const A* m2, A* invstd, int64_t rows, double eps, int64_t c0, int64_t c1) {
  for (int64_t c = c0; c < c1; ++c) invstd[c] = A(1) / std::sqrt(m2[c] / A(rows) + A(eps));
}

template <class T>
void forward_training(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& weight,
                      const at::Tensor& shift, const at::Tensor& mean, const at::Tensor& m2, const at::Tensor& invstd,
                      const at::Tensor& out, double eps, Act act) {
  using A = acc_t<T>;
  const int64_t channels = x.size(1), rows = x.numel() / channels;
  const Spans s(rows, channels);
  const T* px = const_data<T>(x);
  A *pmean = data<A>(mean), *pm2 = data<A>(m2), *pinv = data<A>(invstd);
  const at::Tensor scale = at::empty({channels}, acc_options(x));
  const at::Tensor partial = at::empty({s.spans, 2, channels}, acc_options(x));
  A *pscale = data<A>(scale), *ppart = data<A>(partial);
  const A* pw = const_data<A>(weight);
  const auto stats = FASTCONV_PICK(bn_stats<T>);
  const auto add_pivot = FASTCONV_PICK(bn_add_pivot<T>);
  if (s.threads_own_channels) {
    // One region: each thread takes its channels through statistics and normalisation.
    const auto affine = affine_kernel<T>(act);
    const T* pr = const_data<T>(residual);
    T* po = data<T>(out);
    const A* pb = const_data<A>(shift);
    parallel_tasks(s.parts, x.numel(), [&](int64_t begin, int64_t end) {
      const int64_t c0 = s.channel_begin(begin), c1 = s.channel_end(end - 1);
      stats(px, channels, 0, rows, c0, c1, pmean, pm2);
      add_pivot(px, pmean, c0, c1);
      finish_statistics(pm2, pinv, rows, eps, c0, c1);
      for (int64_t c = c0; c < c1; ++c) pscale[c] = pinv[c] * pw[c];
      affine(px, po, nullptr, pr, pmean, pscale, pb, channels, 0, rows, c0, c1, act);
    });
    return;
  }
  // Spans are shared out and joined in order, then rows are shared out.
  const auto merge = FASTCONV_PICK(bn_merge<A>);
  parallel_spans(s, [&](int64_t i, int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
    stats(px, channels, r0, r1, c0, c1, ppart + 2 * i * channels, ppart + (2 * i + 1) * channels);
  });
  std::copy(ppart, ppart + channels, pmean);
  std::copy(ppart + channels, ppart + 2 * channels, pm2);
  for (int64_t i = 1; i < s.spans; ++i) {
    merge(pmean, pm2, s.row_begin(i), ppart + 2 * i * channels, ppart + (2 * i + 1) * channels,
          s.row_end(i) - s.row_begin(i), 0, channels);
  }
  add_pivot(px, pmean, 0, channels);
  finish_statistics(pm2, pinv, rows, eps, 0, channels);
  for (int64_t c = 0; c < channels; ++c) pscale[c] = pinv[c] * pw[c];
  channel_affine(x, out, {}, residual, mean, scale, shift, act);
}

// running = (1 - factor) * running + factor * value
void blend(const at::Tensor& running, const at::Tensor& value, double factor) {
  if (!running.is_inference()) running.unsafeGetTensorImpl()->bump_version();
  if (running.scalar_type() == value.scalar_type() && running.is_contiguous()) {
    dispatch_float("batch_norm_act", running.scalar_type(), [&](auto tag) {
      using A = acc_t<typename decltype(tag)::type>;
      A* r = data<A>(running);
      const A* v = const_data<A>(value);
      for (int64_t c = 0; c < running.numel(); ++c) r[c] = A(1 - factor) * r[c] + A(factor) * v[c];
    });
  } else {  // statistics in a 16-bit type, or a strided view of something larger: rare, so by ATen, rounded once
    running.copy_(running.to(value.scalar_type()).mul_(1 - factor).add_(value, factor));
  }
}

void update_running(const BatchNormArgs& args, const at::Tensor& mean, const at::Tensor& m2, int64_t rows) {
  double factor = 0;
  if (given(args.num_batches_tracked)) {
    const at::Tensor& count = *args.num_batches_tracked;
    if (!count.is_inference()) count.unsafeGetTensorImpl()->bump_version();
    int64_t* n = static_cast<int64_t*>(count.data_ptr());
    *n += 1;
    factor = 1.0 / static_cast<double>(*n);
  }
  if (args.momentum.has_value()) factor = *args.momentum;
  if (rows == 0) return;
  if (given(args.running_mean)) blend(*args.running_mean, mean, factor);
  if (given(args.running_var)) blend(*args.running_var, m2.div(static_cast<double>(rows - 1)), factor);
}

}  // namespace

BatchNormStats eval_stats(const at::Tensor& like, int64_t channels, const BatchNormArgs& args) {
  BatchNormStats stats{at::empty({channels}, acc_options(like)), at::empty({channels}, acc_options(like))};
  stats.mean.copy_(*args.running_mean);
  stats.invstd.copy_(*args.running_var);
  dispatch_float("batch_norm_act", like.scalar_type(), [&](auto tag) {
    using A = acc_t<typename decltype(tag)::type>;
    A* v = data<A>(stats.invstd);
    for (int64_t c = 0; c < channels; ++c) v[c] = A(1) / std::sqrt(v[c] + A(args.eps));
  });
  return stats;
}

BatchNormStats batch_norm_forward(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& out,
                                  const BatchNormArgs& args, Act act) {
  const int64_t channels = x.size(1);
  const at::Tensor weight = channel_vector(args.weight, x, channels, 1.0);
  const at::Tensor shift = channel_vector(args.bias, x, channels, 0.0);
  if (!args.training) {
    BatchNormStats stats = eval_stats(x, channels, args);
    channel_affine(x, out, {}, residual, stats.mean, stats.invstd.mul(weight), shift, act);
    return stats;
  }
  const int64_t rows = x.size(0) * x.size(2) * x.size(3);
  BatchNormStats stats{at::zeros({channels}, acc_options(x)), at::zeros({channels}, acc_options(x))};
  const at::Tensor m2 = at::empty({channels}, acc_options(x));
  if (x.numel() > 0) {
    dispatch_float("batch_norm_act", x.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      forward_training<T>(x, residual, weight, shift, stats.mean, m2, stats.invstd, out, args.eps, act);
    });
  }
  update_running(args, stats.mean, m2, rows);
  return stats;
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor> batch_norm_act(
    const at::Tensor& input, const OptTensor& residual, const OptTensor& weight, const OptTensor& bias,
    const OptTensor& running_mean, const OptTensor& running_var, const OptTensor& num_batches_tracked, bool training,
    std::optional<double> momentum, double eps, c10::string_view activation) {
  constexpr const char* op = "batch_norm_act";
  const PlainDispatch guard;
  const BatchNormArgs args{weight, bias, running_mean, running_var, num_batches_tracked, training, momentum, eps};
  check_float(op, "input", input);
  check_dim(op, "input", input, 4);
  const Act act = parse_act(op, {activation.data(), activation.size()});
  check_residual(op, residual, input, input.sizes());
  check_batch_norm(op, input.sizes(), input, args);

  const at::MemoryFormat format = input.suggest_memory_format();
  const at::Tensor x = nhwc(input);
  const at::Tensor out = empty_nhwc(input.sizes(), input.options(), format);
  BatchNormStats stats = batch_norm_forward(x, given(residual) ? nhwc(*residual) : at::Tensor(), out, args, act);
  return {to_format(out, format), stats.mean, stats.invstd};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastconv, CPU, m) { m.impl("batch_norm_act", &batch_norm_act); }

}  // namespace fastconv::cpu
