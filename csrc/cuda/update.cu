// Entry point of the optimizer's kernel.
#include <vector>

#include "api.h"
#include "kernels/update.cuh"

namespace fastconv {

std::string update(const UpdateCall& c, LaunchStream stream) {
  std::vector<UpdateTensor> tensors;
  tensors.reserve(c.tensors.size());
  for (const UpdateCall::Tensor& t : c.tensors) {
    tensors.push_back({t.weight, t.momentum, t.variance, t.half, t.grad, t.elements, t.live, t.inner, t.taps, t.splits,
                       static_cast<int8_t>(t.grad_dtype), static_cast<int8_t>(t.half_dtype), false});
  }
  const auto run = [&](auto launch) {
    return launch(c.hyper, tensors.data(), static_cast<int>(tensors.size()), static_cast<Stream>(stream)).message;
  };
  if (c.adam) return run(launch_update<UpdateRule::kAdam>);
  return c.momentum ? run(launch_update<UpdateRule::kSgd>) : run(launch_update<UpdateRule::kPlainSgd>);
}

}  // namespace fastconv
