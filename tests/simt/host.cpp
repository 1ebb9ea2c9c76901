// The operators of csrc/cuda under the names fastconv_simt::* and fastconv_simt_plan::*, over CPU tensors: the same
// host files, their launches answered by the emulator.
#include "../../csrc/schemas.h"

TORCH_LIBRARY(fastconv_simt, m) { fastconv::define_operators(m); }
TORCH_LIBRARY(fastconv_simt_plan, m) { fastconv::define_plan_operators(m); }
