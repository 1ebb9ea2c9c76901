// The kernel files of the convolution in narrow groups in the order that they need each other; read once per
// instruction set.
#ifndef FASTCONV_AMX
#include "gemm_tile.h"
//
#include "conv_grouped.h"
#endif
