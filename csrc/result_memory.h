// Memory of large results on a CPU, used again: a fresh page costs several times what writing it
// does, and a training loop asks for the same results at each step.
#pragma once

#include <ATen/core/Tensor.h>

namespace synface {

// Uninitialized, on the CPU. Its memory comes from blocks that earlier results gave back, which
// are kept up to SYNFACE_CACHE_MIB together; small results have torch's own.
at::Tensor empty_result(at::IntArrayRef size, at::ScalarType dtype, bool channels_last);

void empty_cache();      // gives what is kept back to the system
int64_t cached_bytes();  // what is kept

// Asks for huge pages for large fresh memory that is about to be written. No more than a hint.
void advise_huge_pages(const at::Tensor& memory);

}  // namespace synface
