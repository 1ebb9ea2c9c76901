// Host side of the per-channel epilogue that convolution and batch norm share.

#include <ATen/ops/full.h>

#include "host.h"
#include "parallel.h"

#define FASTCONV_KERNELS "kernels/channel_affine.h"
#include "foreach_isa.h"

namespace fastconv::cpu {

at::Tensor channel_vector(const OptTensor& t, const at::Tensor& like, int64_t channels, double fill) {
  if (!given(t)) return at::full({channels}, fill, acc_options(like));
  return t->to(acc_type(like.scalar_type())).contiguous();
}

template <class T>
AffineKernel<T> affine_kernel(Act act) {
  if (act == Act::identity) return FASTCONV_PICK(channel_affine<T, 0>);
  if (act == Act::relu) return FASTCONV_PICK(channel_affine<T, 1>);
  return FASTCONV_PICK(channel_affine<T, 2>);
}
template AffineKernel<float> affine_kernel<float>(Act);
template AffineKernel<double> affine_kernel<double>(Act);
template AffineKernel<bf16> affine_kernel<bf16>(Act);
template AffineKernel<f16> affine_kernel<f16>(Act);

void channel_affine(const at::Tensor& x, const at::Tensor& out, const at::Tensor& pre, const at::Tensor& residual,
                    const at::Tensor& mean, const at::Tensor& scale, const at::Tensor& shift, Act act) {
  if (x.numel() == 0) return;
  const int64_t channels = x.size(1), rows = x.numel() / channels;
  dispatch_float("channel_affine", x.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const auto kernel = affine_kernel<T>(act);
    const T* px = const_data<T>(x);
    const T* pr = const_data<T>(residual);
    T* po = data<T>(out);
    T* pp = data<T>(pre);
    const FoldedRows folded(rows, channels);
    const A *pm = const_data<A>(mean), *ps = const_data<A>(scale), *pb = const_data<A>(shift);
    const Scratch<A> repeated(folded.fold > 1 ? 3 * folded.channels : 0);
    const A* vectors[3] = {pm, ps, pb};
    for (int64_t v = 0; v < 3 && folded.fold > 1; ++v) {
      A* to = repeated.get() + v * folded.channels;
      for (int64_t c = 0; c < folded.channels; ++c) to[c] = vectors[v][c % channels];
      vectors[v] = to;
    }
    parallel_tasks(folded.rows, x.numel(), [&](int64_t r0, int64_t r1) {
      kernel(px, po, pp, pr, vectors[0], vectors[1], vectors[2], folded.channels, r0, r1, 0, folded.channels, act);
    });
    kernel(px, po, pp, pr, pm, ps, pb, channels, rows - folded.rest, rows, 0, channels, act);
  });
}

}  // namespace fastconv::cpu
