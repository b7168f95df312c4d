"""The training layer on a GPU, against the CPU and itself. Run by `make gpu-training`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.gpu.on_device import DEVICE, DRY, F32, F64, needs_device, no_host_sync, pick

loop = pytest.importorskip("synface.training.loop")
from synface.data import embedded_faces  # noqa: E402
from synface.data.mixing import IdentityMixup  # noqa: E402
from synface.evaluation import embed, verify  # noqa: E402
from synface.inference import load  # noqa: E402
from synface.recipes.generated import identities  # noqa: E402
from synface.synthesis import GeneratedSource, HeadGenerator  # noqa: E402
from synface.synthesis.packing import PackConfig, Packer  # noqa: E402
from synface.training import TrainConfig, train  # noqa: E402
from synface.training.sources import MixedSource  # noqa: E402

from tests.helpers.training import STEPS, same, state  # noqa: E402

pytestmark = needs_device
# A small rate: training amplifies the difference of two devices' rounding.
CONFIG = TrainConfig(
    epochs=2, batch_size=8, embedding_size=16, widths=(8, 16), depths=(1, 1), lr=0.01
)
SETTINGS: dict[str, dict[str, Any]] = STEPS | {
    "bfloat16": {"precision": "bfloat16"},
    "mixed": {},
    "generated": {},
}
each_setting = pytest.mark.parametrize("name", SETTINGS)


def source_of(name: str, device: str = DEVICE) -> Any:
    """Return faces of 12 people, mixed with others or drawn on a device, by the setting's name."""
    faces = embedded_faces(2, 16, identities=12)
    if name == "mixed":
        return MixedSource(faces, embedded_faces(4, 16, seed=1, identities=3), workers=1)
    if name == "generated":
        points, generator = identities(12, 64, seed=1), HeadGenerator(64, 16, device=device)
        return GeneratedSource(points, generator, 2, identity_mixup=IdentityMixup())
    return faces


def config_of(name: str) -> TrainConfig:
    return replace(CONFIG, **SETTINGS[name])


@pytest.fixture
def no_tf32(monkeypatch):
    """Convolutions in float32, as on the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.usefixtures("no_tf32")
@each_setting
def test_the_losses_of_the_cpu(name, tmp_path):
    """The first steps: each differs by rounding, and later ones by what becomes of that."""
    config = replace(config_of(name), epochs=1)
    found = train(config, source_of(name), tmp_path / "gpu", device=DEVICE)
    expected = train(config, source_of(name, "cpu"), tmp_path / "cpu", device="cpu")
    assert found.head.weight.device.type == DEVICE
    losses = [[row["loss"] for row in each.history] for each in (found, expected)]
    assert len(losses[0]) == 3
    rounded = name in ("bfloat16", "generated")  # whose pixels are rounded from the GPU's colors
    assert losses[0] == pytest.approx(losses[1], rel=0.02 if rounded else 2e-3)


@each_setting
def test_resuming_is_bitwise_the_uninterrupted_run(name, tmp_path):
    config = config_of(name)
    whole = train(config, source_of(name), tmp_path / "whole", device=DEVICE)
    train(config, source_of(name), tmp_path / "cut", stop_after=3, device=DEVICE)
    resumed = train(config, source_of(name), tmp_path / "cut", resume=True, device=DEVICE)
    assert same(state(whole), state(resumed))
    assert whole.history == resumed.history


@each_setting
def test_a_step_never_waits_for_the_gpu(name, tmp_path, monkeypatch):
    """The third step and those after it; the first ones compile, allocate and choose."""
    take: Callable[..., int] = loop._Training.step
    watched = []

    def step(self: Any, number: int, *args: Any) -> int:
        if DRY or number < 2:
            return take(self, number, *args)
        watched.append(number)
        with no_host_sync():
            return take(self, number, *args)

    monkeypatch.setattr(loop._Training, "step", step)
    config = replace(config_of(name), checkpoint_every=100)
    train(config, source_of(name), tmp_path, device=DEVICE)
    assert DRY or watched == [2, 3, 4, 5]


@pytest.mark.usefixtures("no_tf32")
def test_a_run_of_the_gpu_is_read_and_verified_on_both_devices(tmp_path):
    faces = source_of("dense")
    train(CONFIG, faces, tmp_path, device=DEVICE)
    rows = [
        embed(load(tmp_path, device=device).backbone, faces.images, device=device)
        for device in (DEVICE, "cpu")
    ]
    there, here = (F.normalize(each.cpu().double()) for each in rows)
    assert ((there * here).sum(1) > 0.9999).all()
    found, expected = (verify(each, torch.as_tensor(faces.labels).to(each.device)) for each in rows)
    assert found.auc == pytest.approx(expected.auc, abs=0.01)


# ---- packing and faces ---------------------------------------------------------------------------

PACKINGS: dict[str, dict[str, Any]] = {
    "lse": {"steps": 60},
    "in batches": {"objective": "lse", "batch": 100, "steps": 60},
    "hyperface": {"steps": 60},
    "langevin": {"steps": 60},
    "orbit": {"steps": 60},
}


@pytest.mark.parametrize("name", PACKINGS)
def test_a_packing_is_as_good_as_the_cpus_and_resumes_bitwise(name, tmp_path):
    count = pick(2000, 320)
    config = PackConfig(count, 16, **{"objective": name} | PACKINGS[name])
    packed = Packer(config, device=DEVICE).run()
    points = packed.points.to("cpu", F64)
    cosines = points @ points.T
    worst = float(cosines.fill_diagonal_(-1).max())
    assert packed.worst == pytest.approx(worst, abs=1e-6)
    assert packed.worst <= Packer(config, device="cpu").run().worst + 0.03
    with pytest.raises(KeyboardInterrupt):
        Packer(config, device=DEVICE).run(tmp_path, stop_after=30)
    resumed = Packer(config, device=DEVICE).run(tmp_path, resume=True)
    assert torch.equal(resumed.points, packed.points)


def test_a_gallery_is_kept_near():
    generator = torch.Generator().manual_seed(0)
    gallery = F.normalize(torch.randn(50, 16, generator=generator, dtype=F32))
    config = PackConfig(pick(2000, 320), 16, "lse", steps=40, alpha=0.5)
    found, free = (Packer(config, gallery=each, device=DEVICE).run() for each in (gallery, None))
    near = [(each.points.cpu().float() @ gallery.T).amax(1).mean() for each in (found, free)]
    assert near[0] > near[1]


def test_heads_are_drawn_as_on_the_cpu():
    def images(device: str) -> torch.Tensor:
        generator = HeadGenerator(64, 48, channels=3, device=device)
        return GeneratedSource(identities(8, 64, seed=2), generator, 2).faces().images.cpu()

    difference = (images(DEVICE).float() - images("cpu").float()).abs()
    assert difference.mean() < 0.5  # of 255 levels: an edge may fall on another pixel
