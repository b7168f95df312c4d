#include "gemm/torch_gemm.h"

#include <algorithm>
#include <atomic>

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

#if AT_PARALLEL_OPENMP && !defined(INTRA_OP_PARALLEL)
#error "at::parallel_for would be serial: compile with OpenMP, as torch was"
#endif

namespace synface {
namespace {

template <class T>
at::Tensor matrix(const T* data, bool transpose, int64_t rows, int64_t cols, int64_t stride) {
  // The products read through a tensor of mutable type and write through C alone.
  at::Tensor tensor = transpose ? at::from_blob(const_cast<T*>(data), {rows, cols}, {1, stride},
                                                c10::CppTypeToScalarType<T>::value)
                                : at::from_blob(const_cast<T*>(data), {rows, cols}, {stride, 1},
                                                c10::CppTypeToScalarType<T>::value);
  return tensor;
}

template <class T>
void product(bool transpose_a, bool transpose_b, int64_t m, int64_t n, int64_t k, const T* a,
             int64_t lda, const T* b, int64_t ldb, T* c, int64_t ldc, bool accumulate) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;  // per thread
  const at::Tensor left = matrix(a, transpose_a, m, k, lda);
  const at::Tensor right = matrix(b, transpose_b, k, n, ldb);
  at::Tensor out = matrix(c, false, m, n, ldc);
  if (accumulate) {
    at::addmm_out(out, out, left, right);
  } else {
    at::mm_out(out, left, right);
  }
}

}  // namespace

template <class T>
Runtime<T> torch_runtime() {
  return {at::get_num_threads(),
          [](int tasks, const std::function<void(int)>& run) {
            std::atomic<int> next{0};
            const int threads = std::min(tasks, at::get_num_threads());  // one: runs right here
            at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
              for (int task = next++; task < tasks; task = next++) run(task);
            });
          },
          product<T>};
}

template Runtime<float> torch_runtime();
template Runtime<double> torch_runtime();

}  // namespace synface
