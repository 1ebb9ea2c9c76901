// Threads per block and dynamic shared memory of every kernel: what a launch decides and machine code does not tell.
#pragma once

#include <cxxabi.h>

#include <cstdlib>
#include <string>
#include <typeinfo>

#include "kernels/act_backward.cuh"
#include "kernels/batch_norm_backward.cuh"
#include "kernels/batch_norm_fold.cuh"
#include "kernels/conv_depthwise.cuh"
#include "kernels/conv_launch.cuh"
#include "kernels/cross_entropy_backward.cuh"
#include "kernels/pool.cuh"
#include "kernels/update.cuh"

namespace fastconv {
namespace table {

inline void row(std::string& out, const std::string& name, int threads, int smem) {
  out += name + "|" + std::to_string(threads) + "|" + std::to_string(smem) + "\n";
}

template <class Tr>
void traits(std::string& out, const char* kernel) {
  char* name = abi::__cxa_demangle(typeid(Tr).name(), nullptr, nullptr, nullptr);
  row(out, std::string(kernel) + "<" + name + ">", Tr::kThreads, Tr::kSmem);
  std::free(name);
}
template <class... Tr>
void gemm(std::string& out) {
  (traits<Tr>(out, "conv_gemm_kernel"), ...);
}
template <class... Tr>
void wgrad(std::string& out) {
  (traits<Tr>(out, "conv_wgrad_kernel"), ...);
}
template <class T, bool D, bool P>
void tiles(std::string& out) {
  gemm<TensorTile<T, D, P, 0>, TensorTile<T, D, P, 1>, TensorTile<T, D, P, 2>, TensorTile<T, D, P, 3>,
       TensorTile<T, D, P, 4>, TensorTile<T, D, P, 5>, NarrowTile<T, D, P>>(out);
}
template <bool D, bool P>
void exact(std::string& out) {
  gemm<ExactTile<D, P, 0>, ExactTile<D, P, 1>, ExactTile<D, P, 2>, ExactNarrowTile<D, P>>(out);
}
template <class T, bool X>
void wgrad_tiles(std::string& out) {
  constexpr int kOne = sizeof(T);
  wgrad<WgradTile<T, X, 0, 16, 16>, WgradTile<T, X, 1, 16, 16>, WgradTile<T, X, 0, 16, kOne>,
        WgradTile<T, X, 0, kOne, kOne>>(out);
}
template <class T>
void conv(std::string& out) {
  tiles<T, false, false>(out), tiles<T, false, true>(out), tiles<T, true, false>(out);
  wgrad_tiles<T, true>(out);
}

}  // namespace table

// Lines "kernel|threads|dynamic shared memory": the convolutions by their traits, the others for all of a kernel's
// instances.
inline std::string launch_table() {
  std::string out;
  table::conv<__half>(out), table::conv<__nv_bfloat16>(out), table::conv<float>(out);
  table::exact<false, false>(out), table::exact<false, true>(out), table::exact<true, false>(out);
  table::wgrad_tiles<float, false>(out);
  constexpr int kMerge = kMergeChannels * kMergeSlices;
  const struct {
    const char* name;
    int threads;
  } others[] = {
      {"conv_reduce_kernel", kReduceThreads},
      {"depthwise_kernel", kDepthwiseThreads},
      {"depthwise_wgrad_kernel", kWgradChannels * kWgradSlices},
      {"act_backward_kernel", kColumnThreads},
      {"act_bias_merge_kernel", kMerge},
      {"bn_stats_kernel", kColumnThreads},
      {"bn_merge_kernel", kMerge},
      {"bn_apply_kernel", kColumnThreads},
      {"bn_small_kernel", kColumnThreads},
      {"bn_backward_sums_kernel", kColumnThreads},
      {"bn_backward_merge_kernel", kMerge},
      {"bn_backward_dx_kernel", kColumnThreads},
      {"bn_backward_small_kernel", kColumnThreads},
      {"batch_norm_fold_kernel", kFoldThreads},
      {"max_pool_kernel", kPoolThreads},
      {"max_pool_backward_kernel", kPoolThreads},
      {"avg_pool_kernel", kPoolThreads},
      {"avg_pool_backward_kernel", kPoolThreads},
      {"cross_entropy_kernel", kLossThreads},
      {"cross_entropy_finish_kernel", kFinishThreads},
      {"cross_entropy_backward_kernel", kLossThreads},
      {"update_kernel", kUpdateThreads},
  };
  for (const auto& o : others) table::row(out, o.name, o.threads, 0);
  return out;
}

}  // namespace fastconv
