// Host side of cross_entropy and its backward: check -> layout -> split over threads -> kernels/cross_entropy.h.

#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <vector>

#include "../host/cross_entropy_check.h"
#include "host.h"
#include "parallel.h"

#define FASTCONV_KERNELS "kernels/cross_entropy.h"
#include "foreach_isa.h"

namespace fastconv::cpu {
namespace {

constexpr int64_t kChunk =
    256;  // positions whose losses are summed together: fixed, so the result does not depend on the threads

// Everything that forward and backward share: arguments checked and brought into one of the two layouts.
struct Problem {
  LossTarget checked;
  CrossEntropyParams params;
  bool rows;                            // layout, see params.h
  at::Tensor x, target, probs, weight;  // target int64 or undefined; probs, weight in the accumulate type

  int64_t positions() const { return params.n * params.d; }
};

Problem make_problem(const char* op, const at::Tensor& input, const at::Tensor& target, const OptTensor& weight,
                     int64_t reduction, int64_t ignore_index, double label_smoothing) {
  Problem p{};
  p.checked = check_cross_entropy(op, input, target, weight, reduction, ignore_index, label_smoothing);
  const int64_t classes = input.size(1);
  p.params = {input.size(0), classes, p.checked.d, ignore_index, label_smoothing};
  p.rows = classes_last(input, p.checked.d);
  p.x = arrange_classes(input, p.rows);
  if (p.checked.probabilities) {
    p.probs = arrange_classes(target.to(acc_type(input.scalar_type())), p.rows);
  } else {
    p.target = target.to(at::kLong).contiguous();
  }
  p.weight = channel_vector(weight, input, classes, 1.0);
  return p;
}

template <class T>
CrossEntropyArgs<T> make_args(const Problem& p) {
  using A = acc_t<T>;
  CrossEntropyArgs<T> a{const_data<T>(p.x), p.checked.probabilities ? nullptr : const_data<int64_t>(p.target),
                        p.checked.probabilities ? const_data<A>(p.probs) : nullptr, const_data<A>(p.weight), A(0)};
  double sum = 0;
  for (int64_t j = 0; j < p.params.c; ++j) sum += a.weight[j];
  a.weight_sum = A(sum);
  return a;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_op(const at::Tensor& input, const at::Tensor& target,
                                                                const OptTensor& weight, int64_t reduction,
                                                                int64_t ignore_index, double label_smoothing) {
  constexpr const char* op = "cross_entropy";
  const PlainDispatch guard;
  const Problem p = make_problem(op, input, target, weight, reduction, ignore_index, label_smoothing);
  const int64_t positions = p.positions();
  const at::Tensor lse = at::empty(p.checked.position_sizes, acc_options(input));
  const at::Tensor losses = at::empty(p.checked.position_sizes, acc_options(input));
  const at::Tensor normalizer = at::empty({}, acc_options(input)), total = at::empty({}, acc_options(input));
  dispatch_float(op, input.scalar_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = acc_t<T>;
    const CrossEntropyArgs<T> args = make_args<T>(p);
    const auto kernel = p.rows ? FASTCONV_PICK(cross_entropy_rows<T>) : FASTCONV_PICK(cross_entropy_columns<T>);
    A *ploss = data<A>(losses), *plse = data<A>(lse);
    const int64_t chunks = (positions + kChunk - 1) / kChunk;
    std::vector<std::array<double, 2>> sums(chunks, {0.0, 0.0});
    std::vector<int64_t> bad(chunks, -1);
    parallel_tasks(chunks, input.numel(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        bad[i] =
            kernel(&args, &p.params, ploss, plse, sums[i].data(), i * kChunk, std::min(positions, (i + 1) * kChunk));
      }
    });
    for (const int64_t position : bad) {
      TORCH_CHECK_INDEX(position < 0, "Target ", p.target.const_data_ptr<int64_t>()[std::max<int64_t>(position, 0)],
                        " is out of bounds.");
    }
    double loss = 0, kept = 0;
    for (const auto& s : sums) loss += s[0], kept += s[1];
    if (p.checked.probabilities) kept = static_cast<double>(positions);
    *data<A>(normalizer) = A(kept);
    *data<A>(total) = A(reduction == kMean ? loss / kept : loss);  // no kept target: 0 / 0, PyTorch's nan
  });
  return {(reduction == kNone ? losses : total).to(input.scalar_type()), lse, normalizer};
}

std::tuple<at::Tensor, at::Tensor> cross_entropy_backward_op(const at::Tensor& grad_loss, const at::Tensor& input,
                                                             const at::Tensor& target, const OptTensor& weight,
                                                             const at::Tensor& lse, const at::Tensor& normalizer,
                                                             int64_t reduction, int64_t ignore_index,
                                                             double label_smoothing, std::array<bool, 2> output_mask) {
  constexpr const char* op = "cross_entropy_backward";
  const PlainDispatch guard;
  const Problem p = make_problem(op, input, target, weight, reduction, ignore_index, label_smoothing);
  const at::ScalarType acc = acc_type(input.scalar_type());
  check_cross_entropy_backward(op, grad_loss, input, lse, normalizer, reduction, p.checked, output_mask);
  const at::Tensor dx = output_mask[0] ? at::empty_like(p.x) : no_tensor(input.options());
  const at::Tensor dprobs = output_mask[1] ? at::empty_like(p.probs) : at::Tensor();
  const at::Tensor g = grad_loss.to(acc).contiguous(), sums = lse.contiguous();
  if (input.numel() > 0 && (output_mask[0] || output_mask[1])) {
    dispatch_float(op, input.scalar_type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      using A = acc_t<T>;
      const CrossEntropyArgs<T> args = make_args<T>(p);
      const auto kernel =
          p.rows ? FASTCONV_PICK(cross_entropy_backward_rows<T>) : FASTCONV_PICK(cross_entropy_backward_columns<T>);
      const A factor = reduction == kMean ? A(1) / *const_data<A>(normalizer) : A(1);
      const A *pg = const_data<A>(g), *plse = const_data<A>(sums);
      T* pdx = output_mask[0] ? data<T>(dx) : nullptr;
      A* pdp = data<A>(dprobs);
      parallel_tasks(p.positions(), input.numel(), [&](int64_t begin, int64_t end) {
        kernel(&args, &p.params, pg, reduction == kNone ? 1 : 0, factor, plse, pdx, pdp, begin, end);
      });
    });
  }
  return {output_mask[0] ? restore_classes(dx, input, p.rows) : dx,
          output_mask[1] ? restore_classes(dprobs, target, p.rows) : no_tensor(input.options())};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastconv, CPU, m) {
  m.impl("cross_entropy", &cross_entropy_op);
  m.impl("cross_entropy_backward", &cross_entropy_backward_op);
}

}  // namespace fastconv::cpu
