// The table of launches, for the Python module.
#include "launch_table.cuh"

#include "api.h"

namespace fastconv {

std::string kernel_launches() { return launch_table(); }

}  // namespace fastconv
