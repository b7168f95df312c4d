"""Time and memory of the margin softmax, fused and in plain torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import synface_kernels as sk
from synface_kernels.testing import peak_bytes

from ..common.rng import normals

METHODS = ("fused", "eager", "torch.compile")
Step = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Workload:
    """N embeddings of D dimensions against C class centers, float32."""

    n: int = 256
    d: int = 256
    c: int = 100_000

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return random embeddings (N, D), centers (C, D) and labels (N,)."""
        g = torch.Generator().manual_seed(0)
        x = normals((self.n, self.d), g).requires_grad_()
        w = normals((self.c, self.d), g).requires_grad_()
        return x, w, torch.randint(0, self.c, (self.n,), generator=g, device="cpu")


def arcface(x: Tensor, w: Tensor, target: Tensor) -> Tensor:
    """Return the ArcFace loss in plain torch, with N×C logits, as in common training code."""
    cosine = F.linear(F.normalize(x), F.normalize(w)).clamp(-1 + 1e-7, 1 - 1e-7)
    own = cosine.gather(1, target[:, None])
    # Under a GPU's autocast, acos returns float32.
    logits = cosine.scatter(1, target[:, None], (own.acos() + 0.5).cos().to(cosine.dtype))
    return F.cross_entropy(64 * logits, target)


def step(
    method: str, workload: Workload, tensors: tuple[Tensor, Tensor, Tensor] | None = None
) -> Step:
    """Return a function that computes the loss and both gradients, and stores none of them.

    Args:
        tensors: what it is computed of; by default the workload's.
    """
    x, w, target = workload.tensors() if tensors is None else tensors
    losses: dict[str, Callable[..., Any]] = {
        "fused": sk.margin_cross_entropy,
        "eager": arcface,
        "torch.compile": torch.compile(arcface),
    }
    loss = losses[method]

    def run() -> tuple[Tensor, ...]:
        value = loss(x, w, target)
        return value.detach(), *torch.autograd.grad(value, (x, w))

    return run


def _close(ours: tuple[Tensor, ...], eager: tuple[Tensor, ...]) -> bool:
    pairs = zip(ours, eager, strict=True)
    return all(bool((a - b).norm() <= 1e-3 * b.norm()) for a, b in pairs)


def _prepare(
    workload: Workload, done: Callable[[str], None]
) -> tuple[dict[str, Step], dict[str, Any]]:
    """Return each method's step, called once and compared with eager's, and why others have none.

    A method whose loss or gradients differ from eager's by more than 1e-3 of their norm has none.
    """
    tensors = workload.tensors()
    expected = step("eager", workload, tensors)()
    steps: dict[str, Step] = {}
    failed: dict[str, Any] = {}
    for method in METHODS:
        try:
            steps[method] = step(method, workload, tensors)
            # The first call compiles; eager's was above.
            if method != "eager" and not _close(steps[method](), expected):
                raise ArithmeticError("its loss or gradients differ from eager torch's")
        except Exception as error:  # such as no C++ compiler: report it, and time the others
            steps.pop(method, None)
            failed[method] = reason(error)
        done(method)
    return steps, failed


def _time(steps: dict[str, Step], rounds: int, done: Callable[[str], None]) -> dict[str, Any]:
    samples: dict[str, list[float]] = {method: [] for method in steps}
    for _ in range(rounds):
        for method, run in steps.items():
            began = time.perf_counter()
            run()
            samples[method].append(time.perf_counter() - began)
            done(method)
    return {method: statistics.median(times) for method, times in samples.items()}


def _peak(run: Step) -> int | str:
    try:
        return peak_bytes(run)
    except Exception as error:  # such as a system without /proc
        return reason(error)


def reason(error: Exception) -> str:
    """Return why something was not measured: an error's type and first line."""
    line = (str(error).splitlines() or [""])[0]
    return f"not measured: {type(error).__name__}: {line}"


def time_all(
    workload: Workload, rounds: int = 3, done: Callable[[str], None] = lambda method: None
) -> dict[str, Any]:
    """Return each method's median seconds, interleaved in one process, or why it has none.

    A method whose loss or gradients differ from eager's by more than 1e-3 of their norm is not
    timed.
    """
    steps, failed = _prepare(workload, done)
    return failed | _time(steps, rounds, done)


def measure_all(
    workload: Workload, rounds: int = 3, done: Callable[[str], None] = lambda method: None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what `time_all` does, and each method's peak bytes, as `peak_memory` does.

    Each method is compiled once for both. ``done`` is called rounds + 2 times for each.
    """
    steps, failed = _prepare(workload, done)
    times = _time(steps, rounds, done)
    memory: dict[str, Any] = {}
    for method, run in steps.items():
        memory[method] = _peak(run)
        done(method)
    return failed | times, failed | memory


def peak_memory(method: str, workload: Workload) -> int | str:
    """Return the peak bytes above the inputs, gradients included, or why it has none (Linux)."""
    try:
        run = step(method, workload)
        run()  # one-time loading and compilation is not measured
    except Exception as error:
        return reason(error)
    return _peak(run)
