// Arithmetic and loops over rows that several ops share. Included inside the namespace of each
// instruction set, by an op's cpu-inl.h.

#if SYNFACE_FMA
inline float madd(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double madd(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
inline float madd(float a, float b, float c) { return a * b + c; }
inline double madd(double a, double b, double c) { return a * b + c; }
#endif

// exp(x) for x ≤ 88: 1 ULP or so; 0 below −87.3; NaN stays NaN.
inline float exponential(float x) {
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
inline double exponential(double x) { return std::exp(x); }

template <class T>
double dot_double(const T* a, const T* b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += double(a[i]) * double(b[i]);
  return sum;
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
