"""Benchmark of the domain mixup against its peers.

`python -m benchmarks.bench_domain_mixup` interleaves them and prints ratios;
`pytest benchmarks --benchmark-only` runs the same steps under pytest-benchmark, one by one. Our
time per image by batch is a series of `benchmarks.growth`.
"""

from typing import Any

from . import run
from .cases import Case, cases
from .driver import under_pytest
from .peers import PEERS, Peer

OP = "domain_mixup"


def pytest_generate_tests(metafunc: Any) -> None:
    metafunc.parametrize("case", cases("cpu", OP)[:1], ids=lambda case: case.name)
    metafunc.parametrize("peer", PEERS[OP], ids=lambda peer: peer.name)


def test_step(benchmark: Any, case: Case, peer: Peer) -> None:
    under_pytest(benchmark, case, peer)


if __name__ == "__main__":
    run.main(OP)
