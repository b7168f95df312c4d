// The loops over one row of cosines or of centres. Included once per instruction set by
// simd/foreach_isa.h; plain loops, which the compiler turns into that set's vectors.

namespace synface::margin_cross_entropy {
namespace {
namespace SYNFACE_ISA_NAMESPACE {

#if SYNFACE_FMA
inline float madd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double madd(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
inline float madd(float a, float b, float c) { return a * b + c; }
inline double madd(double a, double b, double c) { return a * b + c; }
#endif

// exp(x) for x ≤ 0 (up to rounding): 1 ULP or so; 0 below −87.3; NaN stays NaN.
inline float exp_nonpositive(float x) {
  constexpr float round = 12582912.f;  // 1.5·2^23: adding it leaves an integer in the low bits
  const float shifted = madd(x, 1.44269504f, round);
  const float n = shifted - round;
  float r = madd(n, -0.693359375f, x);  // ln 2 in two parts
  r = madd(n, 2.12194440e-4f, r);
  float p = madd(1.9875691500e-4f, r, 1.3981999507e-3f);
  p = madd(p, r, 8.3334519073e-3f);
  p = madd(p, r, 4.1665795894e-2f);
  p = madd(p, r, 1.6666665459e-1f);
  p = madd(p, r, 5.0000001201e-1f);
  p = madd(p, r * r, r) + 1.f;
  const uint32_t power = (std::bit_cast<uint32_t>(shifted) + 127u) << 23;
  return x < -87.3f ? 0.f : p * std::bit_cast<float>(power);
}
inline double exp_nonpositive(double x) { return std::exp(x); }

template <class T>
T dot(const T* a, const T* b, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

template <class T>
double dot_double(const T* a, const T* b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += double(a[i]) * double(b[i]);
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
    const T e = exp_nonpositive(scale * (values[i] - shift));
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
    values[i] = coefficient * exp_nonpositive(madd(scale, values[i] * factors[i], -lse));
  }
}

template <class T>
void load(const void* from, Dtype dtype, T* to, int64_t n) {
  const auto* half = static_cast<const uint16_t*>(from);
  switch (dtype) {
    case Dtype::bf16:
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) to[i] = from_bf16(half[i]);
      break;
    case Dtype::f16:
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) to[i] = from_f16(half[i]);
      break;
    case Dtype::f32:
      for (int64_t i = 0; i < n; ++i) to[i] = T(static_cast<const float*>(from)[i]);
      break;
    case Dtype::f64:
      for (int64_t i = 0; i < n; ++i) to[i] = T(static_cast<const double*>(from)[i]);
      break;
    case Dtype::u8:
      break;
  }
}

template <class T>
void store(const T* from, void* to, Dtype dtype, int64_t n) {
  auto* half = static_cast<uint16_t*>(to);
  switch (dtype) {
    case Dtype::bf16:
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) half[i] = to_bf16(float(from[i]));
      break;
    case Dtype::f16:
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) half[i] = to_f16(float(from[i]));
      break;
    case Dtype::f32:
      for (int64_t i = 0; i < n; ++i) static_cast<float*>(to)[i] = float(from[i]);
      break;
    case Dtype::f64:
      for (int64_t i = 0; i < n; ++i) static_cast<double*>(to)[i] = double(from[i]);
      break;
    case Dtype::u8:
      break;
  }
}

template <class T>
constexpr Loops<T> loops{dot<T>,         dot_double<T>, multiply<T>,     axpy_scale<T>,
                         add_tangent<T>, maximum<T>,    exponentials<T>, probabilities<T>,
                         load<T>,        store<T>};

}  // namespace SYNFACE_ISA_NAMESPACE
}  // namespace
}  // namespace synface::margin_cross_entropy
