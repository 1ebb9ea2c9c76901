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

#include <array>
#include <atomic>
#include <cstdlib>
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

// Programmatic dependent launch, with FASTCONV_PDL=1 on sm_90 and later: a kernel starts while the one before it
// drains. Every kernel here calls ptx::pdl_wait before it touches global memory, so the order stays. Off until a GPU
// has shown what it gains (bench/gpu.sh, part pdl).
inline bool dependent_launch(const void* kernel) {
  static const bool wanted = [] {
    const char* text = std::getenv("FASTCONV_PDL");
    return text && std::string(text) == "1";
  }();
  if (!wanted) return false;
  // What the loaded code was compiled for, by device; 0: not asked yet. Not the device's own capability: PTX of sm_80
  // that a later GPU compiles for itself has no wait in it (ptx.cuh). All kernels come with one list of architectures.
  static std::array<std::atomic<int>, 64> known{};
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= static_cast<int>(known.size())) return false;
  int version = known[device].load(std::memory_order_relaxed);
  cudaFuncAttributes loaded{};
  if (version == 0 && cudaFuncGetAttributes(&loaded, kernel) == cudaSuccess)
    known[device].store(version = loaded.ptxVersion, std::memory_order_relaxed);
  return version >= 90;
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
    config.numAttrs = dependent_launch(reinterpret_cast<const void*>(kernel)) ? 1 : 0;
    e = cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...);
  }
  const cudaError_t last =
      cudaGetLastError();  // takes what a failed call left, else the next one elsewhere would raise
  if (e == cudaSuccess) e = last;
  if (e == cudaSuccess) return {};
  return {std::string("CUDA launch failed: ") + cudaGetErrorString(e)};
}

#endif

}  // namespace fastconv
