// The core of the margin softmax on a CPU: see synface_kernels/ops/margin_cross_entropy/op.py for
// what it computes. T is float or double, the type of all arithmetic and of the statistics.
#pragma once

#include <cstdint>
#include <functional>

#include "memory.h"
#include "runtime.h"

namespace synface::margin_cross_entropy {

struct Problem {
  Rows input;           // (N, D)
  Rows weight;          // (C·M, D): the M sub-centers of a class one after the other
  int64_t sub_centers;  // M; a class's cosine is its greatest sub-center's, the first of equals
  const int64_t* class_ids;  // (S,) rising classes that take part; null: all, S = C
  int64_t classes;           // S
  const int64_t* labels;     // (N, K) in [0, S); −1 where absent, −2 where the label's center is
                             // elsewhere; a row of −1 is ignored
  int64_t labels_per_row;
  double scale;
  double limit;  // negatives with a cosine above it are left out
  // Whether products of float32 may be those of halves, see gemm.h: cosines are off by 2^-16 at
  // most.
  bool halves = false;
};

// The cosines of the first classes with all embeddings, as forward finds them, for backward to
// read instead of multiplying again: −∞ where a center is no negative of an embedding.
template <class T>
struct Kept {
  T* cosines = nullptr;  // (classes·M, N), a column for each row that counts; then zeros
  int64_t classes = 0;
};

// Outputs are contiguous. What there are few of is double: the log-sum-exps, whose rounding would
// scale whole rows of gradients, and what concerns the labels, as a margin's slope is steep near
// cos θ = ±1. What is null is not computed.
template <class T>
struct Statistics {
  double* negative_lse;   // (N,) log Σ exp(scale·cosine) over the negatives
  T* negative_max;        // (N,) their greatest cosine
  double* target_cosine;  // (N, K)
  double* filtered;       // (N,) how many classes the limit left out
  double* cosine_sum;     // (N,) over all classes, with center_sum
  T* mean_center;         // (N, D) the negatives' normalized centers, averaged by softmax
  double* center_sum;     // (D,) of all normalized centers
  Kept<T> kept = {};
};
template <class T>
void forward(const Problem& problem, const Runtime& runtime, const Statistics<T>& statistics);

// What arrives from the loss. grad_cosine_sum may be null; then center_sum is not read.
// mean_center and center_sum are read for the input's gradient alone.
template <class T>
struct Upstream {
  const double* negative_lse;
  const T* mean_center;
  const double* center_sum;
  const double* grad_negative_lse;   // (N,)
  const double* grad_target_cosine;  // (N, K)
  const double* grad_cosine_sum;     // (N,)
  Kept<const T> kept = {};
};

// Takes the gradient of the centers of some of the S classes, contiguous and of the weight's dtype.
// Nothing reads these centers any more. Several threads call it, for a tile of classes at a time.
using TakeRows = std::function<void(Range classes, const void* rows)>;

// grad_input (N, D) and grad_rows (S·M, D) are contiguous, of their inputs' dtypes; either may be
// null: then it is not computed, except that grad_rows goes to `take` if there is one. A row of
// which nothing is asked gives no gradient, whatever it holds.
template <class T>
void backward(const Problem& problem, const Runtime& runtime, const Upstream<T>& upstream,
              void* grad_input, void* grad_rows, const TakeRows& take = {});

}  // namespace synface::margin_cross_entropy
