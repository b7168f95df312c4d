// The stream of random classes. Included once per instruction set by simd/foreach_isa.h; a plain
// loop, which the compiler turns into that set's vectors.

namespace synface::sample_classes {
namespace {
namespace SYNFACE_ISA_NAMESPACE {

// Draws first … first + n − 1 of the stream: SplitMix64 by its counter, scaled to [0, classes).
void draws(uint64_t seed, uint64_t first, uint64_t classes, uint32_t* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t z = splitmix::mixed(seed + (first + uint64_t(i) + 1) * splitmix::kGolden);
    // The product's upper 64 bits.
    to[i] = uint32_t(((z >> 32) * classes + ((z & 0xffffffff) * classes >> 32)) >> 32);
  }
}

}  // namespace SYNFACE_ISA_NAMESPACE
}  // namespace
}  // namespace synface::sample_classes
