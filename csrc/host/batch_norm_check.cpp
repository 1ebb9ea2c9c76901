// Argument checks of batch norm; rules and texts follow PyTorch's.

#include "batch_norm_check.h"

namespace fastconv {

void check_batch_norm(const char* op, at::IntArrayRef sizes, const at::Tensor& like, const BatchNormArgs& args,
                      const char* weight_name, const char* bias_name) {
  const int64_t channels = sizes[1];
  check_channels(op, weight_name, args.weight, like, channels);
  check_channels(op, bias_name, args.bias, like, channels);
  check_channels(op, "running_mean", args.running_mean, like, channels);
  check_channels(op, "running_var", args.running_var, like, channels);
  if (given(args.num_batches_tracked)) {
    const at::Tensor& count = *args.num_batches_tracked;
    check_device(op, "num_batches_tracked", count, like);
    TORCH_CHECK(count.scalar_type() == at::kLong && count.numel() == 1, op,
                ": num_batches_tracked expected one int64 element, got ", count.scalar_type(), " of size ",
                count.sizes());
  }
  if (args.training) {
    TORCH_CHECK_VALUE(sizes[0] * sizes[2] * sizes[3] != 1,
                      "Expected more than 1 value per channel when training, got input size ", sizes);
    TORCH_CHECK(args.momentum.has_value() || given(args.num_batches_tracked) ||
                    !(given(args.running_mean) || given(args.running_var)),
                op, ": momentum expected a number where num_batches_tracked is not given, got None");
  } else {
    TORCH_CHECK(given(args.running_mean), op, ": running_mean must be defined in evaluation mode");
    TORCH_CHECK(given(args.running_var), op, ": running_var must be defined in evaluation mode");
  }
}

BatchNormSaved check_batch_norm_backward(const char* op, const at::Tensor& grad_output, const at::Tensor& input,
                                         const OptTensor& output, const OptTensor& residual, const OptTensor& weight,
                                         const OptTensor& bias, const at::Tensor& mean, const at::Tensor& invstd,
                                         c10::string_view activation, std::array<bool, 4> output_mask) {
  check_float(op, "input", input);
  check_dim(op, "input", input, 4);
  const int64_t channels = input.size(1);
  const Act act = parse_act(op, {activation.data(), activation.size()});
  check_device(op, "grad_output", grad_output, input);
  check_dtype(op, "grad_output", grad_output, input.scalar_type());
  check_sizes(op, "grad_output", grad_output, input.sizes());
  check_channels(op, "weight", weight, input, channels);
  check_channels(op, "bias", bias, input, channels);
  for (const auto& [name, t] : {std::pair<const char*, const at::Tensor&>{"mean", mean}, {"invstd", invstd}}) {
    check_device(op, name, t, input);
    check_dtype(op, name, t, acc_type(input.scalar_type()));
    check_sizes(op, name, t, {channels});
  }
  const bool from_output = act_saves_output(act) && (given(output) || act_needs_output(act));
  const bool recompute = act != Act::identity && !from_output;
  if (from_output) {
    TORCH_CHECK(given(output), op, ": output expected a tensor for activation '", activation, "', got None");
    check_device(op, "output", *output, input);
    check_dtype(op, "output", *output, input.scalar_type());
    check_sizes(op, "output", *output, input.sizes());
  }
  if (recompute) check_residual(op, residual, input, input.sizes());
  TORCH_CHECK(!(act == Act::identity && output_mask[1]), op,
              ": output_mask[1] expected False for activation 'identity' (grad_residual is grad_output), got True");
  return {act, recompute, from_output};
}

}  // namespace fastconv
