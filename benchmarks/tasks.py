"""Tasks of a measuring process of `make gpu-evidence`; each returns a JSON object."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from synface_kernels.testing import peak_cuda_bytes

from . import ceilings, driver, machine
from .cases import Case, cases
from .interleave import samples
from .peers import find
from .workloads import WORKLOADS, Step, Workload

Save = Callable[[dict[str, Any]], None]
# The environment variable that chooses the margin softmax's design on a GPU.
DESIGN = "SYNFACE_MARGIN_DESIGN"
DESIGNS = ("fused", "tiled")
# Rounds of a case end after so many seconds: a GPU's times are steady.
ENOUGH_SECONDS = 2.0
# Characters of a kernel's name that are kept.
NAME_MAX = 120
TOP_KERNELS = 40


def describe(device: torch.device, *, save: Save, seconds: float) -> dict[str, Any]:
    """Describe the machine."""
    return machine.describe(device)


def measure_ceilings(
    device: torch.device, *, save: Save, seconds: float, **sizes: int
) -> dict[str, Any]:
    """Measure the device's ceilings."""
    return ceilings.measure(device, **sizes)


def warm_up(device: torch.device, *, save: Save, seconds: float) -> dict[str, Any]:
    """Compile something small: the first use of torch.compile takes seconds that no peer's are."""
    x = torch.ones(8, device=device, requires_grad=True)
    torch.compile(lambda x: (x * 2).sum())(x).backward()
    return {}


def measure_case(
    device: torch.device,
    *,
    save: Save,
    seconds: float,
    op: str,
    suite: str,
    index: int,
    rounds: int,
) -> dict[str, Any]:
    """Time a case's peers, interleaved."""
    torch.compiler.reset()
    case = cases(suite, op)[index]
    return driver.measure_time(
        case, device, rounds=rounds, seconds=seconds, enough_seconds=ENOUGH_SECONDS, save=save
    )


# ---- kernels of one step -------------------------------------------------------------------------


def profile(
    device: torch.device,
    *,
    save: Save,
    seconds: float,
    op: str,
    suite: str,
    index: int,
    rounds: int,
    steps: int,
) -> dict[str, Any]:
    """Measure the time of each kernel of our step, its launches, and the step's own time."""
    case, work, step = _our_step(device, op, suite, index)
    median = _median(step, work, device, rounds)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    work.clear_gradients()
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(steps):
            step()
            work.clear_gradients()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    kernels = []
    for event in recorded.key_averages():
        if device.type == "cuda":
            if event.device_type == torch.autograd.DeviceType.CPU:
                continue
            microseconds = event.self_device_time_total
        else:
            microseconds = event.self_cpu_time_total
        kernels.append(
            {
                "kernel": event.key[:NAME_MAX],
                "launches": event.count / steps,
                "seconds": microseconds / steps / 1e6,
            }
        )
    result = {"op": op, "name": case.name, "step_seconds": median}
    if not kernels:
        return {**result, "not_measured": "torch's profiler recorded no kernel"}
    kernels.sort(key=lambda kernel: -kernel["seconds"])
    return {
        **result,
        "launches": sum(kernel["launches"] for kernel in kernels),
        "kernel_seconds": sum(kernel["seconds"] for kernel in kernels),
        "kernels": kernels[:TOP_KERNELS],
    }


# ---- settings of the margin softmax --------------------------------------------------------------


@contextmanager
def margin_settings(design: str, workspace_mib: int) -> Iterator[None]:
    """Run the margin softmax by one design and with one workspace.

    Modules that imported the size by name are changed too.
    """
    with ExitStack() as changed:
        changed.enter_context(mock.patch.dict(os.environ, {DESIGN: design}))
        size = workspace_mib << 20
        for name, module in list(sys.modules.items()):
            if name.startswith("synface_kernels.") and hasattr(module, "WORKSPACE_BYTES"):
                changed.enter_context(mock.patch.object(module, "WORKSPACE_BYTES", size))
        yield


