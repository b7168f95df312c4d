"""Finds the compiled extension and holds the library that the ops' schemas are defined in."""

from __future__ import annotations

import importlib.util

import torch

NAMESPACE = "synface_kernels"
library = torch.library.Library(NAMESPACE, "DEF")
library.define("_cpu_isas() -> str[]")
library.define("_cpu_isa() -> str")
library.define("_cached_bytes() -> int")
library.define("_empty_cache() -> ()")
library.define("_empty_result(int[] size, ScalarType dtype, bool channels_last) -> Tensor")


def _load() -> str | None:
    """Loads the torch extension; returns why it could not be, or None."""
    spec = importlib.util.find_spec(f"{NAMESPACE}._C")
    if spec is None or spec.origin is None:
        return "the extension synface_kernels._C is not built (pip install --no-build-isolation .)"
    try:
        torch.ops.load_library(spec.origin)
    except OSError as error:  # built against another torch, or a library is missing
        return f"the extension {spec.origin} does not load: {error}"
    return None


extension_error = _load()


def cpu_isa() -> str:
    """The instruction set that the CPU kernels use: ``base``, ``avx2``, ``avx512``,
    ``avx512_bf16`` or ``onednn_bf16``."""
    return torch.ops.synface_kernels._cpu_isa()


def cpu_isas() -> list[str]:
    """Every instruction set that this build and this processor offer, slowest first."""
    return torch.ops.synface_kernels._cpu_isas()
