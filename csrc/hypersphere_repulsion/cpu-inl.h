// Loops over points and over rows of cosines. Included once per instruction set by
// simd/foreach_isa.h; plain loops, which the compiler vectorizes for that set.

namespace synface::hypersphere_repulsion {
namespace {
namespace SYNFACE_ISA_NAMESPACE {

#include "simd/rows-inl.h"

// ln(x) for normal x > 0: 1 ULP or so.
inline float logarithm(float x) {
  const int32_t bits = std::bit_cast<int32_t>(x);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;  // so that the rest is in [√½, √2)
  const float n = float(exponent);
  const float f = std::bit_cast<float>(bits - (exponent << 23)) - 1.f;
  float p = madd(7.0376836292e-2f, f, -1.1514610310e-1f);
  p = madd(p, f, 1.1676998740e-1f);
  p = madd(p, f, -1.2420140846e-1f);
  p = madd(p, f, 1.4249322787e-1f);
  p = madd(p, f, -1.6668057665e-1f);
  p = madd(p, f, 2.0000714765e-1f);
  p = madd(p, f, -2.4999993993e-1f);
  p = madd(p, f, 3.3333331174e-1f);
  const float square = f * f;
  float y = p * f * square;
  y = madd(n, -2.12194440e-4f, y);
  y = madd(square, -0.5f, y);
  return madd(n, 0.693359375f, f + y);
}
inline double logarithm(double x) { return std::log(x); }

// values *= factor
template <class T>
void multiply(T* values, T factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) values[i] *= factor;
}

// values *= factor·factors
template <class T>
void multiply_each(T* values, T factor, const T* factors, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) values[i] *= factor * factors[i];
}

template <class T>
T maximum(const T* values, int64_t n) {
  T most = -std::numeric_limits<T>::infinity();
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < n; ++i) most = values[i] > most ? values[i] : most;
  return most;
}

// Returns the begin of the first chunk, from `from` on, with a value that reaches the row's
// threshold or its column's (null: the row's alone); n if there is none.
template <class T>
int64_t first_reaching(const T* values, T row, const T* columns, int64_t from, int64_t n) {
  for (int64_t begin = from; begin < n; begin += kChunk) {
    const int64_t end = std::min(begin + kChunk, n);
    int found = 0;
    if (columns) {
#pragma omp simd reduction(| : found)
      for (int64_t j = begin; j < end; ++j) found |= (values[j] >= row) | (values[j] >= columns[j]);
    } else {
#pragma omp simd reduction(| : found)
      for (int64_t j = begin; j < end; ++j) found |= values[j] >= row;
    }
    if (found) return begin;
  }
  return n;
}

// Counts the values that reach the thresholds of first_reaching.
template <class T>
int64_t count_reaching(const T* values, T row, const T* columns, int64_t n) {
  int32_t count = 0;
  if (columns) {
#pragma omp simd reduction(+ : count)
    for (int64_t j = 0; j < n; ++j) count += (values[j] >= row) | (values[j] >= columns[j]);
  } else {
#pragma omp simd reduction(+ : count)
    for (int64_t j = 0; j < n; ++j) count += values[j] >= row;
  }
  return count;
}

// inverse·x in bfloat16
template <class T>
void round(const T* x, T inverse, uint16_t* to, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = to_bf16(float(inverse * x[i]));
}

// ‖inverse·x − rounded‖²
template <class T>
double residual(const T* x, double inverse, const uint16_t* rounded, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const double d = inverse * double(x[i]) - double(from_bf16(rounded[i]));
    sum += d * d;
  }
  return sum;
}

// difference = a·x − b·y in double; returns its square.
template <class T>
double subtract(const T* x, double a, const T* y, double b, double* difference, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const double d = a * double(x[i]) - b * double(y[i]);
    difference[i] = d;
    sum += d * d;
  }
  return sum;
}

// to += factor·from
template <class To>
void add(To* to, double factor, const double* from, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = To(to[i] + factor * from[i]);
}

// to = scale·(v − (v·x̂)·x̂) with x̂ = inverse·x
template <class V, class T>
void project(const V* v, const T* x, double inverse, double scale, T* to, int64_t n) {
  double along = 0;
#pragma omp simd reduction(+ : along)
  for (int64_t i = 0; i < n; ++i) along += double(v[i]) * double(x[i]);
  along *= inverse * inverse;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) to[i] = T(scale * (double(v[i]) - along * double(x[i])));
}

// Replaces cosines by the derivatives of f with respect to them; returns Σ f. For pairs that are
// not close. log_sum_exp: f = e^{a·(c − shift)}, its derivative without the factor a.
template <Kind kind, class T>
T derivatives(T* values, T a, T shift, bool linear, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const T c = values[i];
    if constexpr (kind == Kind::log_sum_exp) {
      values[i] = exponential(a * (c - shift));
      sum += values[i];
    } else if constexpr (kind == Kind::riesz) {
      const T square = T(2) - T(2) * c;
      const T f = exponential(T(-0.5) * a * logarithm(square));
      values[i] = a * f / square;
      sum += f;
    } else if constexpr (kind == Kind::log) {
      const T square = T(2) - T(2) * c;
      values[i] = T(1) / square;
      sum -= T(0.5) * logarithm(square);
    } else {
      const T over = c > a ? c - a : T(0);
      const T slope = c > a ? T(1) : T(0);
      values[i] = linear ? slope : over;
      sum += linear ? over : T(0.5) * over * over;
    }
  }
  return sum;
}

template <class T>
constexpr SimdKernels<T> simd_kernels{
    .dot_double = dot_double<T>,
    .multiply = multiply<T>,
    .multiply_each = multiply_each<T>,
    .maximum = maximum<T>,
    .first_reaching = first_reaching<T>,
    .count_reaching = count_reaching<T>,
    .round = round<T>,
    .residual = residual<T>,
    .subtract = subtract<T>,
    .add = add<T>,
    .add_double = add<double>,
    .project = project<T, T>,
    .project_double = project<double, T>,
    .derivatives = {derivatives<Kind::log_sum_exp, T>, derivatives<Kind::riesz, T>,
                    derivatives<Kind::log, T>, derivatives<Kind::hinge, T>},
    .load = load<T>,
    .store = store<T>};

}  // namespace SYNFACE_ISA_NAMESPACE
}  // namespace
}  // namespace synface::hypersphere_repulsion
