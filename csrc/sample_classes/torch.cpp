// sample_classes on torch tensors.
#include <tuple>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "sample_classes/cpu.h"
#include "torch/result_memory.h"
#include "torch/runtime.h"

namespace synface::sample_classes {
namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> draw(const Tensor& target, int64_t classes, int64_t wanted, int64_t seed,
                                int64_t ignore) {
  const Tensor labels = target.contiguous();
  TORCH_CHECK_VALUE(classes >= 1 && classes < int64_t(1) << 31,
                    "num_classes must be in [1, 2^31), got ", classes);
  TORCH_CHECK_VALUE(wanted >= 0 && wanted <= classes, "num_sampled must be in [0, ", classes,
                    "], got ", wanted);
  const Sample sample({.labels = labels.const_data_ptr<int64_t>(),
                       .count = labels.numel(),
                       .classes = classes,
                       .wanted = wanted,
                       .ignore = ignore,
                       .seed = uint64_t(seed)});
  Tensor class_ids = at::empty({sample.size()}, labels.options());
  Tensor remapped = at::empty(labels.sizes(), labels.options());
  advise_huge_pages(class_ids);
  sample.write(torch_runtime(), class_ids.data_ptr<int64_t>(), remapped.data_ptr<int64_t>());
  return {class_ids, remapped};
}

}  // namespace

TORCH_LIBRARY_IMPL(synface_kernels, CPU, library) { library.impl("sample_classes_cpu", draw); }

}  // namespace synface::sample_classes
