// The kernel files of a convolution's gradients on a few rows, in the order that they need each other; read once per
// instruction set.
#include "gemm_tile.h"
//
#include "optimizer.h"
//
#ifndef FASTCONV_AMX
#include "conv_few_rows.h"
#endif
