// The linker's digest of this module.
#pragma once

#include <string>

namespace fastconv {

// The ELF build ID in hexadecimal: another one whenever code or data of the module differ. setup.py asks the linker for
// it. Read from memory: hashing the file would cost every process 0.1 s with the CUDA kernels in it.
std::string build_id();

}  // namespace fastconv
