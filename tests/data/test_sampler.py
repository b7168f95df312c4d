"""Orders of reading images: every position of every epoch, whatever was asked before."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from scipy import stats
from synface.data.loading.sampler import CycledOrder


@pytest.mark.parametrize(("synthetic", "real"), [(1, 1), (7, 3), (3, 7), (10, 5), (5, 5), (6, 1)])
def test_the_real_set_is_cycled_to_the_synthetic_ones_length(synthetic, real):
    order = CycledOrder(synthetic, real, seed=4)
    assert len(order) == synthetic
    stream: list[int] = []
    for epoch in range(6):
        first, second = order(epoch, np.arange(synthetic))
        assert sorted(first.tolist()) == list(range(synthetic))
        assert first.dtype == second.dtype == np.int64
        stream += second.tolist()
    for start in range(0, len(stream), real):  # every pass is complete before the next one begins
        part = stream[start : start + real]
        assert len(set(part)) == len(part)
        assert set(part) <= set(range(real))


def test_shuffles_differ_and_do_not_depend_on_what_was_asked_before():
    order = CycledOrder(50, 20, seed=1)
    everything = {e: order(e, np.arange(50)) for e in range(3)}
    for epoch, at in ((2, 49), (0, 3), (1, 20)):
        fresh = CycledOrder(50, 20, seed=1)(epoch, at)
        assert [int(x) for x in fresh] == [int(x[at]) for x in everything[epoch]]
    grid = np.arange(50).reshape(5, 10)[:, ::-1]
    assert np.array_equal(order(1, grid)[1], everything[1][1][grid])
    firsts = {tuple(first.tolist()) for first, _ in everything.values()}
    passes = {tuple(everything[0][1][i : i + 20].tolist()) for i in (0, 20)}
    assert len(firsts) == 3
    assert len(passes) == 2
    assert not np.array_equal(CycledOrder(50, 20, seed=2)(0, range(50))[0], everything[0][0])
    same = CycledOrder(20, 20, seed=1)(0, range(20))
    assert not np.array_equal(*same)  # a shuffle of its own
    assert [part.shape for part in order(0, [])] == [(0,), (0,)]


def test_every_order_of_three_is_as_frequent():
    counts = Counter(tuple(CycledOrder(3, 1)(e, range(3))[0].tolist()) for e in range(1200))
    assert len(counts) == 6
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CycledOrder(0, 1), ValueError, "num_synthetic must be at least 1, got 0"),
        (lambda: CycledOrder(1, 0.5), TypeError, "num_real must be an integer, got float"),
        (lambda: CycledOrder(1, 1, -1), ValueError, "seed must be at least 0, got -1"),
        (lambda: CycledOrder(4, 2)(-1, 0), ValueError, "epoch must be at least 0, got -1"),
        (lambda: CycledOrder(4, 2)(0, [0, 4]), ValueError, r"lie in \[0, 4\), got 0 to 4"),
        (lambda: CycledOrder(4, 2)(0, [0.5]), TypeError, "positions must be integers, got float"),
    ],
)
def test_order_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_order_needs_no_torch_and_is_the_same_in_every_process():
    code = """
import sys
sys.modules["torch"] = None  # importing it would raise
from synface.data.loading.sampler import CycledOrder
print([part.tolist() for part in CycledOrder(7, 3, 2**70)(5, range(7))])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = [part.tolist() for part in CycledOrder(7, 3, 2**70)(5, range(7))]
    assert run.stdout.strip() == str(here)
