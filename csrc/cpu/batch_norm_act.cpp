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
                      const at::Tensor& shift, const at::Tensor& mean, acc_t<T>* pm2, const at::Tensor& invstd,
                      const at::Tensor& out, double eps, Act act) {
  using A = acc_t<T>;
  const int64_t channels = x.size(1), rows = x.numel() / channels;
  const Spans s(rows, channels);
  const T* px = const_data<T>(x);
  A *pmean = data<A>(mean), *pinv = data<A>(invstd);
  const A* pw = const_data<A>(weight);
  const auto stats = FASTCONV_PICK(bn_stats<T>);
  const auto add_pivot = FASTCONV_PICK(bn_add_pivot<T>);
  const auto affine = affine_kernel<T>(act);
  const T* pr = const_data<T>(residual);
  T* po = data<T>(out);
  const A* pb = const_data<A>(shift);
  const Scratch<A> scale(channels);
  A* pscale = scale.get();
  if (s.threads_own_channels) {
    // One region: each thread takes its channels through statistics and normalisation.
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
  const Scratch<A> partial(s.spans * 2 * channels);
  A* ppart = partial.get();
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
  parallel_tasks(rows, x.numel(), [&](int64_t r0, int64_t r1) {
    affine(px, po, nullptr, pr, pmean, pscale, pb, channels, r0, r1, 0, channels, act);
  });
}

// running = (1 - factor) * running + factor * value / divisor
template <class A>
void blend(const at::Tensor& running, const A* value, A divisor, double factor) {
  if (!running.is_inference()) running.unsafeGetTensorImpl()->bump_version();
  const int64_t channels = running.numel();
  if (running.scalar_type() == c10::CppTypeToScalarType<A>::value && running.is_contiguous()) {
    A* r = data<A>(running);
    for (int64_t c = 0; c < channels; ++c) r[c] = A(1 - factor) * r[c] + A(factor) * (value[c] / divisor);
  } else {  // statistics in a 16-bit type, or a strided view of something larger: rare, so by ATen, rounded once
    const at::Tensor copy = at::empty({channels}, running.options().dtype(c10::CppTypeToScalarType<A>::value));
    for (int64_t c = 0; c < channels; ++c) data<A>(copy)[c] = value[c] / divisor;
    running.copy_(running.to(copy.scalar_type()).mul_(1 - factor).add_(copy, factor));
  }
}

// mean, m2: null where there are no rows.
template <class A>
void update_running(const BatchNormArgs& args, const A* mean, const A* m2, int64_t rows) {
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
  if (given(args.running_mean)) blend<A>(*args.running_mean, mean, 1, factor);
  if (given(args.running_var)) blend<A>(*args.running_var, m2, static_cast<A>(rows - 1), factor);
}

}  // namespace

BatchNormStats eval_stats(const at::Tensor& like, int64_t channels, const BatchNormArgs& args) {
  const auto vector = [&] { return at::empty({channels}, acc_options(like)); };
  BatchNormStats stats{vector(), vector(), vector()};
  const at::Tensor mean = channel_vector(args.running_mean, like, channels, 0.0);
  const at::Tensor var = channel_vector(args.running_var, like, channels, 1.0);
  const at::Tensor weight = given(args.weight) ? channel_vector(args.weight, like, channels, 1.0) : at::Tensor();
  dispatch_float("batch_norm_act", like.scalar_type(), [&](auto tag) {
    using A = acc_t<typename decltype(tag)::type>;
    const A *m = const_data<A>(mean), *v = const_data<A>(var), *w = const_data<A>(weight);
    A *to_mean = data<A>(stats.mean), *invstd = data<A>(stats.invstd), *scale = data<A>(stats.scale);
    for (int64_t c = 0; c < channels; ++c) {
      to_mean[c] = m[c];
      invstd[c] = A(1) / std::sqrt(v[c] + A(args.eps));
      scale[c] = w == nullptr ? invstd[c] : invstd[c] * w[c];
    }
  });
  return stats;
}

BatchNormStats batch_norm_forward(const at::Tensor& x, const at::Tensor& residual, const at::Tensor& out,
                                  const BatchNormArgs& args, Act act) {
  const int64_t channels = x.size(1);
  const at::Tensor shift = channel_vector(args.bias, x, channels, 0.0);
  if (!args.training) {
    BatchNormStats stats = eval_stats(x, channels, args);
    channel_affine(x, out, {}, residual, stats.mean, stats.scale, shift, act);
    return stats;
  }
  const at::Tensor weight = channel_vector(args.weight, x, channels, 1.0);
  const int64_t rows = x.size(0) * x.size(2) * x.size(3);
  const auto vector = [&] { return at::empty({channels}, acc_options(x)); };
  BatchNormStats stats{vector(), vector(), {}};
  dispatch_float("batch_norm_act", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    if (x.numel() == 0) {
      stats.mean.zero_(), stats.invstd.zero_();
      return update_running<A>(args, nullptr, nullptr, 0);
    }
    const Scratch<A> m2(channels);
    forward_training<T>(x, residual, weight, shift, stats.mean, m2.get(), stats.invstd, out, args.eps, act);
    update_running<A>(args, const_data<A>(stats.mean), m2.get(), rows);
  });
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
