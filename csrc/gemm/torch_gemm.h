// The one seam to the vendor's matrix product: whatever torch was built with.
#pragma once

#include "runtime.h"

namespace synface {

// Threads and products of torch. Products called from inside `parallel` run on one thread each.
template <class T>
Runtime<T> torch_runtime();

}  // namespace synface
