"""The choice of an op's implementation, with reasons."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import _load

# Returns why an implementation cannot run on such tensors, or None if it can.
Requirement = Callable[[torch.device, Sequence[torch.dtype]], "str | None"]
# Says how an implementation works on tensors of such dtypes.
Note = Callable[[Sequence[torch.dtype]], str]
# op -> implementation -> requirement, in the order in which `auto` prefers them
_REGISTRY: dict[str, dict[str, Requirement]] = {}
_NOTES: dict[tuple[str, str], Note] = {}
# public function -> op, where an op has several
_FUNCTIONS: dict[str, str] = {}
# Makes an implementation available that was asked for by name; returns why that fails, or None.
_PREPARATIONS: dict[tuple[str, str], Callable[[torch.device], str | None]] = {}


@dataclass(frozen=True)
class Choice:
    """The implementation that ``impl="auto"`` takes.

    Attributes:
        op, impl: the op's name and the implementation's.
        reason: why it was taken.
        rejected: implementations that are preferred to it, with the reason why each cannot run.
    """

    op: str
    impl: str
    reason: str
    rejected: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.impl} ({self.reason})"]
        lines += [f"  not {name}: {why}" for name, why in self.rejected.items()]
        return "\n".join(lines)


def register(
    op: str,
    implementations: dict[str, Requirement],
    notes: dict[str, Note] | None = None,
    preparations: dict[str, Callable[[torch.device], str | None]] | None = None,
    functions: Sequence[str] = (),
) -> None:
    """Register an op's implementations, in the order in which ``impl="auto"`` prefers them.

    Args:
        functions: names of public functions that are of this op but not named so.
        notes: what `explain` adds to the reason for an implementation.
        preparations: what makes an implementation available that a caller names; each returns why
            that fails, or None.
    """
    _REGISTRY[op] = implementations
    _FUNCTIONS.update(dict.fromkeys(functions, op))
    _PREPARATIONS.update({(op, name): prepare for name, prepare in (preparations or {}).items()})
    _NOTES.update({(op, name): note for name, note in (notes or {}).items()})


def ops() -> list[str]:
    """Return the names of all ops."""
    return list(_REGISTRY)


def needs_cpu_extension(device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    """Require CPU tensors and the compiled extension."""
    if device.type != "cpu":
        return f"runs on CPU tensors, got {device}"
    return _load.extension_error


def interpreting() -> bool:
    """Return whether Triton interprets its kernels on CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def needs_triton(device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    """Require Triton, and tensors that its kernels take: on a GPU, or interpreted; no float64.

    The GPU must have compute capability 8.0, for bfloat16.
    """
    if torch.float64 in dtypes:
        return "has no float64 kernel"
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        return f"runs on CUDA tensors (on CPU tensors only under TRITON_INTERPRET=1), got {device}"
    if device.type == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"needs compute capability 8.0 or later, {device} has {major}.{minor}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return None


def always(device: torch.device, dtypes: Sequence[torch.dtype]) -> str | None:
    """Require nothing."""
    return None


def choose(op: str, device: torch.device, dtypes: Sequence[torch.dtype]) -> Choice:
    """Return the first of an op's implementations that can run on such tensors."""
    rejected: dict[str, str] = {}
    for name, requirement in _REGISTRY[op].items():
        problem = requirement(device, dtypes)
        if problem is None:
            kinds = ", ".join(sorted({str(d).removeprefix("torch.") for d in dtypes}))
            reason = f"the first that runs for {kinds} on {device}"
            return Choice(op, name, reason, rejected)
        rejected[name] = problem
    raise RuntimeError(f"no implementation of {op} runs on {device}: {rejected}")


def resolve(op: str, impl: str, tensors: Sequence[Tensor]) -> str:
    """Return the implementation to run; raise with the reason where ``impl`` cannot."""
    device, dtypes = tensors[0].device, [t.dtype for t in tensors]
    if impl == "auto":
        return choose(op, device, dtypes).impl
    if impl not in _REGISTRY[op]:
        raise ValueError(f"impl must be one of {['auto', *_REGISTRY[op]]} for {op}, got {impl!r}")
    prepare = _PREPARATIONS.get((op, impl))
    problem = None if prepare is None else prepare(device)
    problem = problem or _REGISTRY[op][impl](device, dtypes)
    if problem is not None:
        raise RuntimeError(f"impl={impl!r} of {op} cannot run here: {problem}")
    return impl


def explain(
    op: str | Callable[..., object],
    *tensors: Tensor,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Choice:
    """Return which implementation ``impl="auto"`` takes, and why.

    Args:
        op: a public function that takes ``impl``, or its name.
        tensors: the op's tensors.
        device, dtype: without tensors, the device and dtype that they would have.

    Returns:
        A `Choice` with ``impl``, ``reason`` and ``rejected``; printing it reads as sentences.

    Raises:
        ValueError: if there is no such op.
        TypeError: for tensors and a dtype that are none.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in {*_REGISTRY, *_FUNCTIONS}:
        raise ValueError(f"op must be one of {[*_REGISTRY, *_FUNCTIONS]}, got {name!r}")
    name = _FUNCTIONS.get(name, name)
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors must be tensors, got {type(tensor).__name__}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
    if tensors:
        floating = [t.dtype for t in tensors if t.is_floating_point()]
        where, dtypes = tensors[0].device, floating or [tensors[0].dtype]
    else:
        where, dtypes = torch.device(device), [dtype]
    choice = choose(name, where, dtypes)
    note = _NOTES.get((name, choice.impl))
    return choice if note is None else replace(choice, reason=f"{choice.reason}; {note(dtypes)}")
