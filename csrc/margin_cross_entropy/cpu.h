// Margin softmax statistics and gradients on a CPU;
// synface_kernels/ops/margin_cross_entropy/interface.py defines the loss. T is float or double, the
// type of all arithmetic and of the statistics.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "common/rows.h"
#include "common/runtime.h"

namespace synface::margin_cross_entropy {

struct Problem {
  Rows input;               // (N, D)
  Rows weight;              // (C·M, D): the M sub-centers of a class one after the other
  int64_t sub_centers = 1;  // M; a class's cosine is the maximum over its sub-centers, the first
                            // of equals
  const int64_t* class_ids = nullptr;  // (S,) rising classes of this step; null: all, S = C
  int64_t classes;                     // S
  const int64_t* labels;  // (N, K) in [0, S); −1 where absent, −2 where the label's center is on
                          // another rank; a row of −1 is ignored
  int64_t labels_per_row;
  double scale;
  double limit;  // negatives with a cosine above it are left out
  // Whether a float32 GEMM may be computed from bf16 splits, see gemm.h: cosines are off by 2^-16
  // at most.
  bool split_bf16 = false;
  // bf16 or f16: GEMM operands of another dtype are normalized, then rounded to it, and so are the
  // factors of the gradients' GEMMs; sums and the targets' cosines are not. None: nothing is.
  std::optional<Dtype> gemm_dtype = {};
};

// Embeddings of a block.
constexpr int64_t kBlock = 512;

// Cosines of the first classes with the first valid embeddings, saved by forward so that backward
// need not recompute the logits GEMM: −∞ where a center is no negative of an embedding. Those of
// all classes with at most kBlock embeddings may be in the memory of the centers' gradient, each
// center's in its own row: backward reads a row's before it writes the row.
template <class T>
struct SavedCosines {
  T* cosines = nullptr;      // a row for each center
  int64_t stride = 0;        // from one row to the next
  int64_t classes = 0;       // rows are of classes·M centers
  int64_t embeddings = 0;    // columns
  bool in_gradient = false;  // else columns after the last valid embedding are zeros
};

// Outputs of the forward pass, contiguous. Small ones are double: the log-sum-exps, whose rounding
// would scale whole rows of gradients, and the target cosines, as a margin's slope is steep near
// cos θ = ±1. A null output is not computed.
template <class T>
struct Statistics {
  double* negative_lse;          // (N,) log Σ exp(scale·cosine) over the negatives
  T* negative_max;               // (N,) their greatest cosine
  double* target_cosine;         // (N, K)
  double* filtered = nullptr;    // (N,) how many classes the limit left out
  double* cosine_sum = nullptr;  // (N,) over all classes, with center_sum
  T* mean_center = nullptr;      // (N, D) softmax average of the negatives' normalized centers
  double* center_sum = nullptr;  // (D,) of all normalized centers
  SavedCosines<T> saved = {};
};
template <class T>
void forward(const Problem& problem, const Runtime& runtime, const Statistics<T>& statistics);

// Statistics of the forward pass and their gradients. grad_cosine_sum may be null; then center_sum
// is not read. mean_center and center_sum are read for the input's gradient alone.
template <class T>
struct Upstream {
  const double* negative_lse;
  const T* mean_center;
  const double* center_sum = nullptr;
  const double* grad_negative_lse;          // (N,)
  const double* grad_target_cosine;         // (N, K)
  const double* grad_cosine_sum = nullptr;  // (N,)
  SavedCosines<const T> saved = {};
};

// Receives the gradient of a tile of classes (of the S): contiguous and of the weight's dtype.
// Several threads call it. The kernel does not read these classes' centers again.
using GradTileCallback = std::function<void(Range classes, const void* rows)>;

// Outputs of the backward pass, contiguous and of their inputs' dtypes; a null one is not computed.
struct Gradients {
  void* input = nullptr;          // (N, D)
  void* rows = nullptr;           // (S·M, D)
  GradTileCallback on_tile = {};  // if set, receives what `rows` else would
};

// A row whose upstream gradients are all zero adds nothing, even if it holds NaN.
template <class T>
void backward(const Problem& problem, const Runtime& runtime, const Upstream<T>& upstream,
              const Gradients& gradients);

}  // namespace synface::margin_cross_entropy
