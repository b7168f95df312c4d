"""Blocks, warps and stages of the margin softmax's GEMM kernels: candidates, and the time by each.

The blocks in `config_triton` are to be chosen by these times. A candidate is timed in the pass that
its kernel is part of, the other kernels with their own blocks.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from synface_kernels.ops._triton import chip_of
from synface_kernels.ops.margin_cross_entropy import launch_triton
from synface_kernels.ops.margin_cross_entropy.config_triton import (
    block_config,
    choose_gemms,
    grad_weight_config,
)
from synface_kernels.ops.margin_cross_entropy.interface import BackwardInputs, ForwardInputs

from . import driver
from .cases import Case, cases
from .interleave import samples
from .margin_peers import SCALE
from .workloads import MarginWorkload

Blocks = dict[str, int]
# The blocks of some kernels; the others have their own.
Setting = dict[str, Blocks]
NAMES = ("H", "BLOCK_N", "BLOCK_C", "BLOCK_D", "num_warps", "num_stages")
# In the order of NAMES, for 16-bit GEMMs at D = 512. None spilled for sm_90, by Triton 3.6.0 and
# 3.7.1; those of 4 warps take half of a multiprocessor's registers, and less of its shared memory.
_LOGITS = [
    (2, 128, 128, 64, 8, 2), (2, 128, 128, 64, 8, 3), (2, 128, 128, 64, 8, 4),
    (2, 128, 128, 128, 8, 2), (1, 128, 128, 64, 8, 4), (1, 128, 128, 128, 8, 3),
    (1, 64, 256, 64, 8, 3), (2, 128, 64, 64, 4, 3), (1, 128, 64, 64, 4, 4), (2, 64, 128, 64, 4, 2),
    (2, 64, 128, 32, 4, 4), (1, 64, 128, 64, 4, 4),
]  # fmt: skip
CANDIDATES = {
    "lse": _LOGITS,
    "factor": _LOGITS,
    "grad_weight": [
        (2, 64, 128, 128, 8, 2), (2, 64, 128, 128, 8, 3), (2, 64, 128, 128, 8, 4),
        (2, 32, 128, 128, 8, 4), (2, 128, 128, 128, 8, 2), (1, 64, 128, 128, 8, 4),
        (1, 64, 128, 256, 8, 3), (2, 64, 64, 256, 8, 3), (2, 64, 64, 128, 4, 2),
        (2, 32, 64, 128, 4, 4), (2, 64, 128, 64, 4, 3), (1, 64, 64, 128, 4, 4),
    ],
}  # fmt: skip


def candidates(kernel: str, n: int, default: Blocks) -> list[Blocks]:
    """Return a kernel's blocks for a batch of n, the default first.

    The weight gradient's steps fit every block of rows where n is a multiple of 128, or below.
    """
    rows = max(16, triton.next_power_of_2(n))
    tried = [dict(zip(NAMES, values, strict=True)) for values in CANDIDATES[kernel]]
    tried = [blocks | {"BLOCK_N": min(blocks["BLOCK_N"], rows)} for blocks in tried]
    return [default, *(blocks for blocks in tried if blocks != default)]


class Passes:
    """The passes of a case's step, each with blocks of one's choice.

    Attributes:
        defaults: each kernel's blocks.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        work = MarginWorkload(case, device)
        n, d, self.gemm_dtype = case.shape["N"], case.shape["D"], case.autocast
        self.inputs = ForwardInputs(
            work.input.detach(), work.weight.detach(), None, work.target[:, None], SCALE, math.inf,
            needs_input_grad=True, needs_cosine_sum=False,
        )  # fmt: skip
        outputs = launch_triton.forward(self.inputs, gemm_dtype=self.gemm_dtype)
        # Of the mean loss, where the labels' probabilities are near 0.
        grads = {
            "grad_negative_lse": torch.full_like(outputs.negative_lse, 1 / n),
            "grad_target_cosine": torch.full_like(outputs.target_cosine, -SCALE / n),
            "grad_cosine_sum": outputs.cosine_sum,
        }
        known = self.inputs._asdict() | outputs._asdict() | grads
        self.gradients = BackwardInputs(**{name: known[name] for name in BackwardInputs._fields})

        gemms = choose_gemms(work.input.dtype, work.weight.dtype, self.gemm_dtype)
        logits = block_config(gemms, n, 1, True, chip_of(device))
        grad_weight = grad_weight_config(gemms, logits["BLOCK_N"], d, chip_of(device))
        self.defaults = {"lse": logits, "factor": logits, "grad_weight": grad_weight}

    def forward(self, blocks: Setting) -> list[Tensor]:
        """Run the forward pass with the default blocks but for some kernels."""
        blocks = self.defaults | blocks
        with _configured("block_config", blocks["lse"]):
            return list(launch_triton.forward(self.inputs, gemm_dtype=self.gemm_dtype))

    def backward(self, blocks: Setting) -> list[Tensor]:
        """Run the backward pass likewise."""
        blocks = self.defaults | blocks
        with (
            _configured("block_config", blocks["factor"]),
            _configured("grad_weight_config", blocks["grad_weight"]),
        ):
            return list(launch_triton.backward(self.gradients, True, gemm_dtype=self.gemm_dtype))

    def both(self, blocks: Setting) -> list[Tensor]:
        """Run both passes likewise."""
        return self.forward(blocks) + self.backward(blocks)

    def of(self, kernel: str) -> Callable[[Setting], list[Tensor]]:
        """Return the pass that a kernel is part of."""
        return self.forward if kernel == "lse" else self.backward


