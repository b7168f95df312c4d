// The CPU kernels on NumPy arrays, without torch: for data-loader workers and for programs that use
// NumPy alone. They run on one thread.
#include <string>

#include "numpy/arrays.h"
#include "simd/isa.h"

PYBIND11_MODULE(_numpy, module) {
  module.doc() = "CPU kernels on NumPy arrays; see synface_kernels.numpy.";
  module.def("cpu_isa", [] { return std::string(synface::name(synface::isa())); });
  synface::define_domain_mixup(module);
  synface::define_margin_cross_entropy(module);
}
