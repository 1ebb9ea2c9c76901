// The raw operators have no derivative: their gradients live in fastconv/autograd, outside of them. Whoever asks for
// one all the same (a second derivative in compiled code, the backward of an exported program) gets an error from it.
// PyTorch's own default for an operator without an autograd kernel is a warning and a gradient that is not there.

#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

TORCH_LIBRARY_IMPL(fastconv, Autograd, m) {
  for (const char* name :
       {"conv2d_bias_act", "conv2d_backward", "act_bias_backward", "batch_norm_act", "batch_norm_act_backward",
        "conv2d_bn_act", "max_pool2d", "max_pool2d_backward", "avg_pool2d", "avg_pool2d_backward",
        "adaptive_avg_pool2d", "adaptive_avg_pool2d_backward", "cross_entropy", "cross_entropy_backward"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}
