#include "gemm/gemm.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace synface {
namespace {

template <class T>
struct Kernel {
  int64_t width;  // columns of a panel
  void (*fill)(const T* from, int64_t k, int64_t n, int64_t row, int64_t column, T* to);
  void (*multiply)(int64_t m, Left<T> a, const T* b, int64_t k, int64_t n, T* c, int64_t c_row,
                   bool accumulate);
};

// A slice of a row of A's blocks stays in the first cache.
constexpr int64_t kDepth = 512;

}  // namespace
}  // namespace synface

#define SYNFACE_ISA_SOURCE "gemm/cpu-inl.h"
#include "simd/foreach_isa.h"

namespace synface {
namespace {

template <class T>
const Kernel<T>& kernel() {
  static const Kernel<T>& picked = SYNFACE_PICK(kernel<T>);
  return picked;
}

template <class T>
int64_t whole_panels(int64_t n) {
  const int64_t width = kernel<T>().width;
  return (n + width - 1) / width * width;
}

}  // namespace

template <class T>
Packed<T>::Packed(int64_t k, int64_t n) : k_(k), n_(n), data_(k * whole_panels<T>(n)) {}

template <class T>
void Packed<T>::fill(const T* from, int64_t k, int64_t n, int64_t row, int64_t column) {
  k_ = k;
  n_ = n;
  kernel<T>().fill(from, k, n, row, column, data_.get());
}

template <class T>
void multiply(int64_t m, Left<T> a, const Packed<T>& b, T* c, int64_t c_row, bool accumulate) {
  kernel<T>().multiply(m, a, b.data(), b.k(), b.n(), c, c_row, accumulate);
}

#define SYNFACE_INSTANTIATE(T) \
  template class Packed<T>;    \
  template void multiply<T>(int64_t, Left<T>, const Packed<T>&, T*, int64_t, bool);
SYNFACE_INSTANTIATE(float)
SYNFACE_INSTANTIATE(double)

}  // namespace synface
