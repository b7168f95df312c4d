"""Build `synface_kernels._C` (torch) and `synface_kernels._numpy` (NumPy alone).

SYNFACE_CUDA=0|1|auto says whether the CUDA sources are built. `auto` builds them where a CUDA build
of torch and a CUDA toolkit of its version are found and compile them, and without them otherwise;
with 1 that is an error.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob

import torch
from setuptools import Extension, setup
from torch.utils import cpp_extension
from torch.version import cuda as torch_cuda

# Ampere, Hopper, Blackwell: the ones whose budgets tools/cuda_check.py checks.
ARCHITECTURES = (80, 90, 100)


class NoCuda(Exception):
    """The CUDA sources cannot be built, for the reason that the message gives."""


def toolkits() -> list[str]:
    """Return the folders that may be a CUDA toolkit's, the likelier ones first."""
    found = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        found += [os.path.dirname(os.path.dirname(path)) for path in (nvcc, os.path.realpath(nvcc))]
    for pattern in ("/usr/local/cuda*", "/opt/cuda*"):
        # The folder without a version first, which the machine's owner chose; then the newest.
        found += sorted(glob(pattern), key=version_in, reverse=True)
    found += sorted(glob(os.path.join(sysconfig.get_path("purelib"), "nvidia", "cu*")))
    return list(dict.fromkeys(filter(None, found)))


def version_in(path: str) -> tuple[bool, list[int]]:
    """Return a key that sorts folders of CUDA: the versions in their names, and above them none."""
    numbers = [int(number) for number in re.findall(r"\d+", os.path.basename(path))]
    return not numbers, numbers


def ask_nvcc(home: str, question: str) -> str:
    """Return what a toolkit's nvcc answers; raise NoCuda if it does not run."""
    nvcc = os.path.join(home, "bin", "nvcc")
    try:
        done = subprocess.run([nvcc, question], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NoCuda(f"{nvcc} {question} fails: {error}") from error
    return done.stdout


def check_toolkit(home: str) -> None:
    """Raise NoCuda unless a folder has nvcc and headers of the CUDA that torch was built for.

    A script that calls nvcc may lie in a folder without headers.
    """
    for needed in ("bin/nvcc", "include/cuda_runtime.h"):
        if not os.path.exists(os.path.join(home, needed)):
            raise NoCuda(f"{home} has no {needed}")
    version = re.search(r"release (\d+)\.(\d+)", ask_nvcc(home, "--version"))
    if version is not None and version[1] != torch_cuda.split(".")[0]:
        raise NoCuda(f"{home} has CUDA {version[1]}.{version[2]}, torch is of {torch_cuda}")


def find_toolkit() -> str:
    """Return the folder of a CUDA toolkit that fits torch; raise NoCuda if there is none."""
    if torch_cuda is None:
        raise NoCuda("this torch is built without CUDA")
    problems = []
    for home in toolkits():
        try:
            check_toolkit(home)
        except NoCuda as problem:
            problems.append(str(problem))
        else:
            return home
    raise NoCuda(f"no CUDA {torch_cuda} toolkit: {'; '.join(problems) or 'no nvcc was found'}")


def sees_gpu() -> bool:
    """Return whether torch can ask a GPU for its architecture."""
    try:
        return torch.cuda.device_count() > 0 and bool(torch.cuda.get_device_capability(0))
    except Exception:  # a driver that does not fit
        return False


def name_architectures(home: str) -> None:
    """Choose the GPU architectures where no GPU is visible; torch detects only visible ones.

    An image is often built on a machine without a GPU. The last architecture is compiled to PTX
    too, which later GPUs can run.
    """
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if given not in ("", "native") or sees_gpu():
        return
    offered = set(ask_nvcc(home, "--list-gpu-arch").split())
    chosen = [f"{a // 10}.{a % 10}" for a in ARCHITECTURES if f"compute_{a}" in offered]
    if not chosen:
        raise NoCuda(
            f"nvcc of {home} offers {sorted(offered)}, none of the architectures {ARCHITECTURES}: "
            "name yours, as in TORCH_CUDA_ARCH_LIST=8.6"
        )
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(chosen) + "+PTX"
    print(f"no GPU is visible: CUDA sources compiled for {os.environ['TORCH_CUDA_ARCH_LIST']}")


def prepare_cuda() -> bool:
    """Return whether to build the CUDA sources, and set what torch reads to build them."""
    if CHOICE not in ("0", "1", "auto"):
        sys.exit(f"SYNFACE_CUDA must be 0, 1 or auto, got {CHOICE!r}")
    if CHOICE == "0":
        return False
    try:
        home = find_toolkit()
        name_architectures(home)
    except NoCuda as problem:
        if CHOICE == "1":
            sys.exit(f"SYNFACE_CUDA=1: {problem}")
        if torch_cuda is not None:
            print(f"building as with SYNFACE_CUDA=0, without CUDA: {problem}")
        return False
    cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] = home
    return True


