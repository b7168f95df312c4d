"""Builds `synface_kernels._C` (torch) and `synface_kernels._numpy` (NumPy alone).

SYNFACE_CUDA=0|1|auto says whether the CUDA sources are built; `auto` builds them where both nvcc and
a CUDA build of torch are found.
"""

import os
import shutil
import sys
from glob import glob

import pybind11
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
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
# selects between two results from becoming vector code.
CXX = ["-O3", "-std=c++20", "-fopenmp-simd", "-ffp-contract=off", "-fno-trapping-math"]
CXX += ["-fvisibility=hidden", "-Wall"]
NVCC = ["-O3", "-std=c++20", "--expt-relaxed-constexpr"]
INCLUDE = [os.path.abspath("csrc")]
CPU_KERNELS = [*sorted(glob("csrc/*/cpu.cpp")), "csrc/simd/isa.cpp"]

cuda_sources = sorted(glob("csrc/*/cuda.cu")) if want_cuda() else []
TorchExtension = CUDAExtension if cuda_sources else CppExtension

setup(
    ext_modules=[
        TorchExtension(
            "synface_kernels._C",
            ["csrc/bindings.cpp", "csrc/gemm/torch_gemm.cpp", *CPU_KERNELS, *cuda_sources],
            include_dirs=INCLUDE,
            define_macros=[("SYNFACE_CUDA", None)] if cuda_sources else [],
            extra_compile_args={"cxx": CXX, "nvcc": NVCC},
        ),
        Extension(
            "synface_kernels._numpy",
            ["csrc/numpy_bindings.cpp", *CPU_KERNELS],
            include_dirs=[*INCLUDE, pybind11.get_include()],
            extra_compile_args={"cxx": CXX},
            language="c++",
        ),
    ],
    cmdclass={"build_ext": BuildExtension},
)
