// torch's threads, for the CPU kernels.
#pragma once

#include "runtime.h"

namespace synface {

Runtime torch_runtime();

}  // namespace synface
