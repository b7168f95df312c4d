// SplitMix64 (Steele et al., OOPSLA 2014), as in synface_kernels/_splitmix.py.
#pragma once

#include <cstdint>

namespace synface::splitmix {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;

// Returns the output for a state.
constexpr uint64_t mixed(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

}  // namespace synface::splitmix
