// What every driver library exports besides its own functions: seed, counters, last error.
#pragma once

#include "launch.cuh"

static std::string g_last_error;

static int report(const fastconv::Status& status) {
  g_last_error = status.message;
  return status.ok() ? 0 : 1;
}

extern "C" {
const char* simt_error() { return g_last_error.c_str(); }
void simt_seed(uint64_t seed) { simt::g.seed = seed; }
void simt_counters(int64_t* out) {
  const simt::Counters& c = simt::g.counters;
  const int64_t values[] = {c.ldmatrix,       c.ldmatrix_conflicts, c.mma,   c.cp_async16,
                            c.cp_async_small, c.barriers,           c.blocks};
  std::memcpy(out, values, sizeof(values));
  simt::g.counters = {};
}
}

// Calls f(T{}) for the dtype that the tests name: 0 fp32, 1 fp16, 2 bf16.
template <class F>
static int for_dtype(int dtype, F f) {
  switch (dtype) {
    case 0:
      return report(f(float{}));
    case 1:
      return report(f(__half{}));
    case 2:
      return report(f(__nv_bfloat16{}));
    default:
      return report({"unknown dtype"});
  }
}
