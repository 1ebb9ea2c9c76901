// Host side of cross_entropy and its backward: check -> layout -> launch. Nothing is read back from the device: a class
// index out of range makes its loss NaN, where the CPU raises.

#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "../host/cross_entropy_check.h"
#include "host.h"

namespace fastconv::cuda {
namespace {

// What forward and backward share: operands in one of the two layouts, and the call with its shape filled in.
struct Problem {
  LossTarget checked;
  bool rows;  // [N, d.., C], else [N, C, d..]
  at::Tensor x, target, probs, weight;
  LossCall call{};

  Problem(const char* op, const at::Tensor& input, const at::Tensor& target_in, const OptTensor& weight_in,
          int64_t reduction, int64_t ignore_index, double label_smoothing)
      : checked(check_cross_entropy(op, input, target_in, weight_in, reduction, ignore_index, label_smoothing)),
        rows(classes_last(input, checked.d)) {
    dtype_number(op, input);
    const int64_t classes = input.size(1), d = checked.d, positions = input.size(0) * d;
    check_limit(op, loss_limit(positions, classes, d));
    x = arrange_classes(input, rows);
    if (checked.probabilities) {
      // One dtype for both: fp32 where they differ, so that fp32 probabilities beside 16-bit logits lose nothing.
      probs = arrange_classes(target_in, rows);
      if (probs.scalar_type() != x.scalar_type()) x = x.to(at::kFloat), probs = probs.to(at::kFloat);
      call.probabilities = raw(probs);
    } else {
      target = target_in.contiguous();
      (target.scalar_type() == at::kByte ? call.target_u8 : call.target) = raw(target);
    }
    if (given(weight_in)) weight = weight_in->to(at::kFloat).contiguous();
    call.input = raw(x);
    call.weight = const_data<float>(weight);
    call.rows = positions;
    call.classes = static_cast<int>(classes), call.d = static_cast<int>(d);
    call.stride_n = d * classes, call.stride_c = rows ? 1 : d, call.stride_d = rows ? classes : 1;
    call.ignore_index = ignore_index;
    call.reduction = static_cast<int>(reduction);
    call.dtype = dtype_number(op, x);
    call.smoothing = static_cast<float>(label_smoothing);
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> cross_entropy_op(const at::Tensor& input, const at::Tensor& target,
                                                                const OptTensor& weight, int64_t reduction,
                                                                int64_t ignore_index, double label_smoothing) {
  constexpr const char* op = "cross_entropy";
  const PlainDispatch guard;
  Problem p(op, input, target, weight, reduction, ignore_index, label_smoothing);
  const auto acc = acc_options(input);
  const at::Tensor lse = at::empty(p.checked.position_sizes, acc);
  if (input.numel() == 0) {  // PyTorch: the mean over nothing is NaN, the sum 0
    const double mean = std::numeric_limits<double>::quiet_NaN();
    const at::Tensor none = at::zeros(p.checked.position_sizes, input.options());
    const at::Tensor loss = reduction == kNone ? none : at::full({}, reduction == kMean ? mean : 0.0, input.options());
    return {loss, lse.fill_(-std::numeric_limits<double>::infinity()), at::zeros({}, acc)};
  }
  const Device device(input);
  const at::Tensor normalizer = at::empty({}, acc);
  const at::Tensor loss =
      reduction == kNone ? at::empty(p.checked.position_sizes, p.x.options()) : at::empty({}, p.x.options());
  const int64_t blocks = loss_block_count(p.call);
  const at::Tensor workspace = at::empty({2, blocks}, acc);
  p.call.loss = raw(loss), p.call.lse = data<float>(lse), p.call.normalizer = data<float>(normalizer);
  p.call.part_loss = data<float>(workspace), p.call.part_weight = p.call.part_loss + blocks;
  check_launch(op, cross_entropy(p.call, device.stream()));
  return {loss.to(input.scalar_type()), lse, normalizer};
}

std::tuple<at::Tensor, at::Tensor> cross_entropy_backward_op(const at::Tensor& grad_loss, const at::Tensor& input,
                                                             const at::Tensor& target, const OptTensor& weight,
                                                             const at::Tensor& lse, const at::Tensor& normalizer,
                                                             int64_t reduction, int64_t ignore_index,
                                                             double label_smoothing, std::array<bool, 2> output_mask) {
  constexpr const char* op = "cross_entropy_backward";
  const PlainDispatch guard;
  Problem p(op, input, target, weight, reduction, ignore_index, label_smoothing);
  check_cross_entropy_backward(op, grad_loss, input, lse, normalizer, reduction, p.checked, output_mask);
  const at::Tensor dx = output_mask[0] ? at::empty_like(p.x) : no_tensor(input.options());
  const at::Tensor dprobs = output_mask[1] ? at::empty_like(p.probs) : no_tensor(input.options());
  if (input.numel() > 0 && (output_mask[0] || output_mask[1])) {
    const Device device(input);
    const at::Tensor g = grad_loss.to(p.x.scalar_type()).contiguous(), sums = lse.contiguous();
    p.call.grad_loss = raw(g), p.call.lse = data<float>(sums), p.call.normalizer = data<float>(normalizer);
    p.call.grad_input = raw(dx), p.call.grad_probabilities = output_mask[1] ? raw(dprobs) : nullptr;
    check_launch(op, cross_entropy_backward(p.call, device.stream()));
  }
  return {output_mask[0] ? restore_classes(dx, input, p.rows) : dx,
          output_mask[1] ? restore_classes(dprobs, target, p.rows) : dprobs};
}

}  // namespace

FASTCONV_GPU_OPERATORS(m) {
  m.impl("cross_entropy", &cross_entropy_op);
  m.impl("cross_entropy_backward", &cross_entropy_backward_op);
}

}  // namespace fastconv::cuda
