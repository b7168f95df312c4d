"""The loops of `synface bench training` make the host wait for a GPU between their turns alone.

Runs on a stand-in for a GPU (tests/helpers/stand_in_gpu.py) with interpreted kernels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from synface.bench import loaders, loops, training
from synface.bench.loops import SpeedConfig
from synface.bench.meter import PHASES, Meter
from synface.common.rng import generator, normals, seeded
from synface.data import read_folder
from synface.data.formats.image_set import LabeledImages
from synface.data.loading import pool
from synface.data.mixing.ratios import send
from synface.training import loop

from tests.helpers.stand_in_gpu import stand_in_gpu

CONFIG = SpeedConfig(
    "iresnet", (16, 16), 8, 20, 8, (30,), workers=1, rounds=2, device="cuda"
)  # fmt: skip


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Return the stand-in's context, where a step takes so long that a turn has two."""
    monkeypatch.setattr(loops, "STEPS", 2)
    monkeypatch.setattr(loop, "check_device", torch.device)
    monkeypatch.setattr(loop, "seeded", lambda seed, device: seeded(seed))
    monkeypatch.setattr(pool._Resources, "pin", lambda self, array: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(loop._Training, "save", lambda self, steps: self.finish())
    for module in (loops, training):  # the stand-in has no generator
        monkeypatch.setattr(module, "generator", lambda *names: generator(*names[:3]))
        monkeypatch.setattr(
            module, "normals", lambda shape, draw: send(normals(shape, draw), CONFIG.on)
        )
    return stand_in_gpu


def images(folder: Path, in_memory: bool) -> LabeledImages:
    found = loaders.whole_batches(loaders.write_faces(folder, (16, 16), 20), 8)
    return read_folder(found, (16, 16), False) if in_memory else found


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")  # of a machine without a GPU
def test_no_step_of_a_turn_waits(
    in_memory: bool, tmp_path: Path, gpu: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, marks = images(tmp_path / "faces", in_memory), list[int]()
    with gpu() as mode:

        class Watched(loops.Turn):
            def __init__(self, meter: Meter) -> None:
                super().__init__(meter)
                marks.append(len(mode.waits))

            def end(self) -> list[dict[str, float]]:
                assert mode.waits[marks.pop() :] == []
                return super().end()

        monkeypatch.setattr(loops, "Turn", Watched)
        more = iter([True, False])
        race = loops.race(CONFIG, found, tmp_path / "run", lambda _: next(more), lambda: None)
    assert not race.failed
    result = race.result()
    for name in loops.LOOPS:
        assert len(race.rates[name]) == 2
        assert len(race.phases[name]) == 4
        assert set(result["seconds"][name]) == set(PHASES)
        assert min(result["seconds"][name].values()) >= -1e-6
    assert race.untimed == (0 if in_memory else 2 * CONFIG.workers + 1)
    assert set(result["memory"]) == set(loops.LOOPS)
    assert result["float32"]["matmul_precision"] == "highest"


def test_heads_wait_at_the_ends_of_a_turn(
    gpu: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, measured = images(tmp_path, True), training._seconds
    with gpu() as mode:

        def watched(step: Callable[[], None], steps: int, meter: Meter) -> float:
            before = len(mode.waits)
            seconds = measured(step, steps, meter)
            waits = mode.waits[before:]
            assert len(waits) == 2
            assert all(each.startswith("synchronize") for each in waits)
            return seconds

        monkeypatch.setattr(training, "_seconds", watched)
        row = training._heads(CONFIG, found, 30, torch.float32, lambda: True)
    assert set(row["seconds"]) == set(training.HEADS) == set(row["times"])
    assert all(len(each) == CONFIG.rounds for each in row["times"].values())
