// torch's threads as the runtime of the CPU kernels.
#pragma once

#include "common/runtime.h"

namespace synface {

Runtime torch_runtime();

}  // namespace synface
