// What a CPU kernel needs from the program around it: threads and matrix products. The torch
// bindings and the NumPy bindings each bring their own, so the kernels know neither.
#pragma once

#include <cstdint>
#include <functional>

namespace synface {

// Row-major C (m×n) = op(A)·op(B), or C += it. Called from inside `Runtime::parallel`.
template <class T>
using Product = std::function<void(bool transpose_a, bool transpose_b, int64_t m, int64_t n,
                                   int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb,
                                   T* c, int64_t ldc, bool accumulate)>;

template <class T>
struct Runtime {
  int threads;  // how many tasks run at once; each takes the next one when it is done
  std::function<void(int tasks, const std::function<void(int task)>&)> parallel;
  Product<T> product;
};

// Element types that arrive from outside.
enum class Dtype { f32, f64, bf16, f16, u8 };

// A matrix with contiguous rows, `stride` elements apart.
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t rows, cols, stride;
};

}  // namespace synface
