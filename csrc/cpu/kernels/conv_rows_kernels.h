// The kernel files of the row-class convolution in the order that they need each other; read once per instruction set.
#include "gemm_tile.h"
//
#include "gemm_tile_pack.h"
//
#include "conv_rows.h"
//
#include "conv_rows_wgrad.h"
