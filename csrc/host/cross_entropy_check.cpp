// Argument checks of cross-entropy; rules and texts follow PyTorch's.

#include "cross_entropy_check.h"

#include <ATen/ops/empty_like.h>

namespace fastconv {

LossTarget check_cross_entropy(const char* op, const at::Tensor& input, const at::Tensor& target,
                               const OptTensor& weight, int64_t reduction, int64_t ignore_index,
                               double label_smoothing) {
  check_float(op, "input", input);
  TORCH_CHECK(input.dim() >= 2, op, ": input expected at least 2 dimensions [N, C, ...], got ", input.dim());
  check_strided(op, "target", target);
  check_device(op, "target", target, input);
  TORCH_CHECK(reduction >= 0 && reduction <= 2, op, ": reduction expected 0 (none), 1 (mean) or 2 (sum), got ",
              reduction);
  TORCH_CHECK(label_smoothing >= 0.0 && label_smoothing <= 1.0,
              "label_smoothing must be between 0.0 and 1.0. Got: ", label_smoothing);
  const int64_t classes = input.size(1);
  if (given(weight)) {
    check_device(op, "weight", *weight, input);
    check_strided(op, "weight", *weight);
    TORCH_CHECK(weight->dim() == 1 && weight->size(0) == classes, op, ": weight expected size [", classes,
                "] (one per class), got ", weight->sizes());
    TORCH_CHECK(weight->scalar_type() == input.scalar_type() || weight->scalar_type() == acc_type(input.scalar_type()),
                op, ": weight expected dtype ", input.scalar_type(), ", got ", weight->scalar_type());
  }
  LossTarget t{};
  t.d = 1;
  for (int64_t i = 2; i < input.dim(); ++i) t.d *= input.size(i);
  t.position_sizes = input.sizes().vec();
  t.position_sizes.erase(t.position_sizes.begin() + 1);
  t.probabilities = target.is_floating_point();
  if (t.probabilities) {
    check_float(op, "target", target);
    check_sizes(op, "target (probabilities)", target, input.sizes());
    TORCH_CHECK(ignore_index < 0, op, ": ignore_index is not supported for floating point target");
  } else {
    TORCH_CHECK(target.scalar_type() == at::kLong || target.scalar_type() == at::kByte, op,
                ": target expected dtype int64 or uint8 (class indices) or a floating dtype (probabilities), got ",
                target.scalar_type());
    if (target.dim() > 0 && input.size(0) != target.size(0)) {
      TORCH_CHECK_VALUE(false, op, ": Expected input batch_size (", input.size(0), ") to match target batch_size (",
                        target.size(0), ").");
    }
    check_sizes(op, "target (class indices)", target, t.position_sizes);
  }
  return t;
}

void check_cross_entropy_backward(const char* op, const at::Tensor& grad_loss, const at::Tensor& input,
                                  const at::Tensor& lse, const at::Tensor& normalizer, int64_t reduction,
                                  const LossTarget& target, std::array<bool, 2> output_mask) {
  const at::ScalarType acc = acc_type(input.scalar_type());
  check_float(op, "grad_loss", grad_loss);
  check_device(op, "grad_loss", grad_loss, input);
  check_dtype(op, "lse", lse, acc);
  check_device(op, "lse", lse, input);
  check_sizes(op, "lse", lse, target.position_sizes);
  check_dtype(op, "normalizer", normalizer, acc);
  check_device(op, "normalizer", normalizer, input);
  TORCH_CHECK(normalizer.numel() == 1, op, ": normalizer expected 1 element, got ", normalizer.numel());
  if (reduction == kNone) {
    check_sizes(op, "grad_loss", grad_loss, target.position_sizes);
  } else {
    TORCH_CHECK(grad_loss.numel() == 1, op, ": grad_loss expected 1 element, got ", grad_loss.numel());
  }
  TORCH_CHECK(!output_mask[1] || target.probabilities, op,
              ": output_mask[1] expected False for class indices, got True");
}

namespace {
at::Tensor channels_last_view(const at::Tensor& t) { return t.dim() > 2 ? t.movedim(1, -1) : t; }
}  // namespace

bool classes_last(const at::Tensor& input, int64_t d) {
  return d == 1 || (!input.is_contiguous() && channels_last_view(input).is_contiguous());
}

at::Tensor arrange_classes(const at::Tensor& t, bool rows) {
  return rows ? channels_last_view(t).contiguous() : t.contiguous();
}

at::Tensor restore_classes(const at::Tensor& t, const at::Tensor& like, bool rows) {
  const at::Tensor view = rows && like.dim() > 2 ? t.movedim(-1, 1) : t;
  const at::Tensor typed = view.to(like.scalar_type());
  return like.is_non_overlapping_and_dense() && typed.strides() == like.strides() ? typed
                                                                                  : at::empty_like(like).copy_(typed);
}

}  // namespace fastconv
