// Entry point of the optimizer's kernel.
#include "api.h"
#include "kernels/update.cuh"

namespace fastconv {

std::string update(const UpdateCall& c, LaunchStream stream) {
  const auto run = [&](auto launch) {
    return launch(c.hyper, c.tensors.data(), static_cast<int>(c.tensors.size()), static_cast<Stream>(stream)).message;
  };
  if (c.adam) return run(launch_update<UpdateRule::kAdam>);
  return c.momentum ? run(launch_update<UpdateRule::kSgd>) : run(launch_update<UpdateRule::kPlainSgd>);
}

}  // namespace fastconv
