// What the CPU kernels share: aligned memory, matrices of any element type, ranges of work.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <type_traits>

#include "runtime.h"

namespace synface {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Splits [0, n) into `parts` nearly equal ranges.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
inline Range part_of(int64_t n, int64_t parts, int64_t part) {
  return {n * part / parts, n * (part + 1) / parts};
}

// Uninitialized, aligned for the widest vectors.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : data_(size > 0 ? static_cast<T*>(::operator new(size_t(size) * sizeof(T), kAlign))
                       : nullptr) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kAlign); }
  };
  std::unique_ptr<T, Free> data_;
};

inline size_t bytes(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

template <class T>
constexpr Dtype dtype_of = std::is_same_v<T, double> ? Dtype::f64 : Dtype::f32;

inline const void* row_at(const Rows& rows, int64_t i) {
  return static_cast<const char*>(rows.data) + size_t(i) * size_t(rows.stride) * bytes(rows.dtype);
}

}  // namespace synface
