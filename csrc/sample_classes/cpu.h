// Sampled classes on a CPU; synface_kernels/ops/sample_classes/reference.py defines which they are.
#pragma once

#include <cstdint>
#include <memory>

#include "common/runtime.h"

namespace synface::sample_classes {

struct Problem {
  const int64_t* labels;  // `count` of them, contiguous: `ignore`, or in [0, classes)
  int64_t count;
  int64_t classes;  // < 2^31
  int64_t wanted;   // ≤ classes
  int64_t ignore;
  uint64_t seed;
};

class Sample {
 public:
  // Draws the sample. Throws std::out_of_range for a label that is not a class.
  explicit Sample(const Problem& problem);
  int64_t size() const { return size_; }
  // Writes the classes, rising, and each label's index among them (ignored labels stay).
  void write(const Runtime& runtime, int64_t* class_ids, int64_t* remapped) const;

 private:
  struct Free {
    void operator()(uint64_t* p) const;
  };
  uint64_t word(int64_t i) const;

  Problem problem_;
  int64_t words_, size_;
  std::unique_ptr<uint64_t, Free> bits_;  // one per class
  bool left_out_ = false;                 // whether the bits mark the classes outside the sample
};

}  // namespace synface::sample_classes
