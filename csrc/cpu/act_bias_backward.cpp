// Host side of act_bias_backward: gradient of an activation and of the bias before it, one pass
// (kernels/act_backward.h).

#include <torch/library.h>

#include <array>

#include "../host/act_check.h"
#include "host.h"
#include "parallel.h"

#define FASTCONV_KERNELS "kernels/act_backward.h"
#include "foreach_isa.h"

namespace fastconv::cpu {
namespace {

template <class T>
using Kernel = void (*)(const T*, const T*, T*, acc_t<T>*, int64_t, int64_t, int64_t, int64_t, int64_t, Act);

template <class T>
Kernel<T> pick(Act act) {
  if (act == Act::identity) return FASTCONV_PICK(act_bias_backward<T, 0>);
  if (act == Act::relu) return FASTCONV_PICK(act_bias_backward<T, 1>);
  return FASTCONV_PICK(act_bias_backward<T, 2>);
}

std::tuple<at::Tensor, at::Tensor> act_bias_backward_op(const at::Tensor& grad_output, const OptTensor& saved,
                                                        c10::string_view activation, std::array<bool, 2> output_mask) {
  constexpr const char* op = "act_bias_backward";
  const PlainDispatch guard;
  const auto [act, format] = check_act_bias_backward(op, grad_output, saved, activation, output_mask);
  const int64_t channels = grad_output.size(1);
  const auto none = [&] { return no_tensor(grad_output.options()); };
  const at::Tensor g = nhwc(grad_output);
  const at::Tensor s = act == Act::identity ? at::Tensor() : nhwc(*saved);
  const at::Tensor preact = output_mask[0] ? empty_nhwc(g.sizes(), g.options(), format) : none();
  const at::Tensor sums = output_mask[1] ? at::zeros({channels}, acc_options(g)) : none();
  if (g.numel() > 0) {
    dispatch_float(op, g.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      using A = acc_t<T>;
      const auto kernel = pick<T>(act);
      const int64_t rows = g.numel() / channels;
      const FoldedRows folded(rows, channels);
      const T *pg = const_data<T>(g), *ps = const_data<T>(s);
      T* pp = data<T>(preact);
      if (!output_mask[1]) {
        parallel_tasks(folded.rows, g.numel(), [&](int64_t r0, int64_t r1) {
          kernel(pg, ps, pp, nullptr, folded.channels, r0, r1, 0, folded.channels, act);
        });
        kernel(pg, ps, pp, nullptr, channels, rows - folded.rest, rows, 0, channels, act);
        return;
      }
      const Spans split(folded.rows, folded.channels);
      const Scratch<A> partial((split.spans + 1) * folded.channels);
      A *part = partial.get(), *sum = data<A>(sums);
      parallel_spans(split, [&](int64_t i, int64_t r0, int64_t r1, int64_t c0, int64_t c1) {
        kernel(pg, ps, pp, part + i * folded.channels, folded.channels, r0, r1, c0, c1, act);
      });
      const int64_t parts = split.spans * folded.fold;  // and one more, of the rows left over
      kernel(pg, ps, pp, part + parts * channels, channels, rows - folded.rest, rows, 0, channels, act);
      for (int64_t i = 0; i <= parts; ++i) {
        for (int64_t c = 0; c < channels; ++c) sum[c] += part[i * channels + c];
      }
    });
  }
  return {output_mask[0] ? to_format(preact, format) : none(),
          output_mask[1] ? sums.to(grad_output.scalar_type()) : none()};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastconv, CPU, m) { m.impl("act_bias_backward", &act_bias_backward_op); }

}  // namespace fastconv::cpu
