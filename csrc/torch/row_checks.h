// Checks of a row update's tensors: whoever calls the registered op directly gets an error.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include <ATen/core/Tensor.h>

#include "torch/tensors.h"

namespace synface::row_update {

inline constexpr at::ScalarType kStored[] = {at::kFloat, at::kBFloat16};
inline constexpr at::ScalarType kSteps[] = {at::kLong, at::kInt};

// Raises ValueError unless the states and last_step fit the weight (C, D); undefined states are
// left out.
inline void check_states(const at::Tensor& weight, at::TensorList states,
                         const std::optional<at::Tensor>& last_step, int64_t step) {
  const bool is_double = weight.scalar_type() == at::kDouble;
  const Dtypes stored = is_double ? Dtypes(kDoubleOnly) : Dtypes(kStored);
  check_tensor(weight, "weight", stored, {-1, -1});
  for (const at::Tensor& state : states) {
    check_tensor(state, "a state of the optimizer", stored, weight.sizes());
  }
  const bool is_short = last_step && last_step->scalar_type() == at::kInt;
  TORCH_CHECK_VALUE(step >= 0 && (!is_short || step <= std::numeric_limits<int32_t>::max()),
                    "step must be in [0, 2^63), or [0, 2^31) with an int32 last_step, got ", step);
  if (!last_step) return;
  check_tensor(*last_step, "last_step", kSteps, {weight.size(0)});
  TORCH_CHECK_VALUE(last_step->is_contiguous(), "last_step must be contiguous");
}

// Raises ValueError unless the ids rise strictly in [0, classes): two threads would else write one
// row.
inline void check_rising(const at::Tensor& class_ids, int64_t classes) {
  const auto* ids = class_ids.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < class_ids.numel(); ++i) {
    TORCH_CHECK_VALUE(ids[i] >= 0 && ids[i] < classes && (i == 0 || ids[i] > ids[i - 1]),
                      "class_ids must rise strictly in [0, ", classes, "), got ", ids[i], " at ",
                      i);
  }
}

// Returns the most steps that a row has missed. Raises ValueError if a row has taken a step that is
// later than this one, or a negative one. The ids (none: all rows) must be in range.
inline int64_t check_last_steps(const std::optional<at::Tensor>& last_step,
                                const std::optional<at::Tensor>& class_ids, int64_t step) {
  if (!last_step) return 0;
  int64_t earliest = step;
  const auto* ids = class_ids ? class_ids->const_data_ptr<int64_t>() : nullptr;
  const int64_t count = class_ids ? class_ids->numel() : last_step->numel();
  const auto check = [&](const auto* steps) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t last = steps[ids ? ids[i] : i];
      TORCH_CHECK_VALUE(last >= 0 && last <= step, "last_step must be in [0, ", step, "], got ",
                        last);
      earliest = std::min(earliest, last);
    }
  };
  if (last_step->scalar_type() == at::kLong) {
    check(last_step->const_data_ptr<int64_t>());
  } else {
    check(last_step->const_data_ptr<int32_t>());
  }
  return step - earliest;
}

// Raises ValueError unless both betas are in [0, 1), and the series of missed steps ends: by
// itself, or since few steps can be missed. `decay` is what weight decay leaves of a weight in a
// step.
inline void check_betas(double beta1, double beta2, double decay, int64_t missed) {
  constexpr int64_t kMostTerms = 1 << 17;  // as MOST_TERMS in updates.py
  for (const double beta : {beta1, beta2}) {
    TORCH_CHECK_VALUE(beta >= 0 && beta < 1, "betas must be in [0, 1), got ", beta);
  }
  const double ratio = beta1 / (std::sqrt(beta2) * decay);  // of a term to the one before
  const bool falls = beta1 == 0 || (decay > 0 && std::pow(ratio, double(kMostTerms)) < 0x1p-26);
  TORCH_CHECK_VALUE(missed <= kMostTerms || falls, "a row may miss at most 2^17 steps with betas ",
                    beta1, " and ", beta2, ", got ", missed);
}

}  // namespace synface::row_update
