// The steps of a plan (fastconv/_plan) on a GPU: the operators' own launches, into tensors that the plan owns.
//
// Nothing here waits for the device or reads it on the host, so that a whole step can be captured in a CUDA graph. The
// plan's arena is why results have a place; what an operator needs besides (split sums, statistics) is allocated.

#include "../host/plan_check.h"

#include <torch/library.h>

#include <vector>

#include "batch_norm_act.h"

namespace fastconv::cuda {
namespace {

// output = act(conv2d(input, weight) * scale + shift + residual); mean is the CPU's way of saying the same.
void conv2d(const at::Tensor& input, const at::Tensor& weight, const OptTensor& packed, const OptTensor& mean,
            const OptTensor& scale, const OptTensor& shift, const OptTensor& residual, at::IntArrayRef geometry,
            c10::string_view act, const OptTensor& preact, const at::Tensor& output) {
  constexpr const char* op = "fastconv_plan::conv2d";
  const PlainDispatch guard;
  const ConvParams p = check_plan_conv2d(op, input, weight, residual, geometry, preact, output);
  TORCH_CHECK(!given(packed), op, ": packed expected None on this device, got a tensor of size ", packed->sizes());
  TORCH_CHECK(!given(mean), op, ": mean expected None on this device (a part of shift), got a tensor");
  const auto vector = [&](const char* name, const OptTensor& t) {
    check_channels(op, name, t, input, p.k);
    return given(t) ? t->to(at::kFloat).contiguous() : at::Tensor();
  };
  ConvEpilogueTensors e;
  e.scale = vector("scale", scale), e.shift = vector("shift", shift);
  e.residual = or_none(residual), e.pre = or_none(preact);
  e.out = output;
  e.act = plan_act(op, act);
  conv_forward(op, Device(input), p, input, weight, e, kNhwc, nullptr);
}

std::tuple<at::Tensor, at::Tensor> conv2d_bn(const at::Tensor& input, const at::Tensor& weight, const OptTensor& bias,
                                             const OptTensor& residual, const OptTensor& bn_weight,
                                             const OptTensor& bn_bias, const OptTensor& running_mean,
                                             const OptTensor& running_var, const OptTensor& num_batches_tracked,
                                             at::IntArrayRef geometry, std::optional<double> momentum, double eps,
                                             c10::string_view act, const at::Tensor& raw_output,
                                             const at::Tensor& output) {
  constexpr const char* op = "fastconv_plan::conv2d_bn";
  const PlainDispatch guard;
  const ConvParams p = plan_conv_params(op, input, weight, geometry);
  const std::array<int64_t, 4> sizes{p.n, p.k, p.p, p.q};
  check_output(op, "raw", raw_output, input, sizes);
  check_output(op, "output", output, input, sizes);
  check_nhwc_residual(op, residual, input, sizes);
  check_channels(op, "bias", bias, input, p.k);
  const BatchNormArgs args{bn_weight, bn_bias, running_mean, running_var, num_batches_tracked, true, momentum, eps};
  check_batch_norm(op, sizes, input, args, "bn_weight", "bn_bias");
  const Device device(input);
  ConvEpilogueTensors e;
  e.bias = or_none(bias);
  e.out = raw_output;
  ConvRest rest;
  rest.takes_parts = takes_parts(p.gemm_m(), args);
  conv_forward(op, device, p, input, weight, e, kNhwc, p.n > 0 ? &rest : nullptr);
  BatchNormStats stats =
      batch_norm_forward(op, device, raw_output, or_none(residual), output, args, plan_act(op, act), rest, e.bias);
  return {stats.mean, stats.invstd};
}

// The arguments of a batch norm's backward, checked.
class Norm {
 public:
  Norm(const char* op, const at::Tensor& grad_output, const at::Tensor& input, const OptTensor& output,
       const OptTensor& residual, const OptTensor& weight, const OptTensor& bias, const at::Tensor& mean,
       const at::Tensor& invstd, c10::string_view act, const at::Tensor& grad_input, const OptTensor& grad_residual)
      : op_(op), dy_(grad_output), x_(input), weight_(weight), bias_(bias), mean_(mean), invstd_(invstd) {
    const BatchNormSaved saved = check_plan_batch_norm_backward(op, grad_output, input, output, residual, weight, bias,
                                                                mean, invstd, act, grad_input, grad_residual);
    act_ = saved.act;
    if (saved.from_output) output_ = nhwc(*output);
    if (saved.recompute && given(residual)) residual_ = nhwc(*residual);
    const auto vectors = input.options().dtype(bn_vectors(input, weight, bias));
    const auto vector = [&](const OptTensor& t) {
      return given(t) ? at::empty({input.size(1)}, vectors) : no_tensor(vectors);
    };
    grads_ = {grad_input, or_none(grad_residual), vector(weight), vector(bias)};
  }

