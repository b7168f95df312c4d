// The loops over one class's cosines or centre. Included once per instruction set by
// simd/foreach_isa.h; plain loops, which the compiler turns into that set's vectors.

namespace synface::margin_cross_entropy {
namespace {
namespace SYNFACE_ISA_NAMESPACE {

#include "simd/rows-inl.h"

template <class T>
T dot(const T* a, const T* b, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// y = scale·(y + a·x)
template <class T>
void axpy_scale(T* y, T a, const T* x, T scale, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] = scale * madd(a, x[i], y[i]);
}

// y += g·(a − along·b), in double: near cos θ = ±1 a margin's slope g is large and a − along·b
// small.
template <class T>
void add_tangent(T* y, double g, const T* a, double along, const T* b, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] += T(g * (double(a[i]) - along * double(b[i])));
}

// A row of cosines: one class against every embedding. values *= factor; most = max(most, values)
template <class T>
void cosines(T* values, T factor, T* most, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T value = values[i] * factor;
    values[i] = value;
    most[i] = value > most[i] ? value : most[i];
  }
}

// values = e·factor with e = exp(scale·(values − shift)); sum += e
template <class T>
void exponentials(T* values, T factor, T scale, const T* shift, T* sum, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T e = exponential(scale * (values[i] - shift[i]));
    sum[i] += e;
    values[i] = e * factor;
  }
}

// values = coefficient·exp(factor·values − lse)
template <class T>
void probabilities(T* values, T factor, const T* lse, const T* coefficient, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    values[i] = coefficient[i] * exponential(madd(factor, values[i], -lse[i]));
  }
}

template <class T>
constexpr Loops<T> loops{dot<T>,           dot_double<T>, axpy_scale<T>,
                         add_tangent<T>,   cosines<T>,    exponentials<T>,
                         probabilities<T>, load<T>,       store<T>};

}  // namespace SYNFACE_ISA_NAMESPACE
}  // namespace
}  // namespace synface::margin_cross_entropy
