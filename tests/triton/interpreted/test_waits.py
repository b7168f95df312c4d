"""No operation of a training step makes the host wait for a GPU, nor copies what no graph captures.

Runs on a stand-in for a GPU (tests/helpers/stand_in_gpu.py) with interpreted kernels; the results
are held against the definition's on the CPU.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from synface.common.rng import seeded
from synface.data import embedded_faces
from synface.data.loading import pool
from synface.data.mixing import IdentityMixup
from synface.heads import AdaFace, MagFace, MarginHead, PartialFC
from synface.optim import RowAdamW, RowSGD
from synface.recipes.generated import identities
from synface.synthesis import EigenfaceGenerator, GeneratedSource
from synface.training import TrainConfig, loop, train
from synface.training.sources import MixedSource
from torch import Tensor

import synface_kernels as sk
from tests.helpers.generators import people
from tests.helpers.stand_in_gpu import cpu, stand_in_gpu
from tests.helpers.training import STEPS

pytestmark = pytest.mark.pairwise
N, C, D = 6, 40, 16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def here(tensor: Tensor) -> Tensor:
    """Send a tensor to the stand-in as training does: before the step, without waiting."""
    return tensor.to("cuda", non_blocking=True)


def check(
    setup: Callable[[Callable[[Tensor], Tensor]], Callable[[], Any]], **tolerance: Any
) -> None:
    """Run a step twice on the stand-in: the second, as any later one, neither waits nor uploads.

    Args:
        setup: given a function that sends tensors to the device, returns the step, which returns
            tensors to compare with those of the CPU.
    """
    step = setup(lambda tensor: tensor.clone())
    expected = [step(), step()]
    with stand_in_gpu() as gpu:
        step = setup(here)
        first = cpu(step())
        assert not gpu.waits
        gpu.uploads.clear()
        second = cpu(step())
        assert not gpu.waits
        assert not gpu.uploads
    tolerance = {"rtol": 1e-4, "atol": 1e-5} | tolerance
    torch.testing.assert_close([first, second], expected, **tolerance)


# ---- the stand-in itself -------------------------------------------------------------------------

WAITS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "int": lambda x: int(x.sum()),
    "float": lambda x: float(x.sum()),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "unique": lambda x: x.unique(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "mask": lambda x: x[x > 0],
    "assign by a mask": lambda x: x.__setitem__(x > 0, torch.zeros((), device="cuda")),
    "indices on the CPU": lambda x: x[torch.tensor([0, 1])],
    "equal": lambda x: torch.equal(x, x),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "copy_ from a GPU": lambda x: torch.empty(3).copy_(x),
    "copy_ to a GPU": lambda x: x.copy_(torch.zeros(3)),
    "upload": lambda x: torch.zeros(3).to(x.device),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.ones_like(x).long()),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_stand_in_notices(name: str) -> None:
    with stand_in_gpu() as gpu:
        x = here(torch.tensor([1.0, -2.0, 3.0]))
        assert not gpu.waits
        WAITS[name](x)
        assert gpu.waits
        assert "test_waits.py" in gpu.waits[0]


def test_the_stand_in_lets_pass_what_does_not_wait() -> None:
    with stand_in_gpu() as gpu:
        x = here(torch.tensor([1.0, -2.0, 3.0]))
        y = torch.full((3,), 2.0, device="cuda") * x
        y[1:] += torch.where(x > 0, x, 0)[1:]
        found = y.to("cpu", non_blocking=True)
        assert not gpu.waits
        assert len(gpu.uploads) == 1
    assert found.tolist() == [2.0, -4.0, 9.0]
    with stand_in_gpu(), pytest.raises(RuntimeError, match="different devices"):
        here(torch.zeros(3)) + torch.zeros(3)


# ---- ops -----------------------------------------------------------------------------------------

MARGINS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled": {"class_ids": torch.arange(0, C, 2)},
    "smoothed": {"label_smoothing": 0.1},
    "filtered": {"margin": sk.ArcFace(interclass_filter=0.1)},
    "two labels": {"target_weight": torch.tensor([[0.25, 0.75]]).expand(N, 2)},
    "two labels, separate": {
        "target_weight": torch.tensor([[0.25, 0.75]]).expand(N, 2), "mix": "separate"
    },
    "stats": {"return_stats": True},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "sub_centers"), [*((name, 1) for name in MARGINS), ("plain", 2), ("sampled", 2)]
)
def test_margin_cross_entropy(name: str, sub_centers: int) -> None:
    def setup(to: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        options = {
            key: to(value) if isinstance(value, Tensor) else value
            for key, value in MARGINS[name].items()
        }
        shape = (C, D) if sub_centers == 1 else (C, sub_centers, D)
        x, w = to(normal(N, D)).requires_grad_(), to(normal(*shape, seed=1)).requires_grad_()
        target = to(torch.arange(2 * N).view(N, 2) if "two" in name else torch.arange(N))

        def step() -> Any:
            x.grad = w.grad = None
            loss = sk.margin_cross_entropy(x, w, target, **options)
            loss = loss[0] if isinstance(loss, tuple) else loss
            loss.backward()
            grad = w.grad._values() if w.grad.is_sparse else w.grad
            return [loss.detach(), x.grad, grad]

        return step

    check(setup)


def rows_of(to: Callable[[Tensor], Tensor], adamw: bool, lazy: bool) -> dict[str, Any]:
    weight, last = to(normal(C, D, seed=1)), to(torch.zeros(C, dtype=torch.int64))
    states = [to(torch.zeros(C, D)) for _ in range(2)]
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.01, "last_step": last if lazy else None}
    if adamw:
        options |= {"exp_avg": states[0], "exp_avg_sq": states[1]}
    else:
        options |= {"momentum_buffer": states[0], "momentum": 0.9}
    return {"weight": weight, "options": options}


@pytest.mark.parametrize("adamw", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_updates_in_the_backward_pass(adamw: bool, lazy: bool, sampled: bool) -> None:
    def setup(to: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        rows, x, target = rows_of(to, adamw, lazy), to(normal(N, D)), to(torch.arange(N))
        ids = to(torch.arange(0, C, 2)) if sampled else None
        update, number = (sk.AdamWUpdate if adamw else sk.SGDUpdate), 0

        def step() -> Any:
            nonlocal number
            number += 3
            own = update(step=number, **rows["options"])
            loss = sk.margin_cross_entropy(x, rows["weight"], target, update=own, class_ids=ids)
            loss.backward()
            return [loss.detach().clone(), rows["weight"].clone()]

        return step

    check(setup)


@pytest.mark.parametrize("adamw", [False, True])
@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("seed", [None, 5])
def test_row_updates(adamw: bool, lazy: bool, seed: int | None) -> None:
    def setup(to: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        rows, grad, ids = rows_of(to, adamw, lazy), to(normal(7, D)), to(torch.arange(3, 10))
        options, number = rows["options"] | {"seed": seed}, 0

        def step() -> Any:
            nonlocal number
            number += 5
            run = sk.row_adamw_ if adamw else sk.row_sgd_
            run(rows["weight"], grad, ids, step=number, **options)
            return rows["weight"].clone()

        return step

    check(setup)


@pytest.mark.parametrize("wanted", [8, 20, 22, 26, 39, C])
def test_sample_classes(wanted: int) -> None:
    def setup(to: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        target = to(torch.tensor([3, 9, 3, -100, 0, 39]))
        # torch's generator of the device: the stand-in's is the CPU's
        torch.manual_seed(1)
        return lambda: list(sk.sample_classes(target, C, wanted))

    check(setup, rtol=0, atol=0)


def test_domain_mixup() -> None:
    def setup(to: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        s, r = (
            to(torch.rand(3, 4, 5, 3, generator=torch.Generator().manual_seed(i))) for i in (0, 1)
        )
        psi, flip = to(torch.tensor([0.25, 0.5, 1.0])), to(torch.tensor([[True, False, True]] * 2))
        leaves = [t.requires_grad_() for t in (s, r, psi)]

        def step() -> Any:
            for leaf in leaves:
                leaf.grad = None
            mixed = sk.domain_mixup(*leaves, flip=flip, mean=0.4, std=0.3)
            mixed.square().sum().backward()
            return [mixed.detach(), *(leaf.grad for leaf in leaves)]

        return step

    check(setup)


def test_the_first_mixup_copies_nothing() -> None:
    with stand_in_gpu() as gpu:
        images, psi = here(torch.zeros(2, 4, 4, 3, dtype=torch.uint8)), here(torch.rand(2))
        gpu.uploads.clear()
        sk.domain_mixup(images, images, psi, mean=[0.1, 0.2, 0.3], std=[0.11, 0.12, 0.13])
        sk.domain_mixup(images, images, 0.3)
        assert not gpu.waits
        assert not gpu.uploads


def test_identity_mixup() -> None:
    def setup(to: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        a, b, phi = to(normal(4, 5)), to(normal(4, 5, seed=1)), to(normal(4).sigmoid())
        return lambda: [sk.identity_mixup(a, b, phi), sk.identity_mixup(a, b, 0.5)]

    check(setup)


ENERGIES = [sk.MaxCosine(), sk.KoLeo(), sk.LogSumExp(), sk.Riesz(), sk.Hinge(0.1), sk.ClosestPair()]


@pytest.mark.parametrize("energy", ENERGIES, ids=lambda energy: type(energy).__name__)
@pytest.mark.parametrize("gallery", [False, True])
def test_hypersphere_repulsion(energy: Any, gallery: bool) -> None:
    def setup(to: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        x = to(normal(12, D)).requires_grad_()
        y = to(normal(9, D, seed=1)).requires_grad_() if gallery else None

        def step() -> Any:
            x.grad = None
            value = sk.hypersphere_repulsion(x, y, energy=energy)
            value.backward()
            return [value.detach(), x.grad]

        return step

    check(setup)


# ---- heads and optimizers ------------------------------------------------------------------------


def head_of(kind: str) -> Any:
    torch.manual_seed(3)
    if kind == "MarginHead":
        return MarginHead(D, C)
    if kind == "sub-centers":
        return MarginHead(D, C, sub_centers=2)
    if kind in ("AdaFace", "MagFace"):
        return (AdaFace if kind == "AdaFace" else MagFace)(D, C)
    return PartialFC(sk.ArcFace(), D, C, sample_rate=0.25 if kind == "sampled" else 1.0)


HEADS = ["MarginHead", "sub-centers", "AdaFace", "MagFace", "PartialFC", "sampled"]


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("optimizer", [RowSGD, RowAdamW])
@pytest.mark.parametrize("fused", [False, True])
def test_heads(kind: str, optimizer: Any, fused: bool) -> None:
    def setup(to: Callable[[Tensor], Tensor]) -> Callable[[], Any]:
        head = head_of(kind)
        for name, parameter in list(head.named_parameters()):
            setattr(head, name, torch.nn.Parameter(to(parameter.detach())))
        for name, buffer in list(head.named_buffers()):
            setattr(head, name, to(buffer))
        rows = optimizer(head.parameters(), lr=0.1, weight_decay=0.01)
        if fused:
            head.step_in_backward(rows)
        x, target = to(normal(N, D)).requires_grad_(), to(torch.arange(N))
        torch.manual_seed(1)

        def step() -> Any:
            x.grad = None
            rows.zero_grad()
            loss = head(x, target)
            loss.backward()
            rows.step()
            return [loss.detach(), x.grad, head.weight.detach().clone()]

        return step

    check(setup, atol=1e-4, rtol=1e-3)


def test_a_capture_with_what_no_graph_replays_is_refused() -> None:
    with stand_in_gpu() as gpu:
        target = here(torch.arange(N))
        rows, grad, ids = rows_of(here, False, True), here(normal(3, D)), here(torch.arange(3))
        gpu.capturing = True
        with pytest.raises(
            RuntimeError, match=r"generator must be on .*cuda:0, got one on cpu, .*captured"
        ):
            sk.sample_classes(target, C, 20, torch.Generator())
        with pytest.raises(RuntimeError, match=r"num_sampled .* captur"):
            sk.sample_classes(target, C, 3)
        for options in (
            {"seed": 1, "step": 1},
            {"last_step": rows["options"]["last_step"], "step": 1},
        ):
            with pytest.raises(RuntimeError, match=r"step .* captur"):
                sk.row_sgd_(rows["weight"], grad, ids, lr=0.1, **options)
        rows = rows_of(here, True, False)
        with pytest.raises(RuntimeError, match=r"step .* captur"):
            sk.row_adamw_(rows["weight"], grad, ids, step=1, **rows["options"])
        rows = rows_of(here, False, False)
        sk.row_sgd_(rows["weight"], grad, ids, **rows["options"])


@pytest.mark.parametrize("fused", [False, True])
def test_a_whole_step_can_be_captured(fused: bool) -> None:
    """Its first call already: mixup, sampling, loss and a step of SGD on the sampled centers."""
    generator = torch.Generator().manual_seed(0)
    with stand_in_gpu() as gpu:
        images = [here(torch.rand(N, 4, 4, 3, generator=generator)) for _ in range(2)]
        psi, target = here(torch.rand(N, generator=generator)), here(torch.arange(N))
        network = here(normal(48, D)).requires_grad_()
        weight, momentum = here(normal(C, D, seed=1)), here(torch.zeros(C, D))
        before = cpu(weight).clone()
        gpu.uploads.clear()
        gpu.capturing = True
        mixed = sk.domain_mixup(*images, psi)
        ids, indices = sk.sample_classes(target, C, 12)
        x = mixed.flatten(1) @ network
        step: Any = {"lr": 0.1, "momentum": 0.9, "momentum_buffer": momentum}
        if fused:
            update = sk.SGDUpdate(**step)
            sk.margin_cross_entropy(x, weight, indices, class_ids=ids, update=update).backward()
        else:
            weight.requires_grad_()
            sk.margin_cross_entropy(x, weight, indices, class_ids=ids).backward()
            grad, weight = weight.grad._values(), weight.detach()
            sk.row_sgd_(weight, grad, ids, **step)
        assert not gpu.waits
        assert not gpu.uploads
        assert network.grad is not None
    moved = set((cpu(weight) != before).any(1).nonzero()[:, 0].tolist())
    assert set(range(N)) <= moved <= set(cpu(ids).tolist())  # some negatives are too far away


# ---- the training loop ---------------------------------------------------------------------------


class Watched:
    """A progress display that keeps its figures."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def start(self, total_steps: int, step: int) -> None: ...

    def step(self, loss: float, accuracy: float, images: int) -> None:
        self.losses.append(loss)