def _configured(function: str, blocks: Blocks) -> Any:
    """Return a context in which the launcher gets these blocks from one of its functions."""
    return mock.patch.object(launch_triton, function, return_value=blocks)


def compile_ahead(runs: Iterable[Callable[[], object]]) -> None:
    """Compile the kernels of some runs in threads, and launch none; errors come at a launch."""

    def compile_only(kernel: Any, grid: Any, *args: Any, **config: Any) -> None:
        kernel.warmup(*args, grid=grid, **config)

    with (
        ThreadPoolExecutor() as threads,
        triton.AsyncCompileMode(threads, ignore_errors=True),
        mock.patch.object(launch_triton, "launch", compile_only),
    ):
        for run in runs:
            with suppress(Exception):
                run()


def difference(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> str | None:
    """Say where a row of some results is further from that expected than roundings explain.

    Rows of 16-bit gradients may differ by two last bits, as by the GPU tests' twice plain torch's
    error; float32 statistics by what a last bit of the largest cosine makes of a logit.
    """
    for a, e in zip(actual, expected, strict=True):
        last_bit = torch.finfo(e.dtype if e.dtype.itemsize == 2 else torch.float32).eps
        allowed = last_bit * (2 if e.dtype.itemsize == 2 else SCALE)
        a, e = (t.flatten(1) if t.dim() > 1 else t[:, None] for t in (a, e))
        off, size = (torch.linalg.vector_norm(t, dim=1, dtype=torch.float64) for t in (a - e, e))
        wrong = ~(off <= allowed * size)  # also for a NaN
        if wrong.any():
            worst = (off / size)[wrong].max().item()
            return f"a row differs from the default's by {worst:.2g} of it, allowed {allowed:.2g}"
    return None


def measure(
    device: torch.device,
    *,
    save: Callable[[dict[str, Any]], None],
    seconds: float,
    op: str,
    suite: str,
    index: int,
    rounds: int,
    most: int | None = None,
) -> dict[str, Any]:
    """Time each kernel's candidates, at most so many, and then the fastest of all kernels together.

    Returns:
        ``settings``: a row for each kernel and its blocks, with the time of its pass and the ratio
        to that of the default's, or why it was not measured, as where its results differ.
        ``fastest``: each kernel's fastest blocks. ``together``: both passes by these and by the
        default.
    """
    began, case = time.monotonic(), cases(suite, op)[index]
    passes = Passes(case, device)
    tried = {
        kernel: candidates(kernel, case.shape["N"], default)[:most]
        for kernel, default in passes.defaults.items()
    }
    compile_ahead(
        partial(passes.of(kernel), {kernel: blocks})
        for kernel, found in tried.items()
        for blocks in found
    )
    result: dict[str, Any] = {"op": op, "name": case.name, "settings": [], "fastest": {}}
    with driver.time_limit(seconds - (time.monotonic() - began)):
        for kernel, found in tried.items():
            rows = _timed(passes.of(kernel), [{kernel: blocks} for blocks in found], rounds, device)
            rows = [
                {"kernel": kernel, "blocks": blocks, **row}
                for blocks, row in zip(found, rows, strict=True)
            ]
            fastest = min((row for row in rows if "seconds" in row), key=lambda row: row["seconds"])
            result["settings"] += rows
            result["fastest"][kernel] = fastest["blocks"]
            save(result)
        default, together = _timed(passes.both, [{}, result["fastest"]], rounds, device)
    return result | {"together": {"default_seconds": default["seconds"], **together}}


def _timed(
    run: Callable[[Setting], list[Tensor]],
    settings: list[Setting],
    rounds: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Time a run by settings, interleaved; one whose results are not the first's is not timed."""
    rows: list[dict[str, Any]] = [{} for _ in settings]
    expected = run(settings[0])
    for row, setting in zip(rows, settings, strict=True):
        try:
            problem = difference(run(setting), expected)
        except TimeoutError:
            raise
        except Exception as error:  # of a candidate that needs more than the chip has
            problem = driver.brief(error)
        if problem:
            row["not_measured"] = problem
    steps = {
        str(number): partial(run, setting)
        for number, setting in enumerate(settings)
        if "not_measured" not in rows[number]
    }
    times = samples(steps, rounds, device)
    for number, found in times.items():
        ratios = [mine / first for mine, first in zip(found, times["0"], strict=True)]
        rows[int(number)] |= {
            "seconds": statistics.median(found),
            "ratio": statistics.median(ratios),
        }
    return rows
