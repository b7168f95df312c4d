// Optimizer steps on some rows of a matrix, on a CPU;
// synface_kernels/ops/row_update/reference.py defines them. T is float or double, the type of all
// arithmetic.
#pragma once

#include <cstdint>

#include "common/rows.h"
#include "common/runtime.h"

namespace synface::row_update {

// A matrix (C, D) that is updated: the weight (f32, bf16, or f64 where T is double) or optimizer
// state. Null data: there is no such state.
using State = MutableRows;

struct Problem {
  State weight;
  Rows gradient = {};        // (S, D); null data: rows only catch up on missed steps
  const int64_t* class_ids;  // (S,) distinct rows of the weight
  int64_t count, cols;       // S, D
  int64_t step;
  void* last_step = nullptr;  // (C,) int64 or int32; null: rows do not catch up
  bool long_steps = false;    // whether last_step is int64
  bool stochastic = false;    // whether bf16 is rounded stochastically
  uint64_t seed = 0;
};

struct Sgd {
  double lr, momentum, weight_decay, dampening;
  bool nesterov;
};

struct AdamW {
  double lr, beta1, beta2, eps, weight_decay;
};

template <class T>
void sgd(const Problem& problem, const State& momentum, const Sgd& options, const Runtime& runtime);

template <class T>
void adamw(const Problem& problem, const State& exp_avg, const State& exp_avg_sq,
           const AdamW& options, const Runtime& runtime);

}  // namespace synface::row_update
