// The core of the margin softmax on a CPU: see synface_kernels/ops/margin_cross_entropy/op.py for
// what it computes. T is float or double, the type of all arithmetic and of the statistics.
#pragma once

#include <cstdint>

#include "runtime.h"

namespace synface::margin_cross_entropy {

struct Problem {
  Rows input;                // (N, D)
  Rows weight;               // (C, D)
  const int64_t* class_ids;  // (S,) rising rows of weight that take part; null: all, S = C
  int64_t classes;           // S
  const int64_t* labels;     // (N, K) in [0, S); −1 where absent, −2 where the label's centre is
                             // elsewhere; a row of −1 is ignored
  int64_t labels_per_row;
  double scale;
};

// Outputs are contiguous. What there are few of is double: the log-sum-exps, whose rounding would
// scale whole rows of gradients, and what concerns the labels, as a margin's slope is steep near
// cos θ = ±1. mean_center may be null: then it is not computed.
template <class T>
void forward(const Problem& problem, const Runtime& runtime, double* negative_lse, T* negative_max,
             double* target_cosine, T* mean_center);

// grad_input (N, D) and grad_weight (S, D) are contiguous, of their inputs' dtypes; either may be
// null: then it is not computed. mean_center is read for grad_input alone.
template <class T>
void backward(const Problem& problem, const Runtime& runtime, const double* negative_lse,
              const T* mean_center, const double* grad_negative_lse,
              const double* grad_target_cosine, void* grad_input, void* grad_weight);

}  // namespace synface::margin_cross_entropy