  std::tuple<at::Tensor, at::Tensor> backward() const { return backward(dy_, grads_, {}, {}, nullptr); }

  // The same with the data gradient that makes dy. Few rows take its split sums; of many, its epilogue makes the sums
  // where it can tell the activation's derivative, and g takes the place of dy or of dresidual.
  std::tuple<at::Tensor, at::Tensor> backward_of(const ConvParams& p, const at::Tensor& dz, const at::Tensor& weight,
                                                 const at::Tensor& addend) const {
    const bool few = p.n * p.h * p.w <= kBatchNormSmallRows;
    const auto fp32 = [](const OptTensor& t) { return !given(t) || t->scalar_type() == at::kFloat; };
    const bool from_x = !residual_.defined() && fp32(weight_) && fp32(bias_);
    const bool sums_up = !few && (act_ == Act::identity || output_.defined() || from_x);
    const auto vector = [&](const OptTensor& t) {
      return sums_up && given(t) && from_x ? t->contiguous() : at::Tensor();
    };
    ConvNormSums sums{x_, mean_.contiguous(), invstd_.contiguous(), vector(weight_), vector(bias_), output_, act_, {},
                      0};
    const at::Tensor& g = sums_up && grads_.dresidual.defined() ? grads_.dresidual : dy_;
    const ConvRest rest = conv_input_grad(op_, Device(x_), p, dz, weight, addend, g, few, sums_up ? &sums : nullptr);
    BatchNormGrads grads = grads_;
    if (sums.tiles > 0) grads.dresidual = at::Tensor();  // written, or not wanted
    return backward(g, grads, rest, addend, &sums);
  }

 private:
  std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& dy, const BatchNormGrads& grads, const ConvRest& rest,
                                              const at::Tensor& addend, const ConvNormSums* sums) const {
    batch_norm_backward(op_, Device(x_), dy, x_, output_, residual_, weight_, bias_, mean_, invstd_, true, act_, grads,
                        rest, addend, sums);
    return {grads.dweight, grads.dbias};
  }