def sweep(
    device: torch.device,
    *,
    save: Save,
    seconds: float,
    op: str,
    suite: str,
    index: int,
    rounds: int,
    workspaces_mib: list[int],
) -> dict[str, Any]:
    """Time our margin step by design and workspace; the results, and the fastest."""
    from synface_kernels.ops.margin_cross_entropy import launch_triton  # noqa: F401, its settings

    case, work, step = _our_step(device, op, suite, index)
    result: dict[str, Any] = {"op": op, "name": case.name, "settings": []}
    with driver.time_limit(seconds):
        for design in DESIGNS:
            for size in workspaces_mib:
                row: dict[str, Any] = {"design": design, "workspace_mib": size}
                try:
                    with margin_settings(design, size):
                        row["seconds"] = _median(step, work, device, rounds)
                        if device.type == "cuda":
                            work.release()
                            row["peak_bytes"] = peak_cuda_bytes(step)
                except TimeoutError:
                    raise
                except Exception as error:
                    row["not_measured"] = driver.brief(error)
                result["settings"].append(row)
                timed = [r for r in result["settings"] if "seconds" in r]
                if timed:
                    result["fastest"] = min(timed, key=lambda r: r["seconds"])
                save(result)
    if "fastest" not in result:
        result["not_measured"] = result["settings"][0]["not_measured"]
    return result


def sweep_blocks(device: torch.device, **arguments: Any) -> dict[str, Any]:
    """Time the margin softmax's passes by the blocks of their kernels; see `blocks`."""
    from . import blocks  # needs Triton

    return blocks.measure(device, **arguments)


# ---- a captured step -----------------------------------------------------------------------------


def replay(
    device: torch.device,
    *,
    save: Save,
    seconds: float,
    op: str,
    suite: str,
    index: int,
    rounds: int,
) -> dict[str, Any]:
    """Capture our step in a CUDA graph; time its replay beside the eager step.

    On a CPU, which has no graphs, the step itself takes the place of the replay.
    """
    case, work, step = _our_step(device, op, suite, index)
    expected = _results(step(), work)
    work.clear_gradients()
    outputs: list[Tensor | None] = []

    def captured() -> None:
        outputs[:] = [step()]

    again = _capture(captured, work) if device.type == "cuda" else captured
    again()
    got = _results(outputs[0], work)
    equal = all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    def eager() -> None:
        # The captured step's gradients are the graph's memory, which eager ones must not replace.
        kept = [parameter.grad for parameter in work.parameters]
        work.clear_gradients()
        step()
        for parameter, grad in zip(work.parameters, kept, strict=True):
            parameter.grad = grad

    times = samples({"eager": eager, "replay": again}, rounds, device)
    return {
        "op": op,
        "name": case.name,
        "eager_seconds": statistics.median(times["eager"]),
        "replay_seconds": statistics.median(times["replay"]),
        "same_bits_as_eager": equal,
    }


def _capture(step: Callable[[], object], work: Workload) -> Callable[[], object]:
    graph = torch.cuda.CUDAGraph()
    generator = getattr(work, "generator", None)
    if generator is not None:
        graph.register_generator_state(generator)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        work.clear_gradients()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _results(output: Tensor | None, work: Workload) -> list[Tensor]:
    found = [output, *(parameter.grad for parameter in work.parameters)]
    return [t.detach().clone() for t in found if t is not None]


# ---- shared --------------------------------------------------------------------------------------


def _our_step(device: torch.device, op: str, suite: str, index: int) -> tuple[Case, Workload, Step]:
    """Return a case, its workload, and our step after two warm-up runs.

    The margin softmax runs its Triton kernels, on a CPU in the interpreter.
    """
    case = cases(suite, op)[index]
    work = WORKLOADS[op](case, device)
    options = {"impl": "triton"} if op == "margin_cross_entropy" else {}
    step = find(op, "ours").build(work, **options)
    for _ in range(2):
        work.clear_gradients()
        step()
    work.clear_gradients()
    return case, work, step


def _median(step: Step, work: Workload, device: torch.device, rounds: int) -> float:
    found = samples({"step": step}, rounds, device, work.clear_gradients)
    return statistics.median(found["step"])


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "machine": describe,
    "ceilings": measure_ceilings,
    "warm_up": warm_up,
    "case": measure_case,
    "profile": profile,
    "sweep": sweep,
    "blocks": sweep_blocks,
    "replay": replay,
}
