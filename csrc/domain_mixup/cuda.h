// Domain mixup on a GPU: the same problem as in cpu.h, all pointers on the device.
#pragma once

#include "domain_mixup/cpu.h"

namespace synface::domain_mixup {

// Launches on the stream (a cudaStream_t); returns CUDA's error message of the launch, or null.
const char* forward_cuda(const Problem& problem, const MutableImages& out, void* stream);

// Returns how many doubles backward_cuda needs as workspace for the gradient of ψ.
int64_t psi_workspace(const Problem& problem);

// As `backward`; each sum of the gradient of ψ has a fixed order.
const char* backward_cuda(const Problem& problem, const Images& gradient,
                          const Gradients& gradients, double* workspace, void* stream);

}  // namespace synface::domain_mixup
