// The optimizer's kernel and its entry point (csrc/cuda), for ctypes and for the host side (host.cpp).
#include "driver.h"
#include "update.cu"

using namespace fastconv;

// rule: 0 plain SGD, 1 SGD with momentum, 2 Adam.
extern "C" int simt_update(int rule, const double* hyper, const UpdateTensor* tensors, int count) {
  if (rule == 2) return report(launch_update<UpdateRule::kAdam>(hyper, tensors, count, nullptr));
  return report(rule == 1 ? launch_update<UpdateRule::kSgd>(hyper, tensors, count, nullptr)
                          : launch_update<UpdateRule::kPlainSgd>(hyper, tensors, count, nullptr));
}
