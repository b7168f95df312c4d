"""Build `synface_kernels._C` (torch) and `synface_kernels._numpy` (NumPy alone).

SYNFACE_CUDA=0|1|auto says whether the CUDA sources are built; `auto` builds them where both nvcc
and a CUDA build of torch are found.
"""

import os
import shutil
import subprocess
import sys
from glob import glob

import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import (
    CUDA_HOME,
    BuildExtension,
    CppExtension,
    CUDAExtension,
    include_paths,
)
from torch.version import cuda as torch_cuda


def want_cuda() -> bool:
    """Return whether to build the CUDA sources: by SYNFACE_CUDA, nvcc and torch."""
    choice = os.environ.get("SYNFACE_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        sys.exit(f"SYNFACE_CUDA must be 0, 1 or auto, got {choice!r}")
    nvcc = CUDA_HOME is not None or shutil.which("nvcc") is not None
    if choice == "1" and not (nvcc and torch_cuda):
        sys.exit(
            f"SYNFACE_CUDA=1 needs nvcc (found: {nvcc}) and a CUDA torch (found: {torch_cuda})"
        )
    return choice != "0" and nvcc and torch_cuda is not None


def name_architectures() -> None:
    """Choose the GPU architectures where no GPU is visible; torch detects only visible ones.

    An image is often built on a machine without a GPU. The last architecture is compiled to PTX
    too, which later GPUs can run.
    """
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if given not in ("", "native") or torch.cuda.device_count() > 0:
        return
    nvcc = os.path.join(CUDA_HOME, "bin", "nvcc")
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True)
    offered = set(known.stdout.split())
    chosen = [f"{a // 10}.{a % 10}" for a in ARCHITECTURES if f"compute_{a}" in offered]
    if not chosen:
        sys.exit(
            f"{nvcc} offers {known.stdout.split()}, none of the architectures {ARCHITECTURES}: "
            "name yours, as in TORCH_CUDA_ARCH_LIST=8.6, or build without CUDA by SYNFACE_CUDA=0"
        )
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(chosen) + "+PTX"
    print(f"no GPU is visible: CUDA sources compiled for {os.environ['TORCH_CUDA_ARCH_LIST']}")


# Ampere, Hopper, Blackwell: the ones whose budgets tools/cuda_check.py checks.
ARCHITECTURES = (80, 90, 100)
# One instruction set for the whole build: faster ones are chosen at run time, per function.
# No contraction: the source names each fused multiply-add, so that results are the same
# on all instruction sets where documented. Floating-point exceptions and errno, which nothing
# reads, would prevent vectorized selects and square roots.
CXX = ["-O3", "-std=c++20", "-fopenmp-simd", "-ffp-contract=off", "-fno-trapping-math"]
CXX += ["-fno-math-errno", "-fvisibility=hidden", "-Wall"]
NVCC = ["-O3", "-std=c++20", "--expt-relaxed-constexpr"]
INCLUDE = [os.path.abspath("csrc")]
CPU_KERNELS = [*sorted(glob("csrc/*/cpu.cpp")), "csrc/simd/isa.cpp"]
TORCH = [*sorted(glob("csrc/*/torch.cpp")), *sorted(glob("csrc/torch/*.cpp"))]
NUMPY = sorted(glob("csrc/numpy/*.cpp"))

# at::parallel_for is serial unless it is compiled with OpenMP. It must be the OpenMP library that
# torch itself uses, which its wheels may ship under a name of their own: with two of them, a GEMM
# called from parallel code would not know that it is, and start more threads.
OPENMP = glob(os.path.join(os.path.dirname(torch.__file__), "lib", "libgomp*.so*")) or ["-fopenmp"]

cuda_sources = sorted(glob("csrc/*/cuda.cu")) if want_cuda() else []
if cuda_sources:
    name_architectures()
TorchExtension = CUDAExtension if cuda_sources else CppExtension


class Build(BuildExtension):
    """A build with a separate folder of objects for each extension.

    They are compiled with different flags, and would otherwise replace each other at every build.
    """

    def build_extension(self, ext: Extension) -> None:
        together = self.build_temp
        self.build_temp = os.path.join(together, ext.name)
        super().build_extension(ext)
        self.build_temp = together


setup(
    ext_modules=[
        TorchExtension(
            "synface_kernels._C",
            [*TORCH, *CPU_KERNELS, *cuda_sources],
            include_dirs=INCLUDE,
            define_macros=[("SYNFACE_CUDA", None)] if cuda_sources else [],
            extra_compile_args={"cxx": [*CXX, "-fopenmp"], "nvcc": NVCC},
            extra_link_args=OPENMP,
        ),
        Extension(
            "synface_kernels._numpy",
            [*NUMPY, *CPU_KERNELS],
            include_dirs=[*INCLUDE, *include_paths()],  # torch brings pybind11's headers
            extra_compile_args={"cxx": CXX},
            language="c++",
        ),
    ],
    cmdclass={"build_ext": Build},
)
