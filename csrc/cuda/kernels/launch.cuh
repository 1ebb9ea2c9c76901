// launch(...): the one way in which a kernel is started, on a GPU and in the emulator.
//
// Returns a Status whose message is empty on success; the host side of an op turns a message into an exception. Nothing
// here allocates, synchronises or reads the device, so a launch can be captured in a CUDA graph.
#pragma once

#include <initializer_list>

#include "ptx.cuh"

#if defined(FASTCONV_SIMT)
#include <string>
#else
#include <cuda_runtime.h>

#include <string>
#endif

namespace fastconv {

struct Status {
  std::string message;
  bool ok() const { return message.empty(); }
};

#if defined(FASTCONV_SIMT)

using Stream = void*;

template <class... Params, class... Args>
Status launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes, Stream, Args... args) {
  return {simt::run(kernel, grid, block, smem_bytes, static_cast<Params>(args)...)};
}

#else

using Stream = cudaStream_t;

// Programmatic dependent launch: the host side sets this once when the device is sm_90 or later. A kernel then starts
// while the one before it drains; every kernel here calls ptx::pdl_wait before it touches global memory, so the order
// stays.
inline bool& pdl_enabled() {
  static bool enabled = false;
  return enabled;
}

template <class... Params, class... Args>
Status launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes, Stream stream, Args... args) {
  constexpr size_t kDefaultSmem = 48 * 1024;  // more must be asked for, once per kernel and device
  cudaError_t e = cudaSuccess;
  if (smem_bytes > kDefaultSmem)
    e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(smem_bytes));
  if (e == cudaSuccess) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = smem_bytes;
    config.stream = stream;
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &overlap;
    config.numAttrs = pdl_enabled() ? 1 : 0;
    e = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  }
  if (e == cudaSuccess) e = cudaGetLastError();
  if (e == cudaSuccess) return {};
  return {std::string("CUDA launch failed: ") + cudaGetErrorString(e)};
}

#endif

}  // namespace fastconv
