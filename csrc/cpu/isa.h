// Which instruction set the CPU kernels use. Every kernel file is compiled once per set (foreach_isa.h); the choice is
// made at run time.
#pragma once

#include <string>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTCONV_X86 1  // GCC's target pragma is what compiles one file for several instruction sets
#else
#define FASTCONV_X86 0
#endif

namespace fastconv::cpu {

// Ordered: each set contains the ones before it.
enum class Isa : int { portable, avx2, avx512, avx512_bf16, amx_bf16 };

// The best set that this machine has; FASTCONV_CPU_ISA=portable|avx2|avx512|avx512_bf16|amx_bf16 lowers it. Read once.
Isa active_isa();
const char* isa_name(Isa isa);
// Comma-separated names of the compiled sets.
std::string isa_compiled();

}  // namespace fastconv::cpu
