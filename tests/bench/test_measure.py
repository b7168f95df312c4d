"""The demonstration's measurements: memory includes gradients, and wrong results are not timed."""

import sys

import pytest
import torch
from synface.bench import measure
from synface.bench.measure import METHODS, Workload


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.slow
def test_the_gradients_count_as_memory():
    work = Workload(n=8, d=64, c=100_000)
    gradients = 4 * work.d * (work.n + work.c)
    fused, eager = (measure.peak_memory(method, work) for method in ("fused", "eager"))
    assert fused >= gradients
    assert eager > gradients + 4 * work.n * work.c  # its logits, at least once


def test_what_cannot_run_is_not_measured():
    peak = measure.peak_memory("fused", Workload(n=0, d=-1, c=1))
    assert isinstance(peak, str)
    assert peak.startswith("not measured: ")


def test_a_wrong_answer_is_not_timed(monkeypatch):
    right = measure.sk.margin_cross_entropy
    monkeypatch.setattr(measure.sk, "margin_cross_entropy", lambda *a: 1.01 * right(*a))
    monkeypatch.setattr(torch, "compile", lambda function: function)  # its turn, without the wait
    times = measure.time_all(Workload(n=4, d=8, c=50), rounds=1)
    assert times.keys() == set(METHODS)
    assert times["fused"].startswith("not measured: ArithmeticError: its loss or gradients differ")
    assert times["eager"] > 0
