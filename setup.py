"""Builds `synface_kernels._C` (torch) and `synface_kernels._numpy` (NumPy alone).

SYNFACE_CUDA=0|1|auto says whether the CUDA sources are built; `auto` builds them where both nvcc
and a CUDA build of torch are found.
"""

import os
import shutil
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
    choice = os.environ.get("SYNFACE_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        sys.exit(f"SYNFACE_CUDA must be 0, 1 or auto, got {choice!r}")
    nvcc = CUDA_HOME is not None or shutil.which("nvcc") is not None
    if choice == "1" and not (nvcc and torch_cuda):
        sys.exit(
            f"SYNFACE_CUDA=1 needs nvcc (found: {nvcc}) and a CUDA torch (found: {torch_cuda})"
        )
    return choice != "0" and nvcc and torch_cuda is not None


# One instruction set for the whole build: faster ones are chosen at run time, per function.
# No contraction: where a fused multiply-add is meant, the source says so, so that the instruction
# sets agree wherever they promise to. Nobody reads the floating-point exceptions, which else keep
# selects between two results from becoming vector code, nor errno, which else keeps square roots
# from it.
CXX = ["-O3", "-std=c++20", "-fopenmp-simd", "-ffp-contract=off", "-fno-trapping-math"]
CXX += ["-fno-math-errno", "-fvisibility=hidden", "-Wall"]
NVCC = ["-O3", "-std=c++20", "--expt-relaxed-constexpr"]
INCLUDE = [os.path.abspath("csrc")]
NUMPY = "csrc/numpy_bindings.cpp"
CPU_KERNELS = [*sorted(glob("csrc/*/cpu.cpp")), "csrc/simd/isa.cpp"]

# at::parallel_for is serial unless it is compiled with OpenMP. It must be the OpenMP library that
# torch itself uses, which its wheels may ship under a name of their own: with two of them, products
# called from parallel code would not know that they are, and start threads anew.
OPENMP = glob(os.path.join(os.path.dirname(torch.__file__), "lib", "libgomp*.so*")) or ["-fopenmp"]

cuda_sources = sorted(glob("csrc/*/cuda.cu")) if want_cuda() else []
TorchExtension = CUDAExtension if cuda_sources else CppExtension


class Build(BuildExtension):
    """Objects of each extension in a folder of its own: compiled with other flags, they would
    otherwise replace each other's at every build."""

    def build_extension(self, ext: Extension) -> None:
        together = self.build_temp
        self.build_temp = os.path.join(together, ext.name)
        super().build_extension(ext)
        self.build_temp = together


setup(
    ext_modules=[
        TorchExtension(
            "synface_kernels._C",
            [*sorted(set(glob("csrc/*.cpp")) - {NUMPY}), *CPU_KERNELS, *cuda_sources],
            include_dirs=INCLUDE,
            define_macros=[("SYNFACE_CUDA", None)] if cuda_sources else [],
            extra_compile_args={"cxx": [*CXX, "-fopenmp"], "nvcc": NVCC},
            extra_link_args=OPENMP,
        ),
        Extension(
            "synface_kernels._numpy",
            [NUMPY, *CPU_KERNELS],
            include_dirs=[*INCLUDE, *include_paths()],  # torch brings pybind11's headers
            extra_compile_args={"cxx": CXX},
            language="c++",
        ),
    ],
    cmdclass={"build_ext": Build},
)
