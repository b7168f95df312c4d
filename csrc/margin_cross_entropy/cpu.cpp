#include "margin_cross_entropy/cpu.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/memory.h"
#include "gemm/gemm.h"
#include "simd/scalar.h"

namespace synface::margin_cross_entropy {
namespace {

// A number as an unevaluated sum of two.
template <class T>
struct Parts {
  explicit Parts(double x) : high(T(x)), low(T(x - double(high))) {}
  T high, low;
};

// Vectorized loops of cpu-inl.h, compiled for one instruction set.
template <class T>
struct SimdKernels {
  T (*dot)(const T* a, const T* b, int64_t n);
  double (*dot_double)(const T* a, const T* b, int64_t n);
  void (*axpy_scale)(T* y, T a, const T* x, T scale, int64_t n);
  void (*add_tangent)(T* y, double g, const T* a, double along, const T* b, int64_t n);
  void (*normalize)(const T* from, double factor, T* to, int64_t n);
  void (*scale_each)(T* values, const T* high, const T* low, int64_t n);
  void (*cosines)(T* values, Parts<T> inverse, int64_t n);
  void (*greatest)(const T* values, T* most, int64_t n);
  void (*keep_greatest)(T* values, int64_t stride, int64_t sub_centers, T* best, int64_t n);
  void (*filter)(T* values, T limit, T* count, int64_t n);
  void (*add_scaled)(double* sum, double factor, const T* row, int64_t n);
  void (*exponentials)(T* values, T factor, T scale, const T* shift, T* sum, int64_t n);
  void (*probabilities)(const T* cosines, T scale, const T* lse, const T* coefficient, T* values,
                        int64_t n);
  void (*load)(const void* from, Dtype dtype, T* to, int64_t n);
  void (*store)(const T* from, void* to, Dtype dtype, int64_t n);
};

}  // namespace
}  // namespace synface::margin_cross_entropy

#define SYNFACE_ISA_SOURCE "margin_cross_entropy/cpu-inl.h"
#include "simd/foreach_isa.h"

#include "margin_cross_entropy/cpu_backward.h"
#include "margin_cross_entropy/cpu_forward.h"

namespace synface::margin_cross_entropy {
namespace {

// Calls run(std::type_identity<Operand>()) with the type of the GEMMs' operands.
template <class T, class F>
void with_operand(const Problem& p, F&& run) {
  if constexpr (std::is_same_v<T, float>) {
    if (uses_bf16_gemm(p)) return run(std::type_identity<uint16_t>());
    if (p.split_bf16 && !p.gemm_dtype && prefers_bf16_splits()) {
      return run(std::type_identity<SplitBf16>());
    }
  }
  run(std::type_identity<T>());
}

}  // namespace

template <class T>
void forward(const Problem& p, const Runtime& runtime, const Statistics<T>& out) {
  with_operand<T>(
      p, [&](auto operand) { forward_by<typename decltype(operand)::type>(p, runtime, out); });
}

template <class T>
void backward(const Problem& p, const Runtime& runtime, const Upstream<T>& from,
              const Gradients& to) {
  with_operand<T>(p, [&](auto operand) {
    backward_by<typename decltype(operand)::type>(p, runtime, from, to);
  });
}

#define SYNFACE_INSTANTIATE(T)                                                    \
  template void forward<T>(const Problem&, const Runtime&, const Statistics<T>&); \
  template void backward<T>(const Problem&, const Runtime&, const Upstream<T>&, const Gradients&);
SYNFACE_INSTANTIATE(float)
SYNFACE_INSTANTIATE(double)

}  // namespace synface::margin_cross_entropy
