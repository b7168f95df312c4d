"""A report of versions, devices, implementations and the environment variables that are read."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import _load, _select

# Every environment variable that the library reads; docs/environment.md has details.
VARIABLES = {
    "NVCC": "the nvcc that make cuda-check runs (default: the one on PATH)",
    "SYNFACE_CACHE_MIB": "how many MiB of freed CPU results are cached for later ones "
    "(default: 512; 0: none)",
    "SYNFACE_CPU_ISA": "base, avx2, avx512, avx512_bf16 or onednn_bf16: the CPU kernels' "
    "instruction set (default: the best)",
    "SYNFACE_CUDA": "0, 1 or auto: whether a build compiles the CUDA sources (default: auto); "
    "1: where it did not, the first use compiles them",
    "SYNFACE_MARGIN_DESIGN": "fused, tiled or auto: whether Triton's margin softmax multiplies in "
    "its kernels or by cuBLAS (default: auto, fused but for exact float32)",
    "SYNFACE_WHEEL": "1: a build makes a wheel for one minor version of torch",
    "TRITON_INTERPRET": "1: Triton interprets its kernels on CPU tensors (slow; for tests)",
}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """Return the processor's model name."""
    try:
        with open("/proc/cpuinfo") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def devices() -> list[torch.device]:
    """Return the CPU and each GPU that torch sees."""
    found = [torch.device("cpu")]
    if torch.cuda.is_available():
        found += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return found


def describe(device: torch.device) -> dict[str, Any]:
    """Return processor, device and versions, without host name and paths."""
    from . import __version__

    found: dict[str, Any] = {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "instruction_set": _load.cpu_isa() if _load.extension_error is None else "no extension",
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "synface_kernels": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "numpy": _version("numpy"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "device_memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": str(torch.version.cuda),
        }
    return found


def report() -> str:
    """Return versions, devices, instruction sets, and each op's implementation with the reason."""
    from . import _import_all

    _import_all()  # registers the ops
    lines = [
        f"synface-kernels {_version('synface-kernels')}",
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"triton {_version('triton')}, numpy {_version('numpy')}, "
        f"CUDA of torch: {torch.version.cuda or 'none'}",
        f"processor: {processor()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} "
        "threads",
    ]
    if _load.extension_error is None:
        lines.append(
            f"CPU instruction set: {_load.cpu_isa()} (offered: {', '.join(_load.cpu_isas())})"
        )
    else:
        lines.append(f"CPU kernels: none, {_load.extension_error}")
    for device in devices()[1:]:
        lines.append(f"{device}: {torch.cuda.get_device_name(device)}")
    if len(devices()) == 1:
        lines.append("GPU: none that torch sees")
    lines += ["", "implementations:"]
    for op in _select.ops():
        for device in devices():
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                choice = _select.choose(op, device, [dtype])
                lines.append(
                    f"  {op} on {device}, {str(dtype).removeprefix('torch.')}: {choice.impl}"
                )
                lines += [f"    not {name}: {why}" for name, why in choice.rejected.items()]
    lines += ["", "environment:"]
    for name, meaning in VARIABLES.items():
        lines.append(f"  {name}={os.environ.get(name, '')}  ({meaning})")
    return "\n".join(lines)