  const char* op_;
  at::Tensor dy_, x_, output_, residual_;
  OptTensor weight_, bias_;
  at::Tensor mean_, invstd_;
  Act act_;
  BatchNormGrads grads_;
};

// grad_input = the gradient + addend
void conv2d_input_grad(const at::Tensor& grad_output, const at::Tensor& weight, const OptTensor& addend,
                       at::IntArrayRef geometry, const at::Tensor& grad_input) {
  constexpr const char* op = "fastconv_plan::conv2d_input_grad";
  const PlainDispatch guard;
  const ConvParams p = check_plan_input_grad(op, grad_output, weight, addend, geometry, grad_input);
  conv_input_grad(op, Device(grad_output), p, grad_output, weight, or_none(addend), grad_input);
}

std::tuple<at::Tensor, at::Tensor> conv2d_input_grad_bn(
    const at::Tensor& grad_output, const at::Tensor& weight, const OptTensor& addend, at::IntArrayRef geometry,
    const at::Tensor& grad, const at::Tensor& input, const OptTensor& output, const OptTensor& residual,
    const OptTensor& bn_weight, const OptTensor& bn_bias, const at::Tensor& mean, const at::Tensor& invstd,
    c10::string_view act, const at::Tensor& grad_input, const OptTensor& grad_residual) {
  constexpr const char* op = "fastconv_plan::conv2d_input_grad_bn";
  const PlainDispatch guard;
  const ConvParams p = check_plan_input_grad(op, grad_output, weight, addend, geometry, grad);
  const Norm norm(op, grad, input, output, residual, bn_weight, bn_bias, mean, invstd, act, grad_input, grad_residual);
  return norm.backward_of(p, grad_output, weight, or_none(addend));
}

// grad_weight: fp32, which costs 16-bit operands a pass of its own, or their dtype, as `update` below reads it.
void conv2d_weight_grad(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                        at::IntArrayRef geometry, const at::Tensor& grad_weight) {
  constexpr const char* op = "fastconv_plan::conv2d_weight_grad";
  const PlainDispatch guard;
  const ConvParams p = plan_weight_grad_params(op, grad_output, input, weight, geometry);
  check_nhwc(op, "grad_weight", grad_weight);
  check_device(op, "grad_weight", grad_weight, weight);
  check_sizes(op, "grad_weight", grad_weight, weight.sizes());
  const auto type = grad_weight.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == input.scalar_type(), op, ": grad_weight expected dtype float32 or ",
              input.scalar_type(), ", got ", type);
  const bool own = type == input.scalar_type();
  const at::Tensor dw = own ? grad_weight : at::empty(weight.sizes(), input.options(), kNhwc);
  conv_weight_grad(op, Device(input), p, grad_output, input, dw);
  if (!own) grad_weight.copy_(dw);
}

at::Tensor conv2d_weight_grad_parts(const at::Tensor& grad_output, const at::Tensor& input, const at::Tensor& weight,
                                    at::IntArrayRef geometry) {
  constexpr const char* op = "fastconv_plan::conv2d_weight_grad_parts";
  const PlainDispatch guard;
  const ConvParams p = plan_weight_grad_params(op, grad_output, input, weight, geometry);
  const ConvRest rest = conv_weight_grad(op, Device(input), p, grad_output, input, {}, true);
  if (rest.splits == 0) return rest.parts;
  // [splits, k r s c] as [splits, k, c, r, s]
  const int64_t c = weight.size(1), rsc = c * p.r * p.s;
  return rest.parts.as_strided({rest.splits, p.k, c, p.r, p.s}, {p.k * rsc, rsc, 1, p.s * c, c});
}

