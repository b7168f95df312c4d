// Matrices of any element type, and the conversion of their rows to the type of the arithmetic.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "common/memory.h"

namespace synface {

// A row whose norm is at most this counts as zero; the same value as in Python's _norms.py.
constexpr double kNormMin = 1e-12;

// Element types of arguments and results.
enum class Dtype { f32, f64, bf16, f16, u8 };

inline size_t bytes(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

template <class T>
constexpr Dtype dtype_of = std::is_same_v<T, double> ? Dtype::f64 : Dtype::f32;

// A matrix with contiguous rows, `stride` elements apart.
struct Rows {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t rows = 0, cols = 0, stride = 0;
};

inline const void* row_at(const Rows& rows, int64_t i) {
  return static_cast<const char*>(rows.data) + size_t(i) * size_t(rows.stride) * bytes(rows.dtype);
}

// The same for a matrix that is written.
struct MutableRows {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t stride = 0;
};

inline void* row_at(const MutableRows& rows, int64_t i) {
  return static_cast<char*>(rows.data) + size_t(i) * size_t(rows.stride) * bytes(rows.dtype);
}

// Converts n elements to T; an instruction set's version of `load` in simd/rows-inl.h.
template <class T>
using LoadRow = void (*)(const void* from, Dtype dtype, T* to, int64_t n);

// One row at a time as T: the row itself where its dtype is T, otherwise a converted copy, which
// the next row overwrites.
template <class T>
class RowConverter {
 public:
  RowConverter(Dtype dtype, int64_t cols, LoadRow<T> load)
      : dtype_(dtype), cols_(cols), load_(load), copy_(copies() ? cols : 0) {}

  bool copies() const { return dtype_ != dtype_of<T>; }
  T* row(void* from) const { return copies() ? converted(from) : static_cast<T*>(from); }
  const T* row(const void* from) const {
    return copies() ? converted(from) : static_cast<const T*>(from);
  }

 private:
  T* converted(const void* from) const {
    load_(from, dtype_, copy_.get(), cols_);
    return copy_.get();
  }
  Dtype dtype_;
  int64_t cols_;
  LoadRow<T> load_;
  Buffer<T> copy_;
};

// Rows of a matrix as T, by index.
template <class T>
class RowReader {
 public:
  RowReader(const Rows& rows, LoadRow<T> load)
      : rows_(rows), converter_(rows.dtype, rows.cols, load) {}
  const T* row(int64_t i) const { return converter_.row(row_at(rows_, i)); }

 private:
  Rows rows_;
  RowConverter<T> converter_;
};

}  // namespace synface
