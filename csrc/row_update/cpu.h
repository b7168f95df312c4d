// Optimizer steps on some rows of a matrix on a CPU: see
// synface_kernels/ops/row_update/reference.py for what they compute. T is float or double, the type
// of all arithmetic.
#pragma once

#include <cstdint>

#include "runtime.h"

namespace synface::row_update {

// (C, D), rows contiguous, `stride` elements apart: f32, bf16, or f64 where T is double.
struct State {
  void* data;
  Dtype dtype;
  int64_t stride;
};

struct Problem {
  State weight;
  Rows gradient;             // (S, D); data may be null: then rows only catch up
  const int64_t* class_ids;  // (S,) distinct rows of the weight
  int64_t count, cols;       // S, D
  int64_t step;
  void* last_step;  // (C,) int64 or int32; may be null: then rows do not catch up
  bool long_steps;
  bool stochastic;  // whether bf16 is rounded at random
  uint64_t seed;
};

struct Sgd {
  double lr, momentum, weight_decay, dampening;
  bool nesterov;
};

struct AdamW {
  double lr, beta1, beta2, eps, weight_decay;
};

// The momentum's data is null where there is none.
template <class T>
void sgd(const Problem& problem, const State& momentum, const Sgd& options, const Runtime& runtime);

template <class T>
void adamw(const Problem& problem, const State& exp_avg, const State& exp_avg_sq,
           const AdamW& options, const Runtime& runtime);

}  // namespace synface::row_update