@pytest.mark.parametrize("name", [*STEPS, "mixed"])
def test_the_training_loop(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, from the first step on, but for writing checkpoints."""
    faces = embedded_faces(2, 16, identities=12)
    data: Any = faces
    if name == "mixed":
        data = MixedSource(faces, embedded_faces(4, 16, seed=1, identities=3), workers=1)
    # With a larger rate, training amplifies rounding: by the sixth step losses differed by 0.4 %.
    small: Any = {"embedding_size": 8, "widths": (4, 8), "depths": (1, 1), "lr": 0.01}
    config = TrainConfig(epochs=1, batch_size=8, **small, **STEPS.get(name, {}))
    expected = train(config, data, tmp_path / "cpu")
    monkeypatch.setattr(loop, "check_device", torch.device)
    monkeypatch.setattr(loop, "seeded", lambda seed, device: seeded(seed))
    monkeypatch.setattr(pool._Resources, "pin", lambda self, array: None)
    pinned: list[Tensor] = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    take = loop._Training.step

    def step(self: Any, number: int, *args: Any) -> Any:
        if number == 0:
            gpu.waits.clear()
        return take(self, number, *args)

    monkeypatch.setattr(loop._Training, "step", step)
    monkeypatch.setattr(loop._Training, "save", lambda self, steps: self.finish())
    shown = Watched()
    with stand_in_gpu() as gpu:
        found = train(config, data, tmp_path / "gpu", progress=shown, device="cuda")
        assert found.head.weight.device.type == "cuda"
        assert not gpu.waits
    assert [len(each) for each in pinned] == ([] if name == "mixed" else [8, 8, 8])
    assert len(found.history) == len(expected.history) == 3
    assert shown.losses == [row["loss"] for row in found.history]
    for row, other in zip(found.history, expected.history, strict=True):
        assert row.keys() == other.keys()
        assert list(row.values()) == pytest.approx(list(other.values()), rel=2e-5)


@pytest.mark.parametrize("mixed", [False, True])
def test_generated_faces_are_augmented_and_mixed_on_the_device(mixed: bool) -> None:
    points, generator = identities(4, 8, seed=1), EigenfaceGenerator(8, 16)
    options: Any = {"real": people(3, 2), "identity_mixup": IdentityMixup()} if mixed else {}
    source = GeneratedSource(points, generator, 3, **options)
    config = TrainConfig(epochs=1, batch_size=5)
    expected = list(source.batches(config, 0))
    with stand_in_gpu() as gpu:
        found = list(source.batches(config, 0, device="cuda"))
        assert not gpu.waits
    for (step, batch), (number, other) in zip(found, expected, strict=True):
        assert step == number
        for tensor, wanted in zip(batch, other, strict=True):
            if wanted is not None:
                assert tensor.device.type == "cuda"
                torch.testing.assert_close(cpu(tensor), wanted)
