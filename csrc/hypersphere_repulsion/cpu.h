// Pairwise energies and nearest neighbors of points on the hypersphere, on a CPU;
// synface_kernels/ops/hypersphere_repulsion defines them. T is float or double, the type of all
// sums; a GEMM's operands are T, or bfloat16 or bf16 splits with sums in float.
#pragma once

#include <cstdint>

#include "common/rows.h"
#include "common/runtime.h"

namespace synface::hypersphere_repulsion {

// Points and their inverse norms.
struct Points {
  Rows rows;
  const double* inverse;
};

// Pairs of points of x and of y; without y (null), pairs of two points of x.
struct Problem {
  Points x;
  const Points* y = nullptr;
};

enum class Kind { log_sum_exp, riesz, log, hinge };

struct Potential {
  Kind kind;
  double a;  // t, s, unused, threshold
  int64_t power;
  double r_min;
  // Whether float32 GEMMs may be computed from bf16 splits, see gemm.h.
  bool split_bf16 = false;
};

// Gradients of the points, contiguous; a null one is not computed.
template <class Data>
struct Gradients {
  Data* x = nullptr;
  Data* y = nullptr;
};

// Writes 1/norm of each row. Returns the first row whose norm is at most kNormMin, above 2^100,
// where squares or dot products might overflow T, or not finite; or −1.
template <class T>
int64_t inverse_norms(const Rows& rows, const Runtime& runtime, double* inverse);

// Returns Σ_pairs f(r), or log Σ_pairs exp(a·c). Adds the gradients to what must be zeros.
template <class T>
double pairs(const Problem& problem, const Potential& potential, const Runtime& runtime,
             const Gradients<T>& gradients);

// Squared distances to the k nearest points and these points' indices, (N, k), contiguous.
struct Neighbors {
  double* square;
  int64_t* index;
};
template <class T>
void nearest(const Problem& problem, int64_t k, const Runtime& runtime, const Neighbors& out);

// Indices of the k nearest points, and the gradient of the squared distances, (N, k).
struct NearestUpstream {
  int64_t k;
  const int64_t* index;
  const double* grad_square;
  double r_min;
};

// The gradients are of their points' dtypes.
template <class T>
void nearest_backward(const Problem& problem, const NearestUpstream& upstream,
                      const Runtime& runtime, const Gradients<void>& gradients);

}  // namespace synface::hypersphere_repulsion
