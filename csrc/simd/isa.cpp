#include "simd/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace synface {

std::vector<Isa> isas() {
  std::vector<Isa> found{Isa::base};
#if SYNFACE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(Isa::avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      found.push_back(Isa::avx512);
      if (__builtin_cpu_supports("avx512bf16")) found.push_back(Isa::avx512_bf16);
    }
  }
#endif
  return found;
}

const char* name(Isa isa) {
  switch (isa) {
    case Isa::avx512_bf16:
      return "avx512_bf16";
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "base";
  }
}

Isa isa() {
  static const std::vector<Isa> available = isas();
  const char* asked = std::getenv("SYNFACE_CPU_ISA");
  if (asked == nullptr || *asked == '\0') return available.back();
  std::string offered;
  for (Isa candidate : available) {
    if (std::string(asked) == name(candidate)) return candidate;
    offered += std::string(offered.empty() ? "" : ", ") + name(candidate);
  }
  throw std::invalid_argument("SYNFACE_CPU_ISA must be one of " + offered +
                              " on this processor, got " + asked);
}

}  // namespace synface
