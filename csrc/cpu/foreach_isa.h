// Compiles one kernel file for each instruction set. Usage, in a host file:
//   #define FASTCONV_KERNELS "kernels/pool.h"
//   #include "foreach_isa.h"
//   auto* kernel = FASTCONV_PICK(max_pool<float>);      // the active set's version
// The kernel file lands in fastconv::cpu::<set>. It must not include or instantiate anything of the standard library:
// an inline function compiled here with wide instructions could be the copy that the linker keeps for the whole
// program. No include guard on vec.h, act.h and the kernel files: they are meant to be read once per set.

#include "../params.h"
#include "isa.h"
#include "types.h"

#if FASTCONV_X86
#include <immintrin.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"                // vectors are passed between inlined functions of one set only
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12 warns inside its own immintrin.h

#define FASTCONV_ISA_NS portable
#define FASTCONV_VEC_BYTES 16
#include "kernels/vec.h"
//
#include "kernels/act.h"
//
#include FASTCONV_KERNELS
#undef FASTCONV_ISA_NS
#undef FASTCONV_VEC_BYTES

#if FASTCONV_X86

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define FASTCONV_ISA_NS avx2
#define FASTCONV_VEC_BYTES 32
#include "kernels/vec.h"
//
#include "kernels/act.h"
//
#include FASTCONV_KERNELS
#undef FASTCONV_ISA_NS
#undef FASTCONV_VEC_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define FASTCONV_ISA_NS avx512
#define FASTCONV_VEC_BYTES 64
#include "kernels/vec.h"
//
#include "kernels/act.h"
//
#include FASTCONV_KERNELS
#undef FASTCONV_ISA_NS
#undef FASTCONV_VEC_BYTES
#pragma GCC pop_options

// FASTCONV_KERNELS_BF16: two more sets, whose dot product of bf16 pairs (FASTCONV_DPBF16) and matrix product of bf16
// tiles (FASTCONV_AMX as well) the kernel file uses where they are defined. Only matrix kernels gain from them.
#ifdef FASTCONV_KERNELS_BF16
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define FASTCONV_ISA_NS avx512_bf16
#define FASTCONV_VEC_BYTES 64
#define FASTCONV_DPBF16
#include "kernels/vec.h"
//
#include "kernels/act.h"
//
#include FASTCONV_KERNELS
#undef FASTCONV_ISA_NS
#undef FASTCONV_VEC_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target( \
    "amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define FASTCONV_ISA_NS amx_bf16
#define FASTCONV_VEC_BYTES 64
#define FASTCONV_AMX
#include "kernels/vec.h"
//
#include "kernels/act.h"
//
#include FASTCONV_KERNELS
#undef FASTCONV_AMX
#undef FASTCONV_DPBF16
#undef FASTCONV_ISA_NS
#undef FASTCONV_VEC_BYTES
#pragma GCC pop_options
#endif

#define FASTCONV_PICK(...)                                                                               \
  (::fastconv::cpu::active_isa() >= ::fastconv::cpu::Isa::avx512 ? &::fastconv::cpu::avx512::__VA_ARGS__ \
   : ::fastconv::cpu::active_isa() == ::fastconv::cpu::Isa::avx2 ? &::fastconv::cpu::avx2::__VA_ARGS__   \
                                                                 : &::fastconv::cpu::portable::__VA_ARGS__)

#else

#define FASTCONV_PICK(...) (&::fastconv::cpu::portable::__VA_ARGS__)

#endif
