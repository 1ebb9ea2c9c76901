// Registers every raw operator's schema and makes the Python module fastconv._C.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "build_id.h"
#include "cpu/isa.h"
#include "cuda_limit.h"
#include "guard.h"
#include "schemas.h"
#include "signature.h"

#ifdef FASTCONV_WITH_CUDA
#include <cuda.h>

#include "cuda/api.h"
#endif

TORCH_LIBRARY(fastconv, m) { fastconv::define_operators(m); }
TORCH_LIBRARY(fastconv_plan, m) { fastconv::define_plan_operators(m); }

namespace {

// setup.py passes these.
#ifndef FASTCONV_CUDA_ARCHS
#define FASTCONV_CUDA_ARCHS ""
#endif
#ifndef FASTCONV_CUDA_REASON
#define FASTCONV_CUDA_REASON "not asked for at build time"
#endif

std::string cuda_version() {
#ifdef FASTCONV_WITH_CUDA
  return std::to_string(CUDA_VERSION / 1000) + "." + std::to_string(CUDA_VERSION % 1000 / 10);
#else
  return "";
#endif
}

std::string build_flags() {
  std::string text = "c++" + std::to_string(__cplusplus / 100 % 100);
#ifdef _OPENMP
  text += ", OpenMP " + std::to_string(_OPENMP);
#endif
#ifdef __OPTIMIZE__
  text += ", optimised";
#endif
  return text;
}

std::map<std::string, std::string> build_info() {
#if defined(__clang__)
  const std::string compiler = "clang " __clang_version__;
#else
  const std::string compiler = "gcc " __VERSION__;
#endif
  return {
      {"build_id", fastconv::build_id()},
      {"compiler", compiler},
      {"torch", TORCH_VERSION},
      {"cuda", cuda_version()},
      {"cuda_reason", FASTCONV_CUDA_REASON},
      {"archs", FASTCONV_CUDA_ARCHS},
      {"flags", build_flags()},
      {"cpu_isa_compiled", fastconv::cpu::isa_compiled()},
      {"cpu_isa", fastconv::cpu::isa_name(fastconv::cpu::active_isa())},
  };
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastconv's compiled operators; importing this module registers torch.ops.fastconv";
  m.def("build_info", &build_info, "How this module was built: name -> text (empty where it does not apply).");
  m.def("cuda_limit", &fastconv::cuda_limit,
        "Why the CUDA kernels cannot run a call of these sizes, or an empty text.");
#ifdef FASTCONV_WITH_CUDA
  m.def("kernel_launches", &fastconv::kernel_launches, "Lines: kernel|threads per block|dynamic shared memory.");
#endif
  fastconv::define_guard(m);
  m.def("signature", &fastconv::signature, "What decides whether a call is right and which backend runs it, as bytes.");
}
