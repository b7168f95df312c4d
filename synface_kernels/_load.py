"""The compiled extension, and the torch library that the ops' schemas are defined in."""

from __future__ import annotations

import platform
import re
import warnings
from importlib.machinery import PathFinder
from pathlib import Path

import torch

NAMESPACE = "synface_kernels"
library = torch.library.Library(NAMESPACE, "DEF")
library.define("_cpu_isas() -> str[]")
library.define("_cpu_isa() -> str")
library.define("_cached_bytes() -> int")
library.define("_empty_cache() -> ()")
library.define("_empty_result(int[] size, ScalarType dtype, bool channels_last) -> Tensor")


def _torch_of(extension: bytes) -> str | None:
    """Return the minor version of torch that an extension was compiled for, without loading it."""
    found = re.search(rb"synface_kernels is compiled for torch (\d+\.\d+)\0", extension)
    return None if found is None else found[1].decode()


def _load() -> str | None:
    """Load the torch extension; return why it could not be loaded, or None."""
    here = Path(__file__).parent  # never the extension of another installed copy
    spec = PathFinder.find_spec(f"{NAMESPACE}._C", [str(here)])
    if spec is None or spec.origin is None:
        others = sorted(p.name for p in here.glob("_C.*"))
        if others:
            version = platform.python_version()
            return f"the extension was built for another Python than {version}: {others}"
        return "the extension synface_kernels._C is not built"
    compiled = _torch_of(Path(spec.origin).read_bytes())
    running = ".".join(torch.__version__.split(".")[:2])
    if compiled not in (None, running):  # loading it could crash
        return (
            f"the extension {spec.origin} is compiled for torch {compiled}, and torch "
            f"{torch.__version__} is installed: install the wheel whose version ends in "
            f"+torch{running}, or torch {compiled}"
        )
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:  # built against another torch, or a library is missing
        cause = error.__cause__ or error  # torch's own sentence names the file alone
        return f"the extension {spec.origin} does not load in torch {torch.__version__}: {cause}"
    return None


extension_error = _load()
if extension_error is not None:
    warnings.warn(
        f"synface_kernels has no CPU kernels, so on a CPU its ops run their plain torch "
        f"definition, which is slow and holds whole matrices: {extension_error}. "
        "`pip install --no-build-isolation .` in the source compiles them for this Python and "
        "torch; `python -m synface_kernels` shows what runs.",
        RuntimeWarning,
        stacklevel=2,
    )


def cpu_isa() -> str:
    """Return the instruction set that the CPU kernels use.

    One of ``base``, ``avx2``, ``avx512``, ``avx512_bf16`` and ``onednn_bf16``.
    """
    return torch.ops.synface_kernels._cpu_isa()


def cpu_isas() -> list[str]:
    """Return every instruction set that this build and this processor support, slowest first."""
    return torch.ops.synface_kernels._cpu_isas()
