"""Packing steps on a GPU, by fake tensors, and on several ranks.

A step on a GPU has no loop over blocks of points, and the host waits for none of it.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from synface.synthesis.packing import PackConfig, Packer, bounds, objectives
from synface.synthesis.packing.optimizer import SphereAdam
from synface.synthesis.packing.search import OrbitSearch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.ranks import on_ranks

# Of these the host waits for a GPU.
WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")


class Count(TorchDispatchMode):
    """Counts operations, and collects those of which the host waits."""

    def __init__(self):
        super().__init__()
        self.operations, self.waiting = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        name = func.overloadpacket.__name__
        devices = {
            t.device.type for t in (*args, out) if isinstance(t, torch.Tensor) and t.dim() > 0
        }
        there = any(t.device.type != "cpu" for t in args if isinstance(t, torch.Tensor))
        if (name in WAITING and there) or len(devices) > 1:
            self.waiting.append(name)
        return out


def step(objective, count, batches):
    """Return the operations of a step on a GPU, and those of which the host waits."""
    batch = count // batches if batches > 1 else None
    config = PackConfig(count, 16, objective, steps=10, batch=batch)
    with FakeTensorMode():
        packer = SimpleNamespace(
            config=config,
            device=torch.device("cuda"),
            dtype=torch.float32,
            bound=bounds.best(count, 16),
            gallery=torch.empty(30, 16, device="cuda"),
            group=None,
        )
        stepper = objectives.STEPS[objective](packer)
        points = torch.empty(count, 16, device="cuda")
        with Count() as counted:
            stepper.step(points, 3, 0.3)
    return counted


@pytest.mark.parametrize(
    ("objective", "batches"), [("lse", 1), ("lse", 2), ("langevin", 1), ("hyperface", 1)]
)
def test_a_step_on_a_gpu_waits_for_nothing_and_has_no_loop_over_blocks(
    objective, batches, monkeypatch
):
    # Without a GPU torch has no generator for one, and no autograd; the op has tests of its own.
    monkeypatch.setattr(objectives, "generator", lambda *_: None)
    monkeypatch.setattr(objectives, "_gradient", lambda _, points, __: torch.empty_like(points))
    few, many = step(objective, 600, batches), step(objective, 60_000, batches)
    assert few.waiting == many.waiting == []
    assert few.operations == many.operations < 150


@pytest.mark.parametrize("done", [0.2, 0.97])
@pytest.mark.parametrize("restarts", [1, 3])
def test_an_orbit_step_on_a_device_waits_for_nothing_and_has_no_loop_over_blocks(restarts, done):
    """Take it on the meta device, whose tensors have no values to wait for."""
    for count in (36, 240, 600, 6000):
        config = PackConfig(count, 16, "orbit", steps=10, restarts=restarts).resolved()
        bound, device = bounds.best(count, 16), torch.device("meta")
        packer = SimpleNamespace(
            config=config, device=device, dtype=torch.float32, bound=bound, gallery=None
        )
        search = OrbitSearch(packer)
        if done > 0.5 and search.is_few:
            search.finishing.fill_(True)
        with Count() as counted:
            search.step(3, done)
        groups = 1 if search.finishing else len(search.codes)
        assert counted.waiting == []
        assert counted.operations / groups < 250


def test_all_rows_at_once_are_stepped_as_blocks_are(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(700, 24, generator=generator))
    gradient = torch.randn(700, 24, generator=generator)
    blocks, whole = x.clone(), x.clone()
    SphereAdam(700, 24, x.dtype, x.device).step(blocks, gradient, 0.1)
    monkeypatch.setattr("synface.synthesis.packing.optimizer.BLOCK", 700)
    SphereAdam(700, 24, x.dtype, x.device).step(whole, gradient, 0.1)
    assert (blocks - whole).abs().max() <= 1e-7
    assert (blocks - x).abs().max() > 0.01


# ---- several ranks -------------------------------------------------------------------------------

CONFIGS = {
    "lse": PackConfig(41, 6, steps=12, seed=3),
    "batch": PackConfig(41, 6, steps=12, batch=10, restarts=2),
    "hyperface": PackConfig(41, 6, "hyperface", steps=12),
    "langevin": PackConfig(41, 6, "langevin", steps=12),
}


def gallery():
    return torch.randn(30, 6, generator=torch.Generator().manual_seed(0))


def packings(rank, ranks):
    group, results = dist.group.WORLD, []
    for name, config in CONFIGS.items():
        near = gallery() if name == "lse" else None
        packed = Packer(config, gallery=near, group=group).run()
        results.append((packed.points, packed.worst, list(packed.pair)))
    return results


@pytest.mark.slow
def test_ranks_share_a_packing(tmp_path):
    first, second, third = on_ranks(3, packings, tmp_path)
    for (name, config), mine, *others in zip(CONFIGS.items(), first, second, third, strict=True):
        alone = Packer(config, gallery=gallery() if name == "lse" else None).run()
        assert torch.allclose(mine[0], alone.points, atol=1e-8), name
        assert mine[1] == pytest.approx(alone.worst, abs=1e-8)
        assert sorted(mine[2]) == sorted(alone.pair)
        for other in others:
            assert torch.equal(other[0], mine[0])
            assert other[1:] == mine[1:]


def interrupted(rank, ranks, folder):
    group, config = dist.group.WORLD, CONFIGS["lse"]
    whole = Packer(config, group=group).run()
    # One rank is interrupted, and all stop after the same step.
    with pytest.raises(KeyboardInterrupt):
        Packer(config, group=group).run(folder, stop_after=5 if rank == 1 else None)
    resumed = Packer(config, group=group).run(folder, resume=True)
    return [torch.equal(whole.points, resumed.points), whole.worst == resumed.worst]


def test_ranks_resume_to_the_bit(tmp_path):
    main = partial(interrupted, folder=tmp_path / "run")
    assert on_ranks(2, main, tmp_path / "ranks") == [[True, True]] * 2


def refusals(rank, ranks):
    messages = []
    for config in (
        PackConfig(40, 6, minutes=1.0),
        PackConfig(2, 6),
        PackConfig(40, 6, batch=2),
    ):
        with pytest.raises(ValueError, match=r"group|at least") as error:
            Packer(config, group=dist.group.WORLD)
        messages.append(str(error.value))
    return messages


def test_a_group_needs_steps_and_a_point_for_each_rank(tmp_path):
    for messages in on_ranks(3, refusals, tmp_path):
        assert messages == [
            "a group needs steps, not minutes, got minutes = 1.0",
            "count must be at least the 3 ranks, got 2",
            "batch must be at least the 3 ranks, got 2",
        ]
