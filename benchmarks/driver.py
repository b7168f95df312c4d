"""Measurement of a case: the time of all peers, interleaved in one process, or a peer alone."""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import synface_kernels as sk
from synface_kernels.testing import peak_bytes, peak_cuda_bytes

from . import machine
from .cases import Case, cases
from .clock import seconds_of
from .peers import PEERS, Peer, find
from .process import ROUNDS, RUNNING, write_json
from .pytest_results import without_folders
from .workloads import WORKLOADS, Step, Workload

# Rounds end after so many seconds, if there were that many.
MEASURING_SECONDS, ROUNDS_MIN = 6.0, 5
# A GPU's compiled peers need about so many seconds: those that have less are not begun.
COMPILE_SECONDS = 25.0
# Of a GPU's memory: where more is reserved, peers free theirs after each turn.
CROWDED_SHARE = 0.5
# Takes a peer's name before each of its steps.
Announce = Callable[[str], object]


class TooSlow(Exception):
    """Error for a peer whose rounds would take longer than its limit."""


def measure_time(
    case: Case,
    device: torch.device,
    *,
    peers: Sequence[Peer] | None = None,
    rounds: int = ROUNDS,
    seconds: float = float("inf"),
    enough_seconds: float = MEASURING_SECONDS,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
    announce: Announce = lambda name: None,
    without: Mapping[str, str] | None = None,
    settle: bool = False,
) -> dict[str, Any]:
    """Time a step of every peer of a case, interleaved, in this process.

    Args:
        peers: what to measure; by default all peers of the op.
        rounds: how often each peer runs, after two warm-up runs; less often where that takes long.
        seconds: the time limit.
        enough_seconds: the time after which rounds end, if there were `ROUNDS_MIN`.
        save: is called with the result so far after every round.
        announce: is called with a peer's name before each of its steps.
        without: peers that are not to run, and why not.
        settle: run each step once more before it is timed, so that it does not pay for what another
            peer left in the caches: writing that back takes as long as a short step.

    Returns:
        The case, and for each peer its median seconds, its ratio to ours (the median of the
        rounds' ratios, and the least and the greatest), peak bytes (on a GPU), or why it was not
        measured.
    """
    start = time.monotonic()

    def left() -> float:
        return seconds - (time.monotonic() - start)

    # A GPU's time hardly depends on other programs' use of the processors; a dry run's is not read.
    at_once = device.type == "cuda" or case.suite == "dry"
    idle = machine.idle_check(0.1 if at_once else 1.0)
    if not idle["idle"]:
        print(f"WARNING: other programs keep {idle['busy_cores']} cores busy", file=sys.stderr)
    peers = PEERS[case.op] if peers is None else peers
    why_not = dict(without or {})
    memory: dict[str, int] = {}
    steps: dict[str, Step] = {}
    work, reason = _workload(case, device)
    # Compilation may take all of the time that is left.
    for peer in sorted(peers, key=lambda each: each.compiled):
        if peer.name in why_not:
            continue
        if work is None:
            why_not[peer.name] = reason
            continue
        if device.type == "cuda" and peer.compiled and left() < COMPILE_SECONDS:
            why_not[peer.name] = f"less than {COMPILE_SECONDS:.0f} s were left to compile it"
            continue
        try:
            with time_limit(0.6 * left()):
                steps[peer.name] = prepare(peer, case, work, device, announce)
                if device.type == "cuda":
                    work.release()
                    memory[peer.name] = peak_cuda_bytes(steps[peer.name])
        except Exception as error:  # a peer's failure is reported, and the others continue
            steps.pop(peer.name, None)
            why_not[peer.name] = brief(error)
            _check_device(device, peer.name, error)
        _free(work, device)

    steps = {peer.name: steps[peer.name] for peer in peers if peer.name in steps}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    result: dict[str, Any] = {}
    done, slowest, spent = 0, 0.0, 0.0
    while True:
        result = {
            "op": case.op,
            "name": case.name,
            "shape": dict(case.shape),
            "dtype": case.dtype,
            "options": list(case.options),
            "implementation": sk.explain(case.op, device=device, dtype=case.torch_dtype).impl,
            "flops": case.flops,
            "bytes": case.bytes,
            "gemm_dtype": str(case.gemm_dtype).removeprefix("torch."),
            "rounds": done,
            **idle,
            "peers": [_row(peer, case, samples, memory, why_not) for peer in peers],
        }
        save(result)
        enough = done == rounds or (done >= ROUNDS_MIN and spent > enough_seconds)
        if work is None or not steps or enough or left() < 1.2 * slowest:
            return result
        began = time.monotonic()
        names = list(steps)
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            announce(name)
            try:
                if settle:
                    steps[name]()
                    work.clear_gradients()
                samples[name].append(seconds_of(steps[name], device, work.clear_gradients))
            except Exception as error:  # such as memory that the others' buffers take
                del steps[name], samples[name]
                why_not[name] = brief(error)
                _check_device(device, name, error)
            work.clear_gradients()
            if _is_crowded(device):
                _free(work, device)
        done += 1
        taken = time.monotonic() - began
        slowest, spent = max(slowest, taken), spent + taken


