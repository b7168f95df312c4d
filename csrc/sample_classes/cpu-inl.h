// The random stream of classes. Included once per instruction set by simd/foreach_isa.h; a plain
// loop, which the compiler vectorizes for that set.

namespace synface::sample_classes {
namespace {
namespace SYNFACE_ISA_NAMESPACE {

// Writes draws first … first + n − 1 of the stream: SplitMix64 by its counter, scaled to
// [0, classes).
void draws(uint64_t seed, uint64_t first, uint64_t classes, uint32_t* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint64_t z = splitmix::mixed(seed + (first + uint64_t(i) + 1) * splitmix::kGolden);
    // The upper 64 bits of z·classes.
    to[i] = uint32_t(((z >> 32) * classes + ((z & 0xffffffff) * classes >> 32)) >> 32);
  }
}

}  // namespace SYNFACE_ISA_NAMESPACE
}  // namespace
}  // namespace synface::sample_classes
