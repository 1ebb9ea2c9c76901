// Entry points of fragment_kernels.cuh for ctypes.
#include "fragment_kernels.cuh"

#include "activation.cuh"
#include "driver.h"

using namespace fastconv;

extern "C" int simt_mma(int dtype, const void* a, const void* b, float* d) {
  const dim3 one(1), warp(32);
  if (dtype == 1)
    return report(launch(mma16_kernel<__half>, one, warp, 0, nullptr, static_cast<const __half*>(a),
                         static_cast<const __half*>(b), d));
  if (dtype == 2)
    return report(launch(mma16_kernel<__nv_bfloat16>, one, warp, 0, nullptr, static_cast<const __nv_bfloat16*>(a),
                         static_cast<const __nv_bfloat16*>(b), d));
  return report(
      launch(mma_tf32_kernel, one, warp, 0, nullptr, static_cast<const float*>(a), static_cast<const float*>(b), d));
}

extern "C" int simt_ldmatrix(const uint16_t* tiles, uint16_t* out, int trans, int pitch) {
  return report(launch(ldmatrix_kernel, dim3(1), dim3(32), 0, nullptr, tiles, out, trans, pitch));
}

extern "C" int simt_fault(const float* in, float* out, int fault) {
  return report(launch(fault_kernel, dim3(1), dim3(64), 64 * sizeof(float), nullptr, in, out, fault));
}

extern "C" int simt_fastdiv(int n, int d) { return FastDiv(d).div(n); }
extern "C" void simt_smalldiv(int n, int d, int* quotient, int* rest) { SmallDiv(d).divmod(n, *quotient, *rest); }
extern "C" void simt_divide_rows(int64_t n, int d, int64_t* quotient, int* rest) {
  divide_rows(n, d, *quotient, *rest);
}
extern "C" int simt_activation(const char* name) { return static_cast<int>(activation_from_name(name)); }
