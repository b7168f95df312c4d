#include "gemm/gemm.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

#include "common/runtime.h"

namespace synface {

template <class T>
struct Kernel {
  int64_t width;  // columns of a panel
  void (*fill)(const T* from, int64_t k, int64_t n, int64_t row, int64_t column, T* to);
  void (*multiply)(int64_t m, Left<T> a, const T* b, int64_t k, int64_t n, T* c, int64_t c_row,
                   bool accumulate);
};
template <>
struct Kernel<uint16_t> {
  int64_t width;  // n is padded to a multiple of it
  void (*fill)(const uint16_t* from, int64_t k, int64_t n, int64_t row, int64_t column,
               uint16_t* to);
  void (*multiply)(int64_t m, const uint16_t* a, int64_t a_row, const uint16_t* b, int64_t k,
                   int64_t n, float* c, int64_t c_row, bool accumulate);
  using Narrow = void (*)(const float* from, int64_t m, int64_t n, int64_t from_row, uint16_t* to,
                          int64_t to_row);
  Narrow narrow[2][2];  // [of what rounding leaves][transposed]
};

namespace {

// Depth of a slice, in elements and in bf16 pairs: a slice of a row of A stays in the L1 cache.
constexpr int64_t kDepth = 512, kPairs = 512;

}  // namespace
}  // namespace synface

#define SYNFACE_ISA_SOURCE "gemm/cpu-inl.h"
#include "simd/foreach_isa.h"

#if SYNFACE_X86
#if defined(__clang__)
#pragma clang attribute push(                                                               \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#pragma GCC target("prefer-vector-width=512")
#endif
#include "gemm/bf16-inl.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

namespace synface {
namespace {

Brgemm brgemm = nullptr;

#if SYNFACE_X86
void multiply_by_onednn(int64_t m, const uint16_t* a, int64_t a_row, const uint16_t* b, int64_t k,
                        int64_t n, float* c, int64_t c_row, bool accumulate) {
  using namespace isa_avx512_bf16;
  const int64_t width = ceil_div(n, kColumns) * kColumns;
  if (k == 0) return multiply(m, a, a_row, b, k, n, c, c_row, accumulate);
  for (int64_t p = 0; p < k; p += kPairs * 2) {
    const int64_t depth = std::min(kPairs * 2, k - p), even = depth - depth % 2;
    const uint16_t* panel = b + p * width;
    if (even > 0) {
      brgemm(m, n, even, a_row, width, c_row, accumulate || p > 0, a + p, panel, c);
    }
    for (int64_t j = 0; even < depth && j < n; j += kColumns) {
      for (int64_t i = 0; i < m; i += kRows) {  // the last element of an odd depth
        block_of(std::min<int64_t>(kRows, m - i), a + i * a_row + p + even, a_row,
                 panel + even * width + 2 * j, 1, c + i * c_row + j, c_row,
                 std::min(kColumns, n - j), accumulate || p + even > 0);
      }
    }
  }
}
#endif

template <class T>
const Kernel<T>* pick() {
  return &SYNFACE_DISPATCH(kernel<T>);
}
template <>
const Kernel<uint16_t>* pick() {
#if SYNFACE_X86
  using namespace isa_avx512_bf16;
  static constexpr Kernel<uint16_t> ours{
      kColumns,
      fill<false>,
      multiply,
      {{narrow<false>, narrow_transposed<false>}, {narrow<true>, narrow_transposed<true>}}};
  // Fewer calls, of a whole block each: oneDNN tiles them by itself.
  static constexpr Kernel<uint16_t> onednn = [] {
    Kernel<uint16_t> kernel = ours;
    kernel.fill = fill<true>;
    kernel.multiply = multiply_by_onednn;
    return kernel;
  }();
  if (isa() == Isa::avx512_bf16) return &ours;
  if (isa() == Isa::onednn_bf16 && brgemm) return &onednn;
#endif
  throw std::logic_error("this processor has no bfloat16 GEMM instructions");
}

// A panel has a whole number of pairs of rows.
template <class T>
int64_t room(int64_t k, int64_t n, int64_t width) {
  const int64_t rows = std::is_same_v<T, uint16_t> ? k + k % 2 : k;
  return rows * ceil_div(n, width) * width;
}

}  // namespace

bool has_bf16_gemm() { return isa() >= Isa::avx512_bf16; }

void set_brgemm(Brgemm given) { brgemm = given; }

template <class T>
Packed<T>::Packed(int64_t k, int64_t n)
    : k_(k), n_(n), kernel_(pick<T>()), data_(room<T>(k, n, kernel_->width)) {}

template <class T>
void Packed<T>::fill(const T* from, int64_t k, int64_t n, int64_t row, int64_t column) {
  k_ = k;
  n_ = n;
  kernel_->fill(from, k, n, row, column, data_.get());
}

template <class T>
void multiply(int64_t m, Left<T> a, const Packed<T>& b, const Output<T>& c) {
  b.kernel().multiply(m, a, b.data(), b.k(), b.n(), c.data, c.stride, c.accumulate);
}

void multiply(int64_t m, Left<uint16_t> a, const Packed<uint16_t>& b, const Output<float>& c) {
  b.kernel().multiply(m, a.data, a.row, b.data(), b.k(), b.n(), c.data, c.stride, c.accumulate);
}

void multiply(int64_t m, Left<SplitBf16> a, const Packed<SplitBf16>& b, const Output<float>& c) {
  const Left<uint16_t> high{a.data.high, a.row}, low{a.data.low, a.row};
  const Output<float> added{.data = c.data, .stride = c.stride, .accumulate = true};
  multiply(m, high, b.high(), c);
  multiply(m, high, b.low(), added);
  multiply(m, low, b.high(), added);
}

void narrow(const Float32Matrix& from, const Bf16Matrix& to) {
  pick<uint16_t>()->narrow[to.rest][from.transposed](from.data, from.rows, from.cols, from.stride,
                                                     to.data, to.stride);
}

#define SYNFACE_INSTANTIATE(T) \
  template class Packed<T>;    \
  template void multiply<T>(int64_t, Left<T>, const Packed<T>&, const Output<T>&);
SYNFACE_INSTANTIATE(float)
SYNFACE_INSTANTIATE(double)
template class Packed<uint16_t>;

}  // namespace synface