CHOICE = os.environ.get("SYNFACE_CUDA", "auto")
WITH_CUDA = prepare_cuda()

# One instruction set for the whole build: faster ones are chosen at run time, per function.
# No contraction: the source names each fused multiply-add, so that results are the same
# on all instruction sets where documented. Floating-point exceptions and errno, which nothing
# reads, would prevent vectorized selects and square roots.
CXX = ["-O3", "-std=c++20", "-fopenmp-simd", "-ffp-contract=off", "-fno-trapping-math"]
CXX += ["-fno-math-errno", "-fvisibility=hidden", "-Wall"]
if "-g" not in os.environ.get("CFLAGS", "").split():
    CXX += ["-g0"]  # Python's own flags have -g, which takes a third of the time
NVCC = ["-O3", "-std=c++20", "--expt-relaxed-constexpr"]
INCLUDE = [os.path.abspath("csrc")]
CPU_KERNELS = [*sorted(glob("csrc/*/cpu.cpp")), "csrc/simd/isa.cpp"]
TORCH = [*sorted(glob("csrc/*/torch.cpp")), *sorted(glob("csrc/torch/*.cpp"))]
NUMPY = sorted(glob("csrc/numpy/*.cpp"))

# at::parallel_for is serial unless it is compiled with OpenMP. It must be the OpenMP library that
# torch itself uses, which its wheels may ship under a name of their own: with two of them, a GEMM
# called from parallel code would not know that it is, and start more threads.
OPENMP = glob(os.path.join(os.path.dirname(torch.__file__), "lib", "libgomp*.so*")) or ["-fopenmp"]


def torch_extension(cuda: bool) -> Extension:
    """Return the extension for torch, with the CUDA sources or without."""
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return kind(
        "synface_kernels._C",
        [*TORCH, *(sorted(glob("csrc/*/cuda.cu")) if cuda else [])],
        depends=CPU_KERNELS,
        include_dirs=INCLUDE,
        define_macros=[("SYNFACE_CUDA", None)] if cuda else [],
        extra_compile_args={"cxx": [*CXX, "-fopenmp"], "nvcc": NVCC},
        extra_link_args=OPENMP,
    )


class Build(cpp_extension.BuildExtension):
    """A build that compiles the CPU kernels once, for both extensions.

    The extensions' own objects have a folder each: they are compiled with different flags, and
    would otherwise replace each other at every build.
    """

    def build_extension(self, ext: Extension) -> None:
        """Compile the kernels, unless they are up to date, and an extension that links them."""
        together = self.build_temp
        ext.extra_objects = self.compiler.compile(
            CPU_KERNELS,
            output_dir=os.path.join(together, "kernels"),
            include_dirs=INCLUDE,
            extra_postargs=CXX,
        )
        self.build_temp = os.path.join(together, ext.name)
        super().build_extension(ext)
        self.build_temp = together

    def build_extensions(self) -> None:
        """Build all; where CUDA sources were not asked for and do not compile, without them."""
        try:
            super().build_extensions()
        except Exception as error:
            if not WITH_CUDA or CHOICE == "1":
                raise
            print(
                f"WARNING: with CUDA the build fails ({error}); now as with SYNFACE_CUDA=0, "
                "without CUDA (SYNFACE_CUDA=1 makes that an error)"
            )
            # The same object, which setuptools has added attributes to.
            vars(self.extensions[0]).update(vars(torch_extension(cuda=False)))
            super().build_extensions()


setup(
    ext_modules=[
        torch_extension(WITH_CUDA),
        Extension(
            "synface_kernels._numpy",
            NUMPY,
            depends=CPU_KERNELS,
            # torch brings pybind11's headers.
            include_dirs=[*INCLUDE, *cpp_extension.include_paths()],
            extra_compile_args={"cxx": CXX},
            language="c++",
        ),
    ],
    cmdclass={"build_ext": Build},
)
