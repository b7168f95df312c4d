"""Time and memory of the margin softmax, fused and in plain torch.

python -m synface.bench.measure eager 256 256 100000    (peak memory of one, in its own process)
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import synface_kernels as sk
from synface_kernels.testing import peak_bytes

from ..common.rng import normals

METHODS = ("fused", "eager", "torch.compile")


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
    logits = cosine.scatter(1, target[:, None], (own.acos() + 0.5).cos())
    return F.cross_entropy(64 * logits, target)


def step(method: str, workload: Workload) -> Callable[[], tuple[Tensor, ...]]:
    """Return a function that computes the loss and both gradients, and stores none of them."""
    x, w, target = workload.tensors()
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


def time_all(
    workload: Workload, rounds: int = 3, done: Callable[[str], None] = lambda method: None
) -> dict[str, Any]:
    """Return each method's median seconds, interleaved in one process, or why it has none.

    A method whose loss or gradients differ from eager's by more than 1e-3 of their norm is not
    timed.
    """
    expected = step("eager", workload)()
    steps: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    result: dict[str, Any] = {}
    for method in METHODS:
        try:
            steps[method] = step(method, workload)
            if not _close(steps[method](), expected):  # the first call also compiles
                raise ArithmeticError("its loss or gradients differ from eager torch's")
        except Exception as error:  # such as no C++ compiler: report it, and time the others
            steps.pop(method, None)
            result[method] = f"not measured: {type(error).__name__}: {str(error).splitlines()[0]}"
        done(method)
    del expected
    samples: dict[str, list[float]] = {method: [] for method in steps}
    for _ in range(rounds):
        for method, run in steps.items():
            began = time.perf_counter()
            run()
            samples[method].append(time.perf_counter() - began)
            done(method)
    return result | {method: statistics.median(times) for method, times in samples.items()}


def peak_memory(method: str, workload: Workload) -> int | str:
    """Return the peak bytes above the inputs, gradients included, of a separate process (Linux)."""
    command = [sys.executable, "-m", "synface.bench.measure", method]
    command += [str(size) for size in asdict(workload).values()]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode:
        lines = child.stderr.strip().splitlines()
        return f"not measured: {lines[-1] if lines else f'exit status {child.returncode}'}"
    return int(json.loads(child.stdout))


if __name__ == "__main__":
    timed = step(sys.argv[1], Workload(*map(int, sys.argv[2:5])))
    timed()  # one-time loading and compilation is not measured
    print(peak_bytes(timed))
