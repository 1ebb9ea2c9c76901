// Host side of batch_norm_act_backward: check -> allocate -> split over threads -> kernels/batch_norm.h.

#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <array>

#include "batch_norm_act.h"
#include "host.h"
#include "parallel.h"

#define FASTCONV_KERNELS "kernels/batch_norm.h"
#include "foreach_isa.h"

namespace fastconv::cpu {
namespace {

template <class T>
struct Kernels {
  using A = acc_t<T>;
  void (*sums)(const BatchNormGrad<T>*, int64_t, int64_t, int64_t, int64_t, A*, A*, T*);
  void (*apply)(const BatchNormGrad<T>*, const A*, const A*, T*, int64_t, int64_t, int64_t, int64_t);
};

// from_output: the activation's derivative is computed from the output, else from the pre-activation.
template <class T>
Kernels<T> pick(Act act, bool from_output) {
  if (act == Act::identity) return {FASTCONV_PICK(bn_backward_sums<T, 0>), FASTCONV_PICK(bn_backward_apply<T, 0>)};
  if (act == Act::relu) {
    if (from_output) return {FASTCONV_PICK(bn_backward_sums<T, 1>), FASTCONV_PICK(bn_backward_apply<T, 1>)};
    return {FASTCONV_PICK(bn_backward_sums<T, 4>), FASTCONV_PICK(bn_backward_apply<T, 4>)};
  }
  if (from_output) return {FASTCONV_PICK(bn_backward_sums<T, 2>), FASTCONV_PICK(bn_backward_apply<T, 2>)};
  return {FASTCONV_PICK(bn_backward_sums<T, 3>), FASTCONV_PICK(bn_backward_apply<T, 3>)};
}

// The caller's choice of what to compute, and where it goes (null: not wanted).
template <class T>
struct Outputs {
  T* dx;
  T* dresidual;
  acc_t<T>* dweight;
  acc_t<T>* dbias;
  bool training;
};

template <class T>
void backward(const BatchNormGrad<T>& p, int64_t rows, const Outputs<T>& out, const acc_t<T>* inv) {
  using A = acc_t<T>;
  const int64_t channels = p.channels;
  const Spans s(rows, channels);
  const Kernels<T> kernels = pick<T>(p.act, p.y != nullptr);
  const bool need_sums = out.dweight || out.dbias || out.dresidual || (out.training && out.dx);
  const Scratch<A> vectors(4 * channels);
  A *sum = vectors.get(), *sum_x = sum + channels, *slope = sum_x + channels, *offset = slope + channels;
  if (!out.training) std::fill(slope, slope + 2 * channels, A(0));  // dx = dy * scale

  const auto coefficients = [&](int64_t c0, int64_t c1) {
    if (out.dbias) std::copy(sum + c0, sum + c1, out.dbias + c0);
    for (int64_t c = c0; out.dweight && c < c1; ++c) out.dweight[c] = sum_x[c] * inv[c];  // sum dy * xhat
    if (!out.training) return;
    for (int64_t c = c0; c < c1; ++c) {
      slope[c] = -p.scale[c] * inv[c] * inv[c] * sum_x[c] / A(rows);
      offset[c] = -p.scale[c] * sum[c] / A(rows);
    }
  };
  // Once dresidual = dy is written, the second pass reads it in place of g and y, unless dy was rounded to 16 bits
  // there (identity and relu do not round).
  BatchNormGrad<T> second = p;
  auto apply = kernels.apply;
  if (out.dresidual && (sizeof(T) > 2 || p.act == Act::relu)) {
    second.g = out.dresidual;
    apply = pick<T>(Act::identity, false).apply;
  }

  if (s.threads_own_channels) {
    parallel_tasks(s.parts, rows * channels, [&](int64_t begin, int64_t end) {
      const int64_t c0 = s.channel_begin(begin), c1 = s.channel_end(end - 1);
      if (need_sums) {
        kernels.sums(&p, 0, rows, c0, c1, sum, sum_x, out.dresidual);
        coefficients(c0, c1);
      }
      if (out.dx) apply(&second, slope, offset, out.dx, 0, rows, c0, c1);
    });
    return;
  }
  if (need_sums) {
    const Scratch<A> partial(s.spans * 2 * channels);
    A* part = partial.get();
    parallel_spans(s, [&](int64_t i, int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
      A* mine = part + 2 * i * channels;
      kernels.sums(&p, r0, r1, c0, c1, mine, mine + channels, out.dresidual);
    });
    std::copy(part, part + 2 * channels, sum);
    for (int64_t i = 1; i < s.spans; ++i) {
      for (int64_t c = 0; c < 2 * channels; ++c) sum[c] += part[2 * i * channels + c];
    }
    coefficients(0, channels);
  }
  if (out.dx) {
    parallel_tasks(rows, rows * channels,
                   [&](int64_t r0, int64_t r1) { apply(&second, slope, offset, out.dx, r0, r1, 0, channels); });
  }
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> batch_norm_backward(const at::Tensor& g, const at::Tensor& x, const at::Tensor& y,
                                                       const at::Tensor& residual, const OptTensor& weight,
                                                       const OptTensor& bias, const at::Tensor& mean,
                                                       const at::Tensor& invstd, bool training, Act act,
                                                       const at::Tensor& dx, const at::Tensor& dresidual,
                                                       std::array<bool, 2> weight_bias) {
  const int64_t channels = x.size(1);
  const at::Tensor gamma = channel_vector(weight, x, channels, 1.0), beta = channel_vector(bias, x, channels, 0.0);
  const auto wanted = [&](bool want) { return want ? at::empty({channels}, acc_options(x)) : at::Tensor(); };
  const at::Tensor dweight = wanted(weight_bias[0]), dbias = wanted(weight_bias[1]);
  if (x.numel() == 0) {
    for (const at::Tensor& t : {dweight, dbias})
      if (t.defined()) t.zero_();
    return {dweight, dbias};
  }
  dispatch_float("batch_norm_act_backward", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const A *inv = const_data<A>(invstd), *w = const_data<A>(gamma);
    const Scratch<A> scale(channels);
    for (int64_t c = 0; c < channels; ++c) scale.get()[c] = w[c] * inv[c];
    const BatchNormGrad<T> p{const_data<T>(g),
                             const_data<T>(x),
                             const_data<T>(y),
                             const_data<T>(residual),
                             const_data<A>(mean),
                             scale.get(),
                             const_data<A>(beta),
                             channels,
                             act};
    backward<T>(p, x.numel() / channels, {data<T>(dx), data<T>(dresidual), data<A>(dweight), data<A>(dbias), training},
                inv);
  });
  return {dweight, dbias};
}

namespace {

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> batch_norm_act_backward(
    const at::Tensor& grad_output, const at::Tensor& input, const OptTensor& output, const OptTensor& residual,
    const OptTensor& weight, const OptTensor& bias, const at::Tensor& mean, const at::Tensor& invstd, bool training,
    c10::string_view activation, std::array<bool, 4> output_mask) {
  constexpr const char* op = "batch_norm_act_backward";
  const PlainDispatch guard;
  const BatchNormSaved saved = check_batch_norm_backward(op, grad_output, input, output, residual, weight, bias, mean,
                                                         invstd, activation, output_mask);
  const Act act = saved.act;
  const bool recompute = saved.recompute, from_output = saved.from_output;

  const at::MemoryFormat format = input.suggest_memory_format();
  const at::Tensor x = nhwc(input), g = nhwc(grad_output);
  const at::Tensor y = from_output ? nhwc(*output) : at::Tensor();
  const at::Tensor res = recompute && given(residual) ? nhwc(*residual) : at::Tensor();
  // Several of them may be asked for: each is a tensor of its own, results must not alias.
  const auto none = [&] { return no_tensor(input.options()); };
  const at::Tensor dx = output_mask[0] ? empty_nhwc(input.sizes(), input.options(), format) : at::Tensor();
  const at::Tensor dres = output_mask[1] ? empty_nhwc(input.sizes(), input.options(), format) : at::Tensor();
  const auto [dgamma, dbeta] = batch_norm_backward(g, x, y, res, weight, bias, mean.contiguous(), invstd.contiguous(),
                                                   training, act, dx, dres, {output_mask[2], output_mask[3]});
  const at::ScalarType weight_type = given(weight) ? weight->scalar_type() : acc_type(input.scalar_type());
  const at::Tensor dweight = output_mask[2] ? dgamma.to(weight_type) : none();
  const at::Tensor dbias = output_mask[3] ? dbeta.to(weight_type) : none();
  return {output_mask[0] ? to_format(dx, format) : none(), output_mask[1] ? to_format(dres, format) : none(), dweight,
          dbias};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastconv, CPU, m) { m.impl("batch_norm_act_backward", &batch_norm_act_backward); }

}  // namespace fastconv::cpu
