"""The benchmarks tell a GPU's time, and a lost GPU, which fakes take the place of here."""

from __future__ import annotations

import pytest
import torch

from benchmarks import clock, driver

GPU = torch.device("cuda")


class FakeGpu:
    """A GPU's queue and clocks: the host takes ``host`` seconds to queue a step of ``own``."""

    def __init__(self, monkeypatch, host, own):
        self.now = self.done = 0.0
        self.host, self.own = host, own
        self.steps = 0
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(gpu.now, gpu.done)

            def elapsed_time(self, other):
                return (other.at - self.at) * 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now)

    def step(self):
        self.steps += 1
        self.now += self.host
        self.done = max(self.now, self.done) + self.own

    def wait(self, device):
        self.now = max(self.now, self.done)


@pytest.mark.parametrize(
    ("host", "own", "steps"),
    [(0.001, 0.004, 4), (0.0003, 0.0001, 28), (1e-6, 1e-6, 52), (0.01, 0.3, 2), (0.02, 0.01, 3)],
)
def test_a_gpus_step_takes_as_long_as_the_slower_of_gpu_and_host(monkeypatch, host, own, steps):
    gpu = FakeGpu(monkeypatch, host, own)
    found = clock.seconds_of(gpu.step, GPU)
    idle = host if own > clock.LONG_SECONDS else 0  # before a long step
    assert found == pytest.approx(max(host, own), abs=idle + 1e-9)
    assert gpu.steps == steps


def test_a_peer_that_leaves_the_gpu_unusable_is_named(monkeypatch):
    def lost(device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    error = ValueError("planted")
    driver._check_device(torch.device("cpu"), "ours", error)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    driver._check_device(GPU, "ours", error)
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(RuntimeError, match="ours left the GPU unusable: ValueError: planted"):
        driver._check_device(GPU, "ours", error)
