"""The device of the GPU tests: a GPU, or the CPU with Triton's interpreter and tiny shapes.

The interpreter runs the same tests with TRITON_INTERPRET=1, so that no test is first run on a GPU;
there are no graphs, streams and asynchronous errors then, only what surrounds them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from synface_kernels.testing import peak_cuda_bytes

T = TypeVar("T")
F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
EPS = torch.finfo(F32).eps
DRY = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if DRY else "cuda"

needs_device = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DRY and not torch.cuda.is_available(), reason="torch sees no GPU"),
]


def pick(on_gpu: T, dry: T) -> T:
    """Return the value for a GPU, or the one for the interpreter, which is slow."""
    return dry if DRY else on_gpu


def rng(seed: int, device: str = DEVICE) -> torch.Generator:
    """Return a seeded generator."""
    return torch.Generator(device).manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = F32, device: str = DEVICE) -> Tensor:
    """Return normal random numbers, drawn in float32."""
    return torch.randn(shape, generator=rng(seed, device), device=device).to(dtype)


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Assert that tensors have the same bits."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype
        assert torch.equal(a, e), f"tensor {i}: {(a != e).sum()} of {a.numel()} elements differ"


def is_lost() -> bool:
    """Return whether a kernel's fault has left the GPU unusable for this process."""
    if DRY or not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


@contextmanager
def no_host_sync() -> Iterator[None]:
    """Make each synchronization of the host with the GPU an error in the block."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def assert_no_host_sync(step: Callable[[], object]) -> None:
    """Assert that a step, after one to warm up, never waits for the GPU."""
    step()
    if not DRY:  # on a CPU there is nothing to notice
        with no_host_sync():
            step()


@contextmanager
def _told_to_be_captured() -> Iterator[None]:
    """Let the ops refuse on a CPU what they refuse in a capture."""
    with ExitStack() as patches:
        for name, module in list(sys.modules.items()):
            if name.startswith("synface_kernels.") and hasattr(module, "capturing"):
                patches.enter_context(mock.patch.object(module, "capturing", return_value=True))
        yield


def replayed(
    step: Callable[[], Sequence[Tensor]],
    restore: Callable[[], object] = lambda: None,
    generators: Sequence[torch.Generator] = (),
) -> list[Tensor]:
    """Capture a step in a CUDA graph, replay it twice and return the last replay's results.

    Args:
        restore: resets what the step writes, before it is captured and before each replay.
        generators: the random number generators that the step draws from.
    """
    if DRY:
        step()
        restore()
        with _told_to_be_captured():
            return [t.clone() for t in step()]
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    restore()
    with torch.cuda.graph(graph):
        results = step()
    for _ in range(2):
        restore()
        graph.replay()
    torch.cuda.synchronize()
    return [t.clone() for t in results]


def peak_bytes(step: Callable[[], object]) -> int:
    """Return the peak of torch's memory on the GPU in a step, above that before it; 0 on a CPU."""
    if DRY:
        step()
        return 0
    return peak_cuda_bytes(step)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function as one graph; in the interpreter without code generation."""
    torch.compiler.reset()
    return torch.compile(function, fullgraph=True, backend=pick("inductor", "aot_eager"))


def on_another_device(run: Callable[[str], Sequence[Tensor]]) -> None:
    """Assert that ``run(device)`` on a GPU that is not current gives what it gives on this one."""
    if DRY or torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    assert torch.cuda.current_device() == 0
    assert_same([t.to("cuda:0") for t in run("cuda:1")], run("cuda:0"))


@contextmanager
def one_process_group() -> Iterator[Any]:
    """Run the block with a process group of this process alone, NCCL's on a GPU."""
    backend, device = pick(("nccl", torch.device("cuda", 0)), ("gloo", None))
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=device)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def autocast(dtype: torch.dtype | None) -> Any:
    """Return torch.autocast to a dtype, or a context that does nothing."""
    return nullcontext() if dtype is None else torch.autocast(DEVICE, dtype)
