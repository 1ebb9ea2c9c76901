// The pooling kernels and their entry point (csrc/cuda), for ctypes and for the host side (host.cpp).
#include "driver.h"
#include "pool.cu"

extern "C" int simt_pool(const fastconv::PoolCall* c) { return report(fastconv::pool(*c, nullptr)); }
