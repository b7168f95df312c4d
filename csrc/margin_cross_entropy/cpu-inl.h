// Loops over one class's cosines or center. Included once per instruction set by
// simd/foreach_isa.h; plain loops, which the compiler vectorizes for that set.

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
inline T cosine(T dot, Parts<T> inverse) {
  return madd(dot, inverse.high, dot * inverse.low);
}

// to = factor·from, which may be the same row.
template <class T>
void normalize(const T* from, double factor, T* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = T(double(from[i]) * factor);
}

// values *= factors, given in two parts.
template <class T>
void scale_each(T* values, const T* high, const T* low, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) values[i] = madd(values[i], high[i], values[i] * low[i]);
}

// Scales a row of dot products, one center with every embedding, to cosines.
template <class T>
void cosines(T* values, Parts<T> inverse, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) values[i] = cosine(values[i], inverse);
}

// most = max(most, values)
template <class T>
void greatest(const T* values, T* most, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) most[i] = values[i] > most[i] ? values[i] : most[i];
}

// Keeps the greatest cosine of a class's sub-centers, the first of equals, and sets the others to
// −∞. Rows of cosines are `stride` apart. NaN stays.
template <class T>
void keep_greatest(T* values, int64_t stride, int64_t sub_centers, T* best, int64_t n) {
  constexpr T infinity = std::numeric_limits<T>::infinity();
  std::fill_n(best, n, -infinity);
  for (int64_t s = 0; s < sub_centers; ++s) greatest(values + s * stride, best, n);
  for (int64_t s = 0; s < sub_centers; ++s) {
    T* row = values + s * stride;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const bool less = row[i] < best[i], is_best = row[i] == best[i];
      row[i] = less ? -infinity : row[i];
      best[i] = is_best ? infinity : best[i];  // later ones are less
    }
  }
}

// Sets values above the limit to −∞ and counts them.
template <class T>
void filter(T* values, T limit, T* count, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const bool above = values[i] > limit;
    count[i] += above ? T(1) : T(0);
    values[i] = above ? -std::numeric_limits<T>::infinity() : values[i];
  }
}

// sum += factor·row
template <class T>
void add_scaled(double* sum, double factor, const T* row, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += factor * double(row[i]);
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

// values = coefficient·exp(scale·cosine − lse), and 0 where the coefficient is 0, whatever the
// cosine. Cosines equal those of the log-sum-exp bit for bit, so that a probability near 1 keeps
// all its digits.
template <class T>
void probabilities(const T* cosines, T scale, const T* lse, const T* coefficient, T* values,
                   int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T value = coefficient[i] * exponential(madd(scale, cosines[i], -lse[i]));
    values[i] = coefficient[i] == 0 ? T(0) : value;
  }
}

template <class T>
constexpr SimdKernels<T> simd_kernels{.dot = dot<T>,
                                      .dot_double = dot_double<T>,
                                      .axpy_scale = axpy_scale<T>,
                                      .add_tangent = add_tangent<T>,
                                      .normalize = normalize<T>,
                                      .scale_each = scale_each<T>,
                                      .cosines = cosines<T>,
                                      .greatest = greatest<T>,
                                      .keep_greatest = keep_greatest<T>,
                                      .filter = filter<T>,
                                      .add_scaled = add_scaled<T>,
                                      .exponentials = exponentials<T>,
                                      .probabilities = probabilities<T>,
                                      .load = load<T>,
                                      .store = store<T>};

}  // namespace SYNFACE_ISA_NAMESPACE
}  // namespace
}  // namespace synface::margin_cross_entropy
