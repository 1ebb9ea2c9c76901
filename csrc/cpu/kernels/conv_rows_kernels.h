// The kernel files of the row-class convolution in the order that they need each other; read once per instruction set.
#include "gemm_tile.h"
//
#include "gemm_tile_pack.h"
//
#ifdef FASTCONV_AMX
#include "gemm_tile_amx.h"
#endif
//
#ifdef FASTCONV_WGRAD_KERNELS
#ifdef FASTCONV_AMX
#include "conv_rows_wgrad_amx.h"
#endif
//
#include "conv_rows_wgrad.h"
#else
#include "conv_rows.h"
#ifndef FASTCONV_AMX
//
#include "conv_rows_dots.h"
#endif
#endif
#ifdef FASTCONV_AMX
#undef FASTCONV_TILE_ZERO
#undef FASTCONV_TILE_STORE
#undef FASTCONV_TILE_FENCE
#endif