// One launch for all parameters (kernels/update.cuh). live: bit r * S + s for every filter tap that is updated, -1 for
// all; none given: all of all.
void update(at::TensorList parameters, at::TensorList grads, at::TensorList state, int64_t per, at::TensorList halves,
            const at::Tensor& hyper, c10::string_view optimizer, at::IntArrayRef live) {
  constexpr const char* op = "fastconv_plan::update";
  const PlainDispatch guard;
  check_update_lists(op, parameters, grads, state, per, halves, live, true);
  if (parameters.empty()) return;
  UpdateCall call{};
  std::vector<at::Tensor> kept;  // gradients that had to be copied, until the launch
  for (size_t i = 0; i < parameters.size(); ++i) {
    const at::Tensor& w = parameters[i];
    const at::TensorList own = state.slice(i * per, per);
    const OptTensor half = halves.empty() ? OptTensor() : OptTensor(halves[i]);
    call.adam = check_weight_update(op, w, own, half, hyper, optimizer);
    check_device(op, "parameters", w, parameters[0]);
    check_device(op, "grads", grads[i], w);
    at::Tensor g = grads[i];
    const bool parts = g.dim() == w.dim() + 1;
    if (parts) {
      check_dtype(op, "grads", g, at::kFloat);
      TORCH_CHECK(g.stride(0) == w.numel() && g.strides().slice(1) == w.strides(), op,
                  ": grads expected parts in the order of the weight, ", w.strides(), ", got strides ", g.strides());
    } else if (g.strides() != w.strides()) {
      g = at::empty_strided(w.sizes(), w.strides(), g.options()).copy_(g);
    }
    kept.push_back(g);
    const int64_t mask = live.empty() ? -1 : live[i];
    const bool whole = mask == -1;
    if (!whole) {
      check_nhwc(op, "parameters", w);
      TORCH_CHECK(w.size(2) * w.size(3) < 64, op, ": live expected a filter of less than 64 taps, got ", w.sizes());
    }
    const int8_t half_dtype = given(half) ? static_cast<int8_t>(dtype_number(op, *half)) : 0;
    call.tensors.push_back(
        {data<float>(w), per > 0 ? data<float>(own[0]) : nullptr, per > 1 ? data<float>(own[1]) : nullptr,
         given(half) ? raw(*half) : nullptr, raw(g), w.numel(), static_cast<uint64_t>(mask),
         whole ? 1 : static_cast<int>(w.size(1)), whole ? 1 : static_cast<int>(w.size(2) * w.size(3)),
         parts ? static_cast<int>(g.size(0)) : 1, static_cast<int8_t>(dtype_number(op, g)), half_dtype, false});
  }
  call.momentum = per > 0;
  call.hyper = const_data<double>(hyper);
  check_launch(op, fastconv::update(call, Device(parameters[0]).stream()));
  for (size_t i = 0; i < parameters.size(); ++i) bump_versions(parameters[i], state.slice(i * per, per));
}

// output = act(batch_norm(input) + residual), with the batch's statistics; the running ones are updated.
std::tuple<at::Tensor, at::Tensor> batch_norm(const at::Tensor& input, const OptTensor& residual,
                                              const OptTensor& weight, const OptTensor& bias,
                                              const OptTensor& running_mean, const OptTensor& running_var,
                                              const OptTensor& num_batches_tracked, std::optional<double> momentum,
                                              double eps, c10::string_view act, const at::Tensor& output) {
  constexpr const char* op = "fastconv_plan::batch_norm";
  const PlainDispatch guard;
  const BatchNormArgs args{weight, bias, running_mean, running_var, num_batches_tracked, true, momentum, eps};
  check_plan_batch_norm(op, input, residual, args, output);
  BatchNormStats stats =
      batch_norm_forward(op, Device(input), input, or_none(residual), output, args, plan_act(op, act), {});
  return {stats.mean, stats.invstd};
}

// Into grad_input, and into grad_residual where one is given; returns the gradients of weight and bias.
std::tuple<at::Tensor, at::Tensor> batch_norm_backward_into(const at::Tensor& grad_output, const at::Tensor& input,
                                                            const OptTensor& output, const OptTensor& residual,
                                                            const OptTensor& weight, const OptTensor& bias,
                                                            const at::Tensor& mean, const at::Tensor& invstd,
                                                            c10::string_view act, const at::Tensor& grad_input,
                                                            const OptTensor& grad_residual) {
  const PlainDispatch guard;
  return Norm("fastconv_plan::batch_norm_backward", grad_output, input, output, residual, weight, bias, mean, invstd,
              act, grad_input, grad_residual)
      .backward();
}

}  // namespace

FASTCONV_GPU_PLAN_OPERATORS(m) {
  m.impl("conv2d", &conv2d);
  m.impl("conv2d_bn", &conv2d_bn);
  m.impl("conv2d_input_grad", &conv2d_input_grad);
  m.impl("conv2d_input_grad_bn", &conv2d_input_grad_bn);
  m.impl("conv2d_weight_grad", &conv2d_weight_grad);
  m.impl("conv2d_weight_grad_parts", &conv2d_weight_grad_parts);
  m.impl("update", &update);
  m.impl("batch_norm", &batch_norm);
  m.impl("batch_norm_backward", &batch_norm_backward_into);
}

}  // namespace fastconv::cuda
