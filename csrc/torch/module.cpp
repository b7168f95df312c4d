// Functions of the library that belong to no op. Schemas are defined in Python, beside their ops.
#include <string>
#include <vector>

#include <torch/headeronly/version.h>
#include <torch/library.h>

#include "simd/isa.h"
#include "torch/result_memory.h"

// `_load.py` finds this text in the file before it loads the library, which might crash or lack
// symbols in another torch. Keep the words the same in both.
#define SYNFACE_TEXT(x) #x
#define SYNFACE_TEXT_OF(x) SYNFACE_TEXT(x)
extern "C" __attribute__((used, visibility("default"))) const char synface_kernels_torch[] =
    "synface_kernels is compiled for torch " SYNFACE_TEXT_OF(
        TORCH_VERSION_MAJOR) "." SYNFACE_TEXT_OF(TORCH_VERSION_MINOR);

namespace synface {
namespace {

std::string cpu_isa() { return name(isa()); }

std::vector<std::string> cpu_isas() {
  std::vector<std::string> names;
  for (Isa each : isas()) names.emplace_back(name(each));
  return names;
}

}  // namespace

TORCH_LIBRARY_IMPL(synface_kernels, CompositeExplicitAutograd, library) {
  library.impl("_cpu_isa", cpu_isa);
  library.impl("_cpu_isas", cpu_isas);
  library.impl("_cached_bytes", cached_bytes);
  library.impl("_empty_cache", empty_cache);
  library.impl("_empty_result", empty_result);
}

}  // namespace synface
