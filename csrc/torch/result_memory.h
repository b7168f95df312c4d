// A caching allocator for large CPU results: writing to a fresh page costs several times what
// writing to a used one does, and a training loop needs results of the same sizes at each step.
#pragma once

#include <ATen/core/Tensor.h>

namespace synface {

// Returns an uninitialized CPU tensor. Results of 2 MiB and more come from the caching allocator,
// which caches up to SYNFACE_CACHE_MIB of freed memory, or without that variable 512 MiB and the
// last larger block; smaller ones from torch's allocator.
at::Tensor empty_result(at::IntArrayRef size, at::ScalarType dtype, bool channels_last);

void empty_cache();      // returns all cached memory to the system
int64_t cached_bytes();  // size of all cached memory

// Hints that fresh memory, which is about to be written, should use huge pages.
void advise_huge_pages(const at::Tensor& memory);

}  // namespace synface
