"""Benchmark of the domain mixup against its peers.

`python -m benchmarks.bench_domain_mixup` interleaves them and prints ratios; with `--linear` it
prints our time per image for batches of 1 to 4096 instead. `pytest benchmarks --benchmark-only`
runs the same steps under pytest-benchmark, one by one.
"""

import statistics
import sys
from collections.abc import Iterable
from typing import Any

import torch

from . import run, table, verify
from .cases import Case, cases, domain_mixup
from .driver import prepare, seconds_of, under_pytest
from .peers import PEERS, Peer, find
from .workloads import MixupWorkload

OP = "domain_mixup"


def pytest_generate_tests(metafunc: Any) -> None:
    metafunc.parametrize("case", cases("cpu", OP)[:1], ids=lambda case: case.name)
    metafunc.parametrize("peer", PEERS[OP], ids=lambda peer: peer.name)


def test_step(benchmark: Any, case: Case, peer: Peer) -> None:
    under_pytest(benchmark, case, peer)


def linear(batches: Iterable[int] = (1, 4, 16, 64, 256, 1024, 4096), rounds: int = 21) -> str:
    """Return a table of our median time on the CPU by batch size."""
    device = torch.device("cpu")
    rows = [["B", "a call", "an image"]]
    for batch in batches:
        case = domain_mixup("linear", batch, 112, "float32", "contiguous")
        work = MixupWorkload(case, device)
        step = prepare(find(OP, "ours"), case, work, device)
        seconds = statistics.median(seconds_of(step, device) for _ in range(rounds))
        rows.append([f"{batch:,}", table.duration(seconds), table.duration(seconds / batch)])
    return table.markdown(rows)


if __name__ == "__main__":
    if sys.argv[1:] == ["--linear"]:
        verify.require(OP)
        print(linear())
    else:
        run.main(OP)
