// Domain mixup on a GPU: the same problem as cpu.h, all pointers on the device.
#pragma once

#include "domain_mixup/cpu.h"

namespace synface::domain_mixup {

// Launches on the stream (a cudaStream_t); returns what CUDA says of the launch, null if all is
// well.
const char* forward_cuda(const Problem& problem, const MutableImages& out, void* stream);

// How many doubles backward_cuda needs as workspace for grad_psi.
int64_t psi_workspace(const Problem& problem);

// As `backward`; each sum of grad_psi has a fixed order.
const char* backward_cuda(const Problem& problem, const Images& gradient,
                          const MutableImages& grad_synthetic, const MutableImages& grad_real,
                          double* grad_psi, double* workspace, void* stream);

}  // namespace synface::domain_mixup
