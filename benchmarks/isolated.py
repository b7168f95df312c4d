"""Measurement of a case on the CPU in processes of its own, within limits of time.

Each peer first runs alone, in a process that measures its memory. One that is missing, too large or
too slow is left out, and one that hangs or crashes ends that process only. Then the others are
timed, interleaved in one process; if that one has to be ended, the case is timed again without the
peer that was running.
"""

from __future__ import annotations

import json
import time
from typing import Any

from .cases import Case, cases
from .peers import PEERS
from .process import run_child

DRIVER = "benchmarks.driver"
# Seconds that a peer's rounds in one case may take together, and each of its steps.
PEER_SECONDS = 120.0
NO_TIME = "no time was left"


def run_case(
    case: Case, rounds: int, *, peer_seconds: float = PEER_SECONDS, seconds: float = float("inf")
) -> dict[str, Any]:
    """Measure the memory of each peer of a case, and the time of those that are not too slow.

    Args:
        case: the case.
        rounds: how often each peer is timed.
        peer_seconds: the limit of each step, and of all rounds of a peer.
        seconds: the limit of the whole case.

    Returns:
        What `driver.measure_time` returns, with each peer's peak bytes.
    """
    end = time.monotonic() + seconds
    index = cases(case.suite, case.op).index(case)
    this = [DRIVER, case.op, case.suite, str(index), "--rounds", str(rounds)]
    peak: dict[str, int | None] = {}
    without: dict[str, str] = {}
    for peer in PEERS[case.op]:
        alone = [*this, "--alone", peer.name, "--limit", str(peer_seconds)]
        found = _within(end, alone, peer_seconds)
        reason = found.get("problem") or found.get("not_measured")
        if reason:
            without[peer.name] = reason
        else:
            peak[peer.name] = found["peak_bytes"]
    while True:
        timed = _within(end, [*this, "--without", json.dumps(without)], peer_seconds)
        culprit = timed.pop("running", None)
        if culprit is None or culprit in without or time.monotonic() >= end:
            break
        without[culprit] = timed["problem"]
    if "peers" not in timed:
        return {"op": case.op, "name": case.name, "peers": [], **timed}
    for row in timed["peers"]:
        if "not_measured" not in row:
            row["peak_bytes"] = peak[row["peer"]]
    return timed


def _within(end: float, arguments: list[str], step_seconds: float) -> dict[str, Any]:
    left = end - time.monotonic()
    if left <= 0:
        return {"not_measured": NO_TIME}
    return run_child(arguments, left, step_seconds)
