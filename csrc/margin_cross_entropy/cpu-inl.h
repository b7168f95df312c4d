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

// The inverse norm comes in two parts: rounded to one, its error would be the same in all of a
// class's cosines, and scale times as large in their exponentials.
template <class T>
inline T cosine(T product, Parts<T> inverse) {
  return madd(product, inverse.high, product * inverse.low);
}

// values *= factors, which come in two parts
template <class T>
void scale_each(T* values, const T* high, const T* low, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) values[i] = madd(values[i], high[i], values[i] * low[i]);
}

// A row of products, one class against every embedding, to cosines; most = max(most, cosines)
template <class T>
void cosines(T* values, Parts<T> inverse, T* most, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T value = cosine(values[i], inverse);
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

// A row of products to coefficient·exp(scale·cosine − lse). The cosines are those that the
// log-sum-exps were made of, to the last bit: so a probability near 1 keeps all its digits.
template <class T>
void probabilities(T* values, Parts<T> inverse, T scale, const T* lse, const T* coefficient,
                   int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T difference = madd(scale, cosine(values[i], inverse), -lse[i]);
    values[i] = coefficient[i] * exponential(difference);
  }
}

template <class T>
constexpr Loops<T> loops{dot<T>,        dot_double<T>, axpy_scale<T>,   add_tangent<T>,
                         scale_each<T>, cosines<T>,    exponentials<T>, probabilities<T>,
                         load<T>,       store<T>};

}  // namespace SYNFACE_ISA_NAMESPACE
}  // namespace
}  // namespace synface::margin_cross_entropy
