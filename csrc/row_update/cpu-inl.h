// Loops over a row's columns. Included once per instruction set by simd/foreach_isa.h; plain loops,
// which the compiler vectorizes for that set. Without fused multiply-adds, in the order of
// reference.py: results are bitwise equal on every instruction set, and equal to torch's.

namespace synface::row_update {
namespace {
namespace SYNFACE_ISA_NAMESPACE {

#include "simd/rows-inl.h"

template <class T>
void sgd_plain(T* w, const T* g, const SgdStep<T>& s, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) w[i] = w[i] - s.lr * (g[i] + s.decay * w[i]);
}

template <class T>
void sgd_momentum(T* w, T* b, const T* g, const SgdStep<T>& s, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T gradient = g[i] + s.decay * w[i];
    b[i] = s.momentum * b[i] + s.take * gradient;
    w[i] = w[i] - s.lr * b[i];
  }
}

template <class T>
void sgd_nesterov(T* w, T* b, const T* g, const SgdStep<T>& s, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T gradient = g[i] + s.decay * w[i];
    b[i] = s.momentum * b[i] + s.take * gradient;
    w[i] = w[i] - s.lr * (gradient + s.momentum * b[i]);
  }
}

template <class T>
void scale(T* w, T factor, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) w[i] *= factor;
}

// (w, b) = A·(w, b), A row by row
template <class T>
void linear(T* w, T* b, const T* a, int64_t n) {
  const T ww = a[0], wb = a[1], bw = a[2], bb = a[3];
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const T weight = w[i], buffer = b[i];
    w[i] = ww * weight + wb * buffer;
    b[i] = bw * weight + bb * buffer;
  }
}

template <class T>
void adamw_step(T* w, T* m, T* v, const T* g, const AdamWStep<T>& s, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    m[i] = s.beta1 * m[i] + s.take1 * g[i];
    v[i] = s.beta2 * v[i] + s.take2 * g[i] * g[i];
    w[i] = s.keep * w[i] - s.size * (m[i] / (std::sqrt(v[i]) * s.root + s.eps));
  }
}

template <class T>
void roots(const T* v, T* root, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) root[i] = std::sqrt(v[i]);
}

// sum += size/(root·factor + eps): a missed step's update, divided by its moment.
template <class T>
void add_quotients(T* sum, const T* root, T size, T factor, T eps, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += size / (root[i] * factor + eps);
}

// w = keep·w − m·sum, then the moments' own decay.
template <class T>
void adamw_missed(T* w, T* m, T* v, const T* sum, T keep, T beta1, T beta2, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    w[i] = keep * w[i] - m[i] * sum[i];
    m[i] *= beta1;
    v[i] *= beta2;
  }
}

// Rounds to bf16 stochastically: 16 random bits, a hash of the row's key and the column, are added
// to the bits that are cut off.
template <class T>
void store_stochastic(const T* from, uint16_t* to, uint32_t low, uint32_t high, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    uint32_t x = uint32_t(i) * 0x9e3779b9u + low;
    x = (x ^ (x >> 16)) * 0x21f0aaadu ^ high;
    x = (x ^ (x >> 15)) * 0xd35a2d97u;
    x ^= x >> 15;
    const float value = float(from[i]);
    const uint32_t bits = (std::bit_cast<uint32_t>(value) + (x >> 16)) >> 16;
    to[i] = uint16_t(value == value ? bits : 0x7fc0);
  }
}

template <class T>
constexpr SimdKernels<T> simd_kernels{.sgd_plain = sgd_plain<T>,
                                      .sgd_momentum = sgd_momentum<T>,
                                      .sgd_nesterov = sgd_nesterov<T>,
                                      .scale = scale<T>,
                                      .linear = linear<T>,
                                      .adamw_step = adamw_step<T>,
                                      .roots = roots<T>,
                                      .add_quotients = add_quotients<T>,
                                      .adamw_missed = adamw_missed<T>,
                                      .load = load<T>,
                                      .store = store<T>,
                                      .store_stochastic = store_stochastic<T>};

}  // namespace SYNFACE_ISA_NAMESPACE
}  // namespace
}  // namespace synface::row_update
