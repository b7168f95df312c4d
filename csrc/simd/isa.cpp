#include "simd/isa.h"

#include <cstdlib>
#include <stdexcept>

namespace synface {

namespace {
enum class OneDnn { absent, slower, faster } onednn = OneDnn::absent;
}

void offer_onednn(bool faster) { onednn = faster ? OneDnn::faster : OneDnn::slower; }

std::vector<Isa> isas() {
  std::vector<Isa> found{Isa::base};
#if SYNFACE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(Isa::avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      found.push_back(Isa::avx512);
      if (__builtin_cpu_supports("avx512bf16")) {
        if (onednn == OneDnn::slower) found.push_back(Isa::onednn_bf16);
        found.push_back(Isa::avx512_bf16);
        if (onednn == OneDnn::faster) found.push_back(Isa::onednn_bf16);
      }
    }
  }
#endif
  return found;
}

const char* name(Isa isa) {
  switch (isa) {
    case Isa::onednn_bf16:
      return "onednn_bf16";
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

bool prefers_bf16_splits() {
  const char* set = std::getenv("SYNFACE_CPU_ISA");
  const bool named = set != nullptr && *set != '\0';
  return isa() >= Isa::avx512_bf16 && (named || onednn == OneDnn::faster);
}

bool prefers_bf16() {
#if SYNFACE_X86
  if (isa() >= Isa::avx512_bf16 && __builtin_cpu_is("amd")) return true;
#endif
  return prefers_bf16_splits();
}

Isa isa() {
  static const std::vector<Isa> available = isas();
  const char* set = std::getenv("SYNFACE_CPU_ISA");
  if (set == nullptr || *set == '\0') return available.back();
  // Without torch there is no oneDNN, but what can run it can run our own.
  const bool ours = onednn == OneDnn::absent && set == std::string(name(Isa::onednn_bf16));
  const std::string asked = ours ? name(Isa::avx512_bf16) : set;
  std::string offered;
  for (Isa candidate : available) {
    if (asked == name(candidate)) return candidate;
    offered += std::string(offered.empty() ? "" : ", ") + name(candidate);
  }
  throw std::invalid_argument("SYNFACE_CPU_ISA must be one of " + offered +
                              " on this processor, got " + set);
}

}  // namespace synface
