// The margin softmax on NumPy arrays.
#include <limits>

#include "margin_cross_entropy/cpu.h"
#include "numpy/arrays.h"

namespace synface {
namespace {

template <class T>
margin_cross_entropy::Problem margin_problem(const Array<T>& input, const Array<T>& weight,
                                             const Array<int64_t>& labels, double scale) {
  if (input.ndim() != 2 || weight.ndim() != 2 || labels.ndim() != 2 ||
      input.shape(0) != labels.shape(0) || input.shape(1) != weight.shape(1) ||
      weight.shape(0) < 1) {
    throw py::value_error("input (N, D), weight (C, D) and labels (N, K) do not fit together");
  }
  return {.input = rows_of(input),
          .weight = rows_of(weight),
          .classes = weight.shape(0),
          .labels = labels.data(),
          .labels_per_row = labels.shape(1),
          .scale = scale,
          .limit = std::numeric_limits<double>::infinity()};
}

template <class T>
py::tuple margin_forward(const Array<T>& input, const Array<T>& weight,
                         const Array<int64_t>& labels, double scale, bool needs_input_grad) {
  const auto problem = margin_problem(input, weight, labels, scale);
  const py::ssize_t n = input.shape(0);
  py::array_t<T> most(n), mean({needs_input_grad ? n : 0, input.shape(1)});
  py::array_t<double> lse(n), cosine({n, labels.shape(1)});
  const margin_cross_entropy::Statistics<T> results{
      .negative_lse = lse.mutable_data(),
      .negative_max = most.mutable_data(),
      .target_cosine = cosine.mutable_data(),
      .mean_center = needs_input_grad ? mean.mutable_data() : nullptr};
  {
    const py::gil_scoped_release release;
    margin_cross_entropy::forward<T>(problem, one_thread(), results);
  }
  return py::make_tuple(lse, most, cosine, mean);
}

template <class T>
py::tuple margin_backward(const Array<T>& input, const Array<T>& weight,
                          const Array<int64_t>& labels, const Array<double>& negative_lse,
                          const Array<T>& mean_center, const Array<double>& grad_negative_lse,
                          const Array<double>& grad_target_cosine, double scale) {
  const auto problem = margin_problem(input, weight, labels, scale);
  const py::ssize_t n = input.shape(0), d = input.shape(1);
  if (negative_lse.size() != n || grad_negative_lse.size() != n || mean_center.size() != n * d ||
      grad_target_cosine.size() != labels.size()) {
    throw py::value_error(
        "negative_lse and grad_negative_lse must be (N,), mean_center (N, D), "
        "grad_target_cosine (N, K)");
  }
  py::array_t<T> grad_input({n, d}), grad_weight({weight.shape(0), d});
  const margin_cross_entropy::Upstream<T> upstream{.negative_lse = negative_lse.data(),
                                                   .mean_center = mean_center.data(),
                                                   .grad_negative_lse = grad_negative_lse.data(),
                                                   .grad_target_cosine = grad_target_cosine.data()};
  const margin_cross_entropy::Gradients gradients{.input = grad_input.mutable_data(),
                                                  .rows = grad_weight.mutable_data()};
  {
    const py::gil_scoped_release release;
    margin_cross_entropy::backward<T>(problem, one_thread(), upstream, gradients);
  }
  return py::make_tuple(grad_input, grad_weight);
}

template <class T>
void define_margin(py::module_& module) {
  module.def("margin_cross_entropy_forward", margin_forward<T>, py::arg("input").noconvert(),
             py::arg("weight").noconvert(), py::arg("labels"), py::arg("scale"),
             py::arg("needs_input_grad"));
  module.def("margin_cross_entropy_backward", margin_backward<T>, py::arg("input").noconvert(),
             py::arg("weight").noconvert(), py::arg("labels"), py::arg("negative_lse"),
             py::arg("mean_center"), py::arg("grad_negative_lse"), py::arg("grad_target_cosine"),
             py::arg("scale"));
}

}  // namespace

void define_margin_cross_entropy(py::module_& module) {
  define_margin<float>(module);
  define_margin<double>(module);
}

}  // namespace synface