def _check_device(device: torch.device, name: str, error: Exception) -> None:
    """Raise RuntimeError where a peer's failure left a GPU that does nothing any more."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            raise RuntimeError(f"{name} left the GPU unusable: {brief(error)}") from error


def _is_crowded(device: torch.device) -> bool:
    """Return whether what peers leave behind takes so much of a GPU that others may lack it."""
    if device.type != "cuda":
        return False
    total = torch.cuda.get_device_properties(device).total_memory
    return torch.cuda.memory_reserved(device) > CROWDED_SHARE * total


def _free(work: Workload | None, device: torch.device) -> None:
    """Free what a peer left behind."""
    if work is not None:
        work.release()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _workload(case: Case, device: torch.device) -> tuple[Workload | None, str]:
    needed = case.bytes  # a lower bound: inputs and results
    available = machine.available_memory(device)
    if needed > available:
        return None, _too_large(needed, available)
    return WORKLOADS[case.op](case, device), ""


def prepare(
    peer: Peer,
    case: Case,
    work: Workload,
    device: torch.device,
    announce: Announce = lambda name: None,
    *,
    rounds: int = 1,
    limit: float = float("inf"),
) -> Step:
    """Return a peer's step after two warm-up runs; raise if it is missing or would not fit.

    Raises:
        TooSlow: if the first run, which may compile, took more seconds than the limit, or if so
            many rounds of the second one would.
    """
    needed, available = peer.needs(case), machine.available_memory(device)
    if needed > available and device.type != "cuda":  # a GPU's allocator raises
        raise MemoryError(_too_large(needed, available))
    announce(peer.name)
    began = time.perf_counter()
    step = peer.build(work)
    for which, times in (("the first step", 1), ("one step", rounds)):
        work.clear_gradients()
        step()
        taken = time.perf_counter() - began
        if taken * times > limit:
            allowed = f"limit {limit:.3g} s" + (f" for {times} rounds" if times > 1 else "")
            raise TooSlow(f"{which} took {taken:.3g} s, {allowed}")
        announce(peer.name)
        began = time.perf_counter()
    return step


def _too_large(needed: int, available: int) -> str:
    return f"would need {needed / 2**30:.1f} GiB, {available / 2**30:.1f} are free"


def brief(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    message = without_folders(str(error)).strip().split("\n")[0][:200]
    plain = isinstance(error, (MemoryError, TooSlow))
    return message if plain else f"{type(error).__name__}: {message}"


def _row(
    peer: Peer,
    case: Case,
    samples: dict[str, list[float]],
    memory: dict[str, int],
    why_not: dict[str, str],
) -> dict[str, Any]:
    row: dict[str, Any] = {"peer": peer.name, "label": peer.label}
    times = samples.get(peer.name)
    if not times:
        return {**row, "not_measured": why_not.get(peer.name, "no time was left")}
    row["seconds"] = statistics.median(times)
    row["tflop_per_second"] = case.flops / row["seconds"] / 1e12
    row["gigabyte_per_second"] = case.bytes / row["seconds"] / 1e9
    ours = samples.get("ours")
    if ours:
        ratios = [theirs / mine for theirs, mine in zip(times, ours, strict=True)]
        row["ratio"] = statistics.median(ratios)
        row["ratio_range"] = [min(ratios), max(ratios)]
    if peer.name in memory:
        row["peak_bytes"] = memory[peer.name]
    return row


def under_pytest(benchmark: Any, case: Case, peer: Peer) -> None:
    """Run a peer's step on the CPU under pytest-benchmark."""
    import pytest

    device = torch.device("cpu")
    work = WORKLOADS[case.op](case, device)
    try:
        step = prepare(peer, case, work, device)
    except Exception as error:
        pytest.skip(f"not measured: {error}")
    benchmark.pedantic(step, setup=work.clear_gradients, rounds=5)


def measure_memory(
    case: Case, peer: Peer, announce: Announce = lambda name: None, **limits: Any
) -> dict[str, Any]:
    """Measure the peak resident memory of a step on the CPU, above that before it.

    The warm-up steps load code and buffers that stay in memory; ``limits`` are those of `prepare`.
    """
    device = torch.device("cpu")
    work, reason = _workload(case, device)
    if work is None:
        return {"not_measured": reason}
    try:
        step = prepare(peer, case, work, device, announce, **limits)
        work.release()
        return {"peak_bytes": peak_bytes(step)}
    except Exception as error:
        return {"not_measured": brief(error)}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once the time is over."""
    if seconds == float("inf"):
        yield
        return

    def stop(_signal: int, _frame: object) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    if seconds <= 0:
        raise TimeoutError("no time was left")
    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure one case on the CPU.")
    parser.add_argument("op")
    parser.add_argument("suite")
    parser.add_argument("index", type=int)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--alone", metavar="PEER", help="Measure only this peer's memory.")
    parser.add_argument("--limit", type=float, default=float("inf"), help="Seconds of its rounds.")
    parser.add_argument("--without", type=json.loads, help="Peers not to run, and why not.")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    case = cases(args.suite, args.op)[args.index]
    running = args.output.with_name(RUNNING)

    def save(result: dict[str, Any]) -> None:
        write_json(args.output, result)

    if args.alone:
        peer, limits = find(case.op, args.alone), {"rounds": args.rounds, "limit": args.limit}
        result = measure_memory(case, peer, running.write_text, **limits)
    else:
        result = measure_time(
            case,
            torch.device("cpu"),
            rounds=args.rounds,
            save=save,
            announce=running.write_text,
            without=args.without,
        )
    running.write_text("")
    save(result)


if __name__ == "__main__":
    main()
