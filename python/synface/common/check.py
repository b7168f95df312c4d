"""Argument checks that several packages share."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the command line checks folders without importing torch
    import torch
    from torch import Tensor


def describe(value: object) -> str:
    """Return a tensor's dtype, shape and device, or a value and its type, for an error message."""
    from torch import Tensor

    if not isinstance(value, Tensor):
        return f"{type(value).__name__} {value!r}"
    kind = str(value.dtype).removeprefix("torch.")
    return f"{kind} {tuple(value.shape)} on {value.device}"


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_number(
    name: str, value: Any, least: float, most: float = math.inf, *, above: bool = False
) -> None:
    """Raise TypeError or ValueError unless value is a finite number in [least, most].

    With ``above`` it must be in (least, most].
    """
    bounds = f"finite and {'>' if above else '≥'} {least:g}"
    if most < math.inf:
        bounds = f"in {'(' if above else '['}{least:g}, {most:g}]"
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not is_number:
        raise TypeError(f"{name} must be a number {bounds}, got {describe(value)}")
    if not (least <= value <= most and math.isfinite(value)) or (above and value == least):
        raise ValueError(f"{name} must be {bounds}, got {value}")


def check_integer(name: str, value: object, least: int, most: float = math.inf) -> None:
    """Raise TypeError or ValueError unless value is an integer in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer ≥ {least}, got {describe(value)}")
    check_least(name, value, least)
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def check_bool(name: str, value: object) -> None:
    """Raise TypeError unless value is a bool, NumPy's too."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise TypeError(f"{name} must be a bool, got {describe(value)}")


def check_least(name: str, value: float, least: float) -> None:
    """Raise ValueError unless value ≥ least."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_integers(config: object, **least: int) -> None:
    """Check several attributes as `check_integer` does, each with its least value."""
    for name, bound in least.items():
        check_integer(name, getattr(config, name), bound)


def check_by_op(call: Callable[[], object]) -> None:
    """Raise the TypeError or ValueError of an op that is called with meta tensors.

    An implementation that cannot run on these may run on others: its RuntimeError is suppressed.
    """
    with contextlib.suppress(RuntimeError):
        call()


def check_rows(name: str, rows: Tensor) -> Tensor:
    """Return the norms (N, 1) of rows (N, D) in float64.

    In float32, squares would overflow above 1e19 and underflow below 1e-23.

    Raises:
        ValueError: if a norm is zero or not finite.
    """
    import torch

    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
    for wrong, what in ((~norms.isfinite(), "not finite"), (norms == 0, "zero")):
        if wrong.any():
            kind = str(rows.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name}: {int(wrong.sum())} of {len(rows)} rows are {what} in {kind}, "
                f"the first is row {int(wrong.nonzero()[0, 0])}"
            )
    return norms


def check_folder(name: str, folder: Path) -> None:
    """Raise OSError unless files can be written to a folder, which need not exist yet.

    A temporary folder is created and removed in the nearest existing parent.
    """
    there = next((each for each in (folder, *folder.parents) if os.path.lexists(each)), Path())
    try:
        with tempfile.TemporaryDirectory(prefix=".synface-", dir=there):
            pass
    except OSError as error:
        raise type(error)(
            f"{name} must be a folder that can be written to, got {folder}: "
            f"{there}: {error.strerror}; choose another"
        ) from error


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int | None:
    """Return the bytes of available memory; None if the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def check_memory(what: str, needed: int) -> None:
    """Raise ValueError if something needs more bytes of memory than are available."""
    free = available_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"{what} would take {needed / 2**30:,.1f} GiB of memory, and {free / 2**30:,.1f} GiB "
            "are free"
        )


def check_generator(generator: object) -> None:
    """Raise TypeError unless generator is a `torch.Generator` or None."""
    import torch

    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {describe(generator)}")


def check_device(device: object) -> torch.device:
    """Return the device; raise TypeError or ValueError unless torch can compute on it here."""
    import torch

    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a str or torch.device, got {describe(device)}")
    try:
        found = torch.device(device)
        torch.zeros(1, dtype=torch.float32, device=found).item()
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        reason = first_line(error)
        raise ValueError(
            f"device must be one that torch has here, such as 'cpu', got {str(device)!r}: {reason}"
        ) from error
    return found
