// Hypersphere repulsion on a CPU: see synface_kernels/ops/hypersphere_repulsion for what it
// computes. T is float or double, the type of the products and of the gradients' sums.
#pragma once

#include <cstdint>

#include "runtime.h"

namespace synface::hypersphere_repulsion {

// Points and their inverse norms. Rows of y are points of their own; without y (null), x repels
// itself.
struct Points {
  Rows rows;
  const double* inverse;
};
struct Problem {
  Points x;
  const Points* y;
};

enum class Kind { log_sum_exp, riesz, log, hinge };

struct Potential {
  Kind kind;
  double a;  // t, s, unused, threshold
  int64_t power;
  double r_min;
};

// 1/norm of each row. Returns the first row whose norm is at most 1e-12, above 2^100, where squares
// or products might leave T's range, or not finite; or −1.
template <class T>
int64_t inverse_norms(const Rows& rows, const Runtime& runtime, double* inverse);

// Σ_pairs f(r), or log Σ_pairs exp(a·c). The gradients, contiguous and of the points' shapes, must
// come zeroed; either may be null: then it is not computed.
template <class T>
double pairs(const Problem& problem, const Potential& potential, const Runtime& runtime, T* grad_x,
             T* grad_y);

// square, index: (N, k), contiguous.
template <class T>
void nearest(const Problem& problem, int64_t k, const Runtime& runtime, double* square,
             int64_t* index);

// From grad_square (N, k). The gradients are contiguous and of their points' dtypes; either may be
// null.
template <class T>
void nearest_backward(const Problem& problem, int64_t k, const int64_t* index,
                      const double* grad_square, double r_min, const Runtime& runtime, void* grad_x,
                      void* grad_y);

}  // namespace synface::hypersphere_repulsion
