// The loops over one row of cosines or of centres. Included once per instruction set by
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

// values *= factors, elementwise
template <class T>
void multiply(T* values, const T* factors, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) values[i] *= factors[i];
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

template <class T>
T maximum(const T* values, int64_t n) {
  T most = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; ++i) most = values[i] > most ? values[i] : most;
  return most;
}

// values = e·factors with e = exp(scale·(values − shift)); returns Σ e.
template <class T>
T exponentials(T* values, const T* factors, T scale, T shift, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const T e = exponential(scale * (values[i] - shift));
    sum += e;
    values[i] = e * factors[i];
  }
  return sum;
}

// values = coefficient·exp(scale·values·factors − lse)
template <class T>
void probabilities(T* values, const T* factors, T scale, T lse, T coefficient, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    values[i] = coefficient * exponential(madd(scale, values[i] * factors[i], -lse));
  }
}

template <class T>
constexpr Loops<T> loops{dot<T>,         dot_double<T>, multiply<T>,     axpy_scale<T>,
                         add_tangent<T>, maximum<T>,    exponentials<T>, probabilities<T>,
                         load<T>,        store<T>};

}  // namespace SYNFACE_ISA_NAMESPACE
}  // namespace
}  // namespace synface::margin_cross_entropy
