#include "sample_classes/cpu.h"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/splitmix.h"

#define SYNFACE_ISA_SOURCE "sample_classes/cpu-inl.h"
#include "simd/foreach_isa.h"

namespace synface::sample_classes {
namespace {

constexpr int64_t kBlock = 512;          // draws made together
constexpr int64_t kTaskWords = 1 << 12;  // words of the bitmap in the smallest task

}  // namespace

void Sample::Free::operator()(uint64_t* p) const { std::free(p); }

Sample::Sample(const Problem& p)
    : problem_(p),
      words_(ceil_div(p.classes, 64)),
      bits_(static_cast<uint64_t*>(std::calloc(size_t(words_), sizeof(uint64_t)))) {
  if (!bits_) throw std::bad_alloc();
  uint64_t* bits = bits_.get();
  int64_t positives = 0;
  for (int64_t i = 0; i < p.count; ++i) {
    const int64_t label = p.labels[i];
    if (label == p.ignore) continue;
    if (label < 0 || label >= p.classes) {
      throw std::out_of_range("target must be in [0, " + std::to_string(p.classes) + "), got " +
                              std::to_string(label));
    }
    positives += ~bits[label >> 6] >> (label & 63) & 1;
    bits[label >> 6] |= uint64_t(1) << (label & 63);
  }
  size_ = std::max(p.wanted, positives);

  const int64_t into = size_ - positives, out_of = p.classes - size_;
  left_out_ = into > out_of;
  const auto fill = SYNFACE_DISPATCH(draws);
  uint32_t block[kBlock];
  for (int64_t first = 0, left = std::min(into, out_of); left > 0; first += kBlock) {
    fill(p.seed, uint64_t(first), uint64_t(p.classes), block, kBlock);
    for (int64_t i = 0; i < kBlock && left > 0; ++i) {
      const uint64_t before = bits[block[i] >> 6];
      bits[block[i] >> 6] = before | uint64_t(1) << (block[i] & 63);
      left -= ~before >> (block[i] & 63) & 1;
    }
  }
  if (left_out_) {
    for (int64_t i = 0; i < p.count; ++i) {
      const int64_t label = p.labels[i];
      if (label != p.ignore) bits[label >> 6] &= ~(uint64_t(1) << (label & 63));
    }
  }
}

// Bits of the i-th 64 classes, 1 for those in the sample.
uint64_t Sample::word(int64_t i) const {
  const uint64_t bits = bits_.get()[i];
  if (!left_out_) return bits;
  const int64_t last = problem_.classes - 64 * i;
  return ~bits & (last >= 64 ? ~uint64_t(0) : (uint64_t(1) << last) - 1);
}

void Sample::write(const Runtime& runtime, int64_t* class_ids, int64_t* remapped) const {
  const int64_t parts =
      std::clamp<int64_t>(words_ / kTaskWords, 1, kTasksPerThread * runtime.threads);
  std::vector<int64_t> begin(size_t(parts) + 1);
  runtime.parallel(int(parts), [&](int part) {
    const Range range = part_of(words_, parts, part);
    int64_t count = 0;
    for (int64_t i = range.begin; i < range.end; ++i) count += std::popcount(word(i));
    begin[size_t(part) + 1] = count;
  });
  for (int64_t part = 0; part < parts; ++part) begin[size_t(part) + 1] += begin[size_t(part)];
  runtime.parallel(int(parts), [&](int part) {
    const Range range = part_of(words_, parts, part);
    int64_t* to = class_ids + begin[size_t(part)];
    for (int64_t i = range.begin; i < range.end; ++i) {
      for (uint64_t bits = word(i); bits != 0; bits &= bits - 1) {
        *to++ = 64 * i + std::countr_zero(bits);
      }
    }
  });
  for (int64_t i = 0; i < problem_.count; ++i) {
    const int64_t label = problem_.labels[i];
    remapped[i] = label == problem_.ignore
                      ? label
                      : std::lower_bound(class_ids, class_ids + size_, label) - class_ids;
  }
}

}  // namespace synface::sample_classes
