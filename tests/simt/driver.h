// What every driver library exports besides its own functions: seed, counters, last error.
#pragma once

#include <dlfcn.h>

#include "launch.cuh"

static std::string g_last_error;

static int report(const std::string& message) {
  g_last_error = message;
  return message.empty() ? 0 : 1;
}
[[maybe_unused]] static int report(const fastconv::Status& status) { return report(status.message); }

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
// Lines "launches symbol" of every kernel started since the last call; valid until the next.
const char* simt_launches() {
  static std::string text;
  text.clear();
  for (const auto& [kernel, count] : simt::g.launches) {
    Dl_info info{};
    const bool known = dladdr(kernel, &info) && info.dli_sname;
    text += std::to_string(count) + " " + (known ? info.dli_sname : "unknown") + "\n";
  }
  simt::g.launches.clear();
  return text.c_str();
}
}
