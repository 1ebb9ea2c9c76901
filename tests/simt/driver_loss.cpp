// The cross-entropy kernels and their entry points (csrc/cuda), for ctypes and for the host side (host.cpp).
#include "driver.h"
#include "loss.cu"

extern "C" int64_t simt_loss_blocks(const fastconv::LossCall* c) { return fastconv::loss_block_count(*c); }

extern "C" int simt_loss(const fastconv::LossCall* c, int backward) {
  return report(backward ? fastconv::cross_entropy_backward(*c, nullptr) : fastconv::cross_entropy(*c, nullptr));
}
