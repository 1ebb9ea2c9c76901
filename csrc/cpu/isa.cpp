#include "isa.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <cstring>

#if FASTCONV_X86 && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastconv::cpu {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

// The tile registers are 8 KB of state for every thread: Linux hands them out on request, once for the whole process
// (Documentation/arch/x86/xstate.rst). It refuses where a thread's signal stack is too small to save them.
bool may_use_tiles() {
#if FASTCONV_X86 && defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa best_isa() {
#if FASTCONV_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && may_use_tiles())
    return Isa::amx_bf16;
  if (bf16) return Isa::avx512_bf16;
  if (avx512) return Isa::avx512;
  if (avx2) return Isa::avx2;
#endif
  return Isa::portable;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* wish = std::getenv("FASTCONV_CPU_ISA");
  if (wish == nullptr || *wish == '\0') return best;
  for (int i = 0; i <= static_cast<int>(Isa::amx_bf16); ++i) {
    if (std::strcmp(wish, kNames[i]) != 0) continue;
    TORCH_CHECK(i <= static_cast<int>(best),
                "FASTCONV_CPU_ISA: expected an instruction set that this machine has (at most ", isa_name(best),
                "), got ", wish);
    return static_cast<Isa>(i);
  }
  TORCH_CHECK(false, "FASTCONV_CPU_ISA: expected one of portable, avx2, avx512, avx512_bf16, amx_bf16, got ", wish);
}

}  // namespace

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::string isa_compiled() {
#if FASTCONV_X86
  return "portable, avx2, avx512, avx512_bf16, amx_bf16";
#else
  return "portable";
#endif
}

}  // namespace fastconv::cpu
