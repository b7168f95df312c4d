"""Build `synface_kernels._C` (torch) and `synface_kernels._numpy` (NumPy alone).

SYNFACE_CUDA=0|1|auto says whether the CUDA sources are built. `auto` builds them where a CUDA build
of torch and a CUDA toolkit of its version are found and compile them, and without them otherwise;
with 1 that is an error.

SYNFACE_WHEEL=1 names the torch in the version (0.2.0+torch2.13) and requires it in the metadata: a
wheel that others install runs in that minor version of torch only.
"""

import importlib.util
import os
import sys
from glob import glob
from typing import Any

import torch
from setuptools import Distribution, Extension, setup
from setuptools.command.build_py import build_py
from torch.utils import cpp_extension
from torch.version import cuda as torch_cuda

# The file alone: the package imports the extension.
_spec = importlib.util.spec_from_file_location("toolkit", "synface_kernels/_cuda_toolkit.py")
toolkit = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toolkit)


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
    offered = set(toolkit.ask_nvcc(home, "--list-gpu-arch").split())
    chosen = [f"{a // 10}.{a % 10}" for a in toolkit.ARCHITECTURES if f"compute_{a}" in offered]
    if not chosen:
        raise toolkit.NoCuda(
            f"nvcc of {home} offers {sorted(offered)}, none of the architectures "
            f"{toolkit.ARCHITECTURES}: name yours, as in TORCH_CUDA_ARCH_LIST=8.6"
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
        home = toolkit.find_toolkit()
        name_architectures(home)
    except toolkit.NoCuda as problem:
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
INCLUDE = [os.path.abspath("csrc")]
CPU_KERNELS = [*sorted(glob("csrc/*/cpu.cpp")), "csrc/simd/isa.cpp"]
TORCH = [*sorted(glob("csrc/*/torch.cpp")), *sorted(glob("csrc/torch/*.cpp"))]
NUMPY = sorted(glob("csrc/numpy/*.cpp"))

# The wheel carries what `synface_kernels/_cuda.py` compiles at first use.
SOURCES_AT_FIRST_USE = ("common", "domain_mixup", "simd", "torch")


def torch_extension(cuda: bool) -> Extension:
    """Return the extension for torch, with the CUDA sources or without."""
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return kind(
        "synface_kernels._C",
        [*TORCH, *(sorted(glob("csrc/*/cuda.cu")) if cuda else [])],
        depends=CPU_KERNELS,
        include_dirs=INCLUDE,
        define_macros=[("SYNFACE_CUDA", None)] if cuda else [],
        # at::parallel_for is serial unless it is compiled with OpenMP. No OpenMP library is linked:
        # the one that torch loaded, whatever its name, provides the symbols. A GEMM that is called
        # from parallel code must know that it is, and with a second library it would not.
        extra_compile_args={"cxx": [*CXX, "-fopenmp"], "nvcc": toolkit.NVCC_FLAGS},
    )


class Build(cpp_extension.BuildExtension):
    """A build that compiles the CPU kernels once, for both extensions.

    The extensions' own objects have a folder each: they are compiled with different flags, and
    would otherwise replace each other at every build.
    """

    def run(self) -> None:
        """Keep the objects of an editable install, for the next; pip's own folder is deleted."""
        if self.editable_mode:
            tag = f"{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_temp = os.path.join("build", f"temp.{tag}")
        super().run()

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


class BuildPython(build_py):
    """The Python files, and the sources of the CUDA kernels."""

    def run(self) -> None:
        """Copy them; an editable install reads the sources where they are."""
        super().run()
        if self.editable_mode:
            return
        for folder in SOURCES_AT_FIRST_USE:
            target = os.path.join(self.build_lib, "synface_kernels", "csrc", folder)
            os.makedirs(target, exist_ok=True)
            for source in glob(f"csrc/{folder}/*"):
                self.copy_file(source, target)


class WheelOfOneTorch(Distribution):
    """The project as pyproject.toml has it, but for one minor version of torch."""

    def parse_config_files(self, *args: Any, **kwargs: Any) -> None:
        """Read pyproject.toml, then replace the version and the requirement."""
        super().parse_config_files(*args, **kwargs)
        minor = ".".join(torch.__version__.split(".")[:2])
        version = self.metadata.version
        self.metadata.version = f"{version}{'.' if '+' in version else '+'}torch{minor}"
        others = [r for r in self.install_requires if not r.startswith("torch>")]
        assert len(others) == len(self.install_requires) - 1, self.install_requires
        self.install_requires = [f"torch=={minor}.*", *others]
        self.metadata.install_requires = self.install_requires


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
    cmdclass={"build_ext": Build, "build_py": BuildPython},
    distclass=WheelOfOneTorch if os.environ.get("SYNFACE_WHEEL") == "1" else Distribution,
)
