#include "hypersphere_repulsion/cpu.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/memory.h"
#include "gemm/gemm.h"
#include "simd/scalar.h"

namespace synface::hypersphere_repulsion {
namespace {

// Values compared at once; if any reaches its threshold, all are examined.
constexpr int64_t kChunk = 64;

// Vectorized loops of cpu-inl.h, compiled for one instruction set.
template <class T>
struct SimdKernels {
  double (*dot_double)(const T* a, const T* b, int64_t n);
  void (*multiply)(T* values, T factor, int64_t n);
  void (*multiply_each)(T* values, T factor, const T* factors, int64_t n);
  T (*maximum)(const T* values, int64_t n);
  int64_t (*first_reaching)(const T* values, T row, const T* columns, int64_t from, int64_t n);
  int64_t (*count_reaching)(const T* values, T row, const T* columns, int64_t n);
  void (*round)(const T* x, T inverse, uint16_t* to, int64_t n);
  double (*residual)(const T* x, double inverse, const uint16_t* rounded, int64_t n);
  double (*subtract)(const T* x, double a, const T* y, double b, double* difference, int64_t n);
  void (*add)(T* to, double factor, const double* from, int64_t n);
  void (*add_double)(double* to, double factor, const double* from, int64_t n);
  void (*project)(const T* v, const T* x, double inverse, double scale, T* to, int64_t n);
  void (*project_double)(const double* v, const T* x, double inverse, double scale, T* to,
                         int64_t n);
  T (*derivatives[4])(T* values, T a, T shift, bool linear, int64_t n);  // by Kind
  void (*load)(const void* from, Dtype dtype, T* to, int64_t n);
  void (*store)(const T* from, void* to, Dtype dtype, int64_t n);
};

}  // namespace
}  // namespace synface::hypersphere_repulsion

#define SYNFACE_ISA_SOURCE "hypersphere_repulsion/cpu-inl.h"
#include "simd/foreach_isa.h"

#include "hypersphere_repulsion/cpu_energy.h"
#include "hypersphere_repulsion/cpu_neighbors.h"

namespace synface::hypersphere_repulsion {
namespace {

// Pairs below which float32 GEMMs take little time, and the rounding errors of few weights do not
// average out.
constexpr int64_t kFewPairs = kSmallBlock * kSmallBlock;

// Whether energies take bfloat16 GEMMs: of points that are bfloat16 themselves.
bool multiplies_bf16(const Rows& x, const Rows& y) {
  return x.dtype == Dtype::bf16 && y.dtype == Dtype::bf16 && x.rows * y.rows >= kFewPairs &&
         prefers_bf16();
}

// Whether they take bf16 splits: of float32 points, where allowed and faster.
bool multiplies_splits(const Rows& x, const Rows& y, const Potential& potential) {
  const bool any_float32 = x.dtype == Dtype::f32 || y.dtype == Dtype::f32;
  return potential.split_bf16 && any_float32 && prefers_bf16_splits();
}

}  // namespace

template <class T>
int64_t inverse_norms(const Rows& rows, const Runtime& runtime, double* inverse) {
  const SimdKernels<T>& simd = SYNFACE_DISPATCH(simd_kernels<T>);
  for_rows(runtime, rows.rows, [&](Range range) {
    const RowReader<T> reader(rows, simd.load);
    for (int64_t i = range.begin; i < range.end; ++i) {
      const T* row = reader.row(i);
      inverse[i] = 1 / std::sqrt(simd.dot_double(row, row, rows.cols));
    }
  });
  for (int64_t i = 0; i < rows.rows; ++i) {
    if (!(inverse[i] < 1 / kNormMin && inverse[i] >= 1 / kNormMax)) return i;
  }
  return -1;
}

template <class T>
double pairs(const Problem& p, const Potential& potential, const Runtime& runtime,
             const Gradients<T>& gradients) {
  if constexpr (std::is_same_v<T, float>) {
    const Rows &x = p.x.rows, &y = p.y ? p.y->rows : x;
    if (multiplies_bf16(x, y)) return PairSum<T, uint16_t>(p, potential, runtime, gradients).run();
    if (multiplies_splits(x, y, potential)) {
      return PairSum<T, SplitBf16>(p, potential, runtime, gradients).run();
    }
  }
  return PairSum<T, T>(p, potential, runtime, gradients).run();
}

#define SYNFACE_INSTANTIATE(T)                                                                     \
  template int64_t inverse_norms<T>(const Rows&, const Runtime&, double*);                         \
  template double pairs<T>(const Problem&, const Potential&, const Runtime&, const Gradients<T>&); \
  template void nearest<T>(const Problem&, int64_t, const Runtime&, const Neighbors&);             \
  template void nearest_backward<T>(const Problem&, const NearestUpstream&, const Runtime&,        \
                                    const Gradients<void>&);
SYNFACE_INSTANTIATE(float)
SYNFACE_INSTANTIATE(double)

}  // namespace synface::hypersphere_repulsion
