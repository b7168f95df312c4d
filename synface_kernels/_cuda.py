"""CUDA kernels that the extension lacks, as in a wheel: compiled from their source at first use."""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import suppress
from functools import cache
from glob import glob
from pathlib import Path

import torch

from ._cuda_toolkit import NVCC_FLAGS, NoCuda, find_toolkit

C_FLAGS = ["-O3", "-std=c++20", "-DSYNFACE_CUDA", "-DSYNFACE_NO_CPU"]
_HERE = Path(__file__).parent
_ADVICE = (
    'impl="cuda" compiles them at first use, and so does SYNFACE_CUDA=1; '
    "`SYNFACE_CUDA=1 pip install --no-build-isolation .` in the source builds them in"
)


def missing(op: str) -> str | None:
    """Return why an op has no CUDA kernels, or None; under SYNFACE_CUDA=1, compile them first."""
    if os.environ.get("SYNFACE_CUDA") == "1":
        return compile_at_first_use(op)
    return None if _is_loaded(op) else f"the extension has no CUDA kernels ({_ADVICE})"


# As in _precision.py: a graph takes the answer as it is.
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_loaded(op: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"synface_kernels::{op}_cuda", "CUDA")


def sources() -> Path:
    """Return the folder of the C++ and CUDA sources: a wheel's, or the source tree's."""
    return next(p for p in (_HERE / "csrc", _HERE.parent / "csrc") if p.is_dir())


def parts(op: str) -> list[str]:
    """Return the files to compile for an op's CUDA kernels, below `sources`."""
    return [f"{op}/torch.cpp", f"{op}/cuda.cu", "torch/tensors.cpp"]


def architectures() -> str:
    """Return the GPU architectures to compile for, as in TORCH_CUDA_ARCH_LIST: the visible ones."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if given not in ("", "native"):
        return given
    count = torch.cuda.device_count()
    found = {torch.cuda.get_device_capability(device) for device in range(count)}
    if not found:
        raise NoCuda("no GPU is visible: name its architecture, as in TORCH_CUDA_ARCH_LIST=9.0")
    return ";".join(f"{major}.{minor}" for major, minor in sorted(found))


def library_name(op: str, home: str, listed: str) -> str:
    """Return the name in torch's cache of compiled extensions, by all that it depends on."""
    files = [p for folder in ("common", op, "simd", "torch") for p in sources().glob(f"{folder}/*")]
    settings = (torch.__version__, torch.version.cuda, listed, home, *C_FLAGS, *NVCC_FLAGS)
    digest = hashlib.sha256(" ".join(map(str, settings)).encode())
    for path in sorted(files):
        digest.update(path.name.encode() + path.read_bytes())
    return f"synface_kernels_{op}_{digest.hexdigest()[:16]}"


@cache
def compile_at_first_use(op: str) -> str | None:
    """Compile and load an op's CUDA kernels unless it has them; return why that fails, or None."""
    if _is_loaded(op):
        return None
    try:
        torch.ops.load_library(_compile(op))
    except (NoCuda, OSError, RuntimeError, ValueError) as error:
        return f"the extension has no CUDA kernels, and they cannot be compiled here: {error}"
    return None


def _compile(op: str) -> str:
    """Return the path of the library with an op's CUDA kernels, from torch's cache if it is there.

    Processes that compile the same library at once wait for one of them.
    """
    from torch.utils import cpp_extension

    home, listed = find_toolkit(), architectures()
    name = library_name(op, home, listed)
    folder = cpp_extension._get_build_directory(name, verbose=False)
    library = os.path.join(folder, f"{name}.so")
    if os.path.exists(library) and not os.path.exists(os.path.join(folder, "lock")):
        return library
    print(
        f"synface_kernels compiles the CUDA kernels of {op} for {listed} by {home}/bin/nvcc: "
        f"about a minute, once; they are kept in {folder}. If nothing happens, a compilation was "
        "killed: remove that folder",
        file=sys.stderr,
        flush=True,
    )
    root = sources()
    before = cpp_extension.CUDA_HOME, os.environ.get("TORCH_CUDA_ARCH_LIST")
    cpp_extension.CUDA_HOME, os.environ["TORCH_CUDA_ARCH_LIST"] = home, listed
    try:
        cpp_extension.load(
            name,
            [str(root / part) for part in parts(op)],
            extra_cflags=C_FLAGS,
            extra_cuda_cflags=NVCC_FLAGS,
            extra_ldflags=_cuda_runtime(home, folder),
            extra_include_paths=[str(root)],
            build_directory=folder,
            is_python_module=False,
        )
    finally:
        cpp_extension.CUDA_HOME = before[0]
        if before[1] is None:
            del os.environ["TORCH_CUDA_ARCH_LIST"]
        else:
            os.environ["TORCH_CUDA_ARCH_LIST"] = before[1]
    return library


def _cuda_runtime(home: str, folder: str) -> list[str]:
    """Return linker options that find libcudart where a toolkit has it under a version alone.

    A toolkit from pip packages has a libcudart.so.13 in lib, where linkers want a libcudart.so.
    """
    versions = sorted(glob(os.path.join(home, "lib", "libcudart.so.*")))
    if not versions or glob(os.path.join(home, "lib*", "libcudart.so")):
        return []
    link = os.path.join(folder, "libcudart.so")
    with suppress(FileExistsError):  # another process may be as far
        os.symlink(versions[-1], link)
    return [f"-L{folder}"]
