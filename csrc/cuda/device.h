// The device under the host side of the operators: guard, stream, size. Under FASTCONV_SIMT (tests/simt) the "device"
// is the emulator and the tensors lie on the CPU; everything else of the host side is the same code.
#pragma once

#include <ATen/core/Tensor.h>

#include "api.h"

#ifdef FASTCONV_SIMT
#include <cstdlib>
#define FASTCONV_GPU_OPERATORS(m) TORCH_LIBRARY_IMPL(fastconv_simt, CPU, m)
#define FASTCONV_GPU_PLAN_OPERATORS(m) TORCH_LIBRARY_IMPL(fastconv_simt_plan, CPU, m)
#else
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>

#include <array>
#include <atomic>
#define FASTCONV_GPU_OPERATORS(m) TORCH_LIBRARY_IMPL(fastconv, CUDA, m)
#define FASTCONV_GPU_PLAN_OPERATORS(m) TORCH_LIBRARY_IMPL(fastconv_plan, CUDA, m)
#endif

namespace fastconv::cuda {

#ifdef FASTCONV_SIMT

struct Device {
  explicit Device(const at::Tensor&) {}
  LaunchStream stream() const { return nullptr; }
  // Few, so that small tests reach more than one wave, split sums and several chunks; tests/simt/launches.py sets more.
  int multiprocessors() const {
    const char* text = std::getenv("FASTCONV_SIMT_MULTIPROCESSORS");
    return text ? std::atoi(text) : 4;
  }
};

#else

// Makes the tensor's device current while it lives.
class Device {
 public:
  explicit Device(const at::Tensor& t) : guard_(t.device()), index_(t.device().index()) {}
  LaunchStream stream() const { return c10::cuda::getCurrentCUDAStream(index_).stream(); }
  int multiprocessors() const {
    static std::array<std::atomic<int>, 64> known{};
    if (index_ < 0 || index_ >= 64) return ask();
    int count = known[index_].load(std::memory_order_relaxed);
    if (count == 0) known[index_].store(count = ask(), std::memory_order_relaxed);
    return count;
  }

 private:
  int ask() const {
    int count = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index_));
    return count;
  }
  c10::cuda::CUDAGuard guard_;
  int index_;
};

#endif

}  // namespace fastconv::cuda
