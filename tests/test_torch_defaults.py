"""Results have the same bits under any of torch's default devices and dtypes.

The device "meta" stands in for a GPU: a tensor made there by mistake has no values, which shows as
an error or a difference.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from synface.bench import plan
from synface.data import Augment, Faces, TwoDomainLoader, embedded_faces, list_folder
from synface.data.mixing import (
    Beta,
    Constant,
    CutMix,
    DomainMixup,
    Grid,
    IdentityMixup,
    Mixup,
    TimmMixup,
)
from synface.data.mixing.timm_mixup import FastCollateMixup
from synface.evaluation.embedding import embed, pixel_embeddings
from synface.evaluation.metrics import identify, verify, verify_pairs
from synface.evaluation.report import pair_cosines, pool
from synface.optim.centers import Centers, CentersConfig
from synface.synthesis import packing
from synface.synthesis.dataset import styles, synthesize
from synface.synthesis.generators import EigenfaceGenerator, open_generator
from synface.synthesis.sources import GeneratedSource
from synface.training.loop import TrainConfig, load_backbone, train
from synface.training.sources import FacesSource, MixedSource
from torch import Tensor, nn

import synface_kernels as sk

ROOT = Path(__file__).parents[1]
DEFAULTS = [{"device": "meta"}, {"dtype": torch.float64}, {"dtype": torch.bfloat16}]

pytestmark = [
    pytest.mark.parametrize("changed", DEFAULTS, ids=lambda c: str(*c.values())),
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
]


@contextmanager
def defaults(device: str | None = None, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def leaves(value: Any) -> Iterator[Any]:
    """Yield the tensors and numbers of nested containers and dataclasses."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def check(changed: dict[str, Any], make: Callable[[], Any]) -> None:
    """Assert that results have the same bits, dtypes and devices under changed defaults."""
    torch.manual_seed(0)
    wanted = list(leaves(make()))
    torch.manual_seed(0)
    with defaults(**changed):
        got = list(leaves(make()))
    assert wanted
    for one, other in zip(got, wanted, strict=True):
        assert type(one) is type(other)
        if isinstance(one, Tensor):
            assert (one.dtype, one.device) == (other.dtype, other.device)
            assert torch.equal(one, other)
        elif isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, other)
        else:
            assert one == other or (one != one and other != other)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


# ---- kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_margin_softmax(changed, impl):
    x, w, y = normal(6, 8), normal(10, 8, seed=1), torch.arange(6)
    ids = torch.tensor([0, 1, 2, 3, 4, 5, 8])

    def losses():
        made = []
        for options in (
            {}, {"class_ids": ids}, {"label_smoothing": 0.1}, {"reduction": "none"},
            {"margin": sk.CosFace(0.2)}, {"return_stats": True},
        ):  # fmt: skip
            a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
            loss = sk.margin_cross_entropy(a, b, y, impl=impl, **options)
            first = loss[0] if isinstance(loss, tuple) else loss
            first.sum().backward()
            grad = b.grad.to_dense() if b.grad.is_sparse else b.grad
            made.append([loss, a.grad, grad])
        return made

    check(changed, losses)


def test_margin_softmax_that_steps_itself(changed):
    x, w, y = normal(6, 8), normal(10, 8, seed=1), torch.arange(6)

    def step():
        a, b = x.clone().requires_grad_(), w.clone()
        buffer = torch.zeros_like(b)
        update = sk.SGDUpdate(lr=0.1, momentum=0.9, momentum_buffer=buffer)
        sk.margin_cross_entropy(a, b, y, update=update).backward()
        return a.grad, b, buffer

    check(changed, step)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_the_other_kernels(changed, impl):
    x, y = normal(20, 8), normal(12, 8, seed=2)
    images = torch.randint(256, (2, 3, 6, 5, 3), generator=seeded(), dtype=torch.uint8)
    ids = torch.tensor([1, 4, 7])
    labels = torch.tensor([3, 3, 50])
    grad = normal(3, 8, seed=3)

    def run():
        a = x.clone().requires_grad_()
        made: list[Any] = []
        for energy in (sk.LogSumExp(), sk.Hinge(0.1), sk.MaxCosine(), sk.ClosestPair(), sk.Riesz()):
            loss = sk.hypersphere_repulsion(a, energy=energy, impl=impl)
            made += [loss.detach(), *torch.autograd.grad(loss, a)]
        made += sk.nearest_neighbors(x, y, impl=impl)
        made.append(sk.domain_mixup(*images[:2], 0.3, impl=impl))
        made.append(sk.domain_mixup(*images[:2], torch.tensor([0.5] * 3, device="cpu"), impl=impl))
        made.append(sk.identity_mixup(x, x.flip(0), 0.25))
        made += sk.sample_classes(labels, 100, 20, impl=impl)
        made += sk.sample_classes(labels, 100, 20, generator=seeded(4), impl=impl)
        for dtype in (torch.float32, torch.bfloat16):
            weight, last = x.to(dtype, copy=True), torch.zeros_like(x[:, 0], dtype=torch.int32)
            state = {"step": 3, "last_step": last, "seed": 5, "lr": 0.1, "impl": impl}
            means = torch.zeros_like(weight), torch.zeros_like(weight)
            sk.row_sgd_(
                weight, grad.to(dtype), ids, momentum_buffer=means[0], momentum=0.9, **state
            )
            made += [weight.clone(), *means, last.clone()]
            last.zero_()
            sk.row_adamw_(weight, grad.to(dtype), ids, *means, **state)
            made += [weight, *means, last]
        return made

    check(changed, run)


# ---- mixing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [Grid(), Beta(0.4), Beta(0.2, 3.0), Constant(0.3)])
def test_samplers(changed, ratio):
    check(changed, lambda: [ratio.sample(50), ratio.sample(50, seeded(2))])


def test_mixers(changed):
    bytes_ = torch.randint(256, (6, 4, 5, 3), generator=seeded(), dtype=torch.uint8)
    floats = bytes_.permute(0, 3, 1, 2) / 255
    labels = torch.arange(6)
    even = torch.full((6, 2), 0.5)
    items = [(image.permute(2, 0, 1).numpy(), i) for i, image in enumerate(bytes_)]

    def run():
        made: list[Any] = [
            mixer(bytes_, labels) for mixer in (Mixup(ratio=Beta(0.5)), CutMix(per_sample=True))
        ]
        domain = DomainMixup(6, 6, ratio=Beta(1.0), flip=0.5, per_sample=True)
        made.append(domain(bytes_, labels, bytes_.flip(0), labels))
        several = torch.stack([labels, labels.flip(0)], 1)
        made.append(domain(bytes_, several, bytes_[:2], labels[:2], synthetic_weights=even))
        made.append(IdentityMixup()(normal_rows, labels))
        for mode in ("batch", "pair", "elem"):
            options = {"mode": mode, "num_classes": 6, "cutmix_alpha": 1.0}
            made.append(TimmMixup(**options)(floats, labels))
            made.append(TimmMixup(dense=True, label_smoothing=0.1, **options)(floats, labels))
            made.append(FastCollateMixup(**options)(items))
        return made

    normal_rows = normal(6, 4)
    check(changed, run)


# ---- data ----------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    random = np.random.default_rng(0)
    for domain, people in (("synthetic", 4), ("real", 3)):
        for i in range(3 * people):
            (tmp_path / domain / f"p{i % people}").mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 256, (16, 14), np.uint8)
            Image.fromarray(pixels).save(tmp_path / domain / f"p{i % people}" / f"{i}.png")
    return [tmp_path / "synthetic", tmp_path / "real"]


@pytest.mark.parametrize("mix", [False, True])
def test_loader_of_two_domains(changed, folders, mix):
    mixup = DomainMixup(4, 3, ratio=Beta(0.5), per_sample=True, flip=0.5) if mix else None

    def run():
        with TwoDomainLoader(*folders, 5, last_step=4, workers=2, mix_in_workers=mixup) as loader:
            return [[step, *(part.clone() for part in batch)] for step, batch in loader]

    check(changed, run)


def test_embedded_faces_and_augmentation(changed):
    check(changed, lambda: embedded_faces(3, 16, identities=4).images)
    faces = embedded_faces(3, 16, identities=4)
    check(changed, lambda: Augment(1.0)(faces.images, seeded(1)))


def test_generators_and_folders(changed, tmp_path):
    class Wave(nn.Module):
        embedding_size: int
        style_size: int

        def __init__(self) -> None:
            super().__init__()
            self.embedding_size, self.style_size = 8, 2

        def forward(self, embedding: Tensor, style: Tensor, seed: Tensor) -> Tensor:
            noise = torch.rand([len(seed), 1, 4, 4], dtype=torch.float32, device="cpu")
            return (embedding.sum(1) + style.sum(1)).view(-1, 1, 1, 1).sigmoid() * noise

    torch.jit.script(Wave().eval()).save(str(tmp_path / "wave.pt"))
    points = normal(5, 8)
    folders = iter(range(10))

    def run():
        made: list[Any] = list(styles(0, np.arange(3), np.arange(3), 4))
        for file in (None, tmp_path / "wave.pt"):
            root = tmp_path / f"made{next(folders)}"
            generator = open_generator(file, 8, size=16 if file is None else None)
            assert synthesize(points, generator, root, 2, workers=1) == 10
            made += [path.read_bytes() for path in sorted(root.rglob("*.png"))]
        return made

    check(changed, run)


# ---- packing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"objective": "lse"}, {"objective": "hyperface"}, {"objective": "langevin"},
        {"batch": 8}, {"restarts": 2},
    ],
)  # fmt: skip
def test_packer(changed, options):
    config = packing.PackConfig(30, 6, steps=6, seed=1, **options)
    gallery = normal(4, 6)

    def run():
        packed = packing.Packer(config, gallery=gallery).run()
        return packed.points, packed.worst, packed.pair, [h[1:] for h in packed.history]

    check(changed, run)


def test_packer_goes_on_from_a_checkpoint(changed, tmp_path):
    config = packing.PackConfig(30, 6, steps=6, seed=1, objective="hyperface")
    wanted = packing.Packer(config).run()
    with defaults(**changed):
        with pytest.raises(KeyboardInterrupt):
            packing.Packer(config).run(tmp_path / "run", stop_after=3)
        got = packing.Packer(config).run(tmp_path / "run", resume=True)
    assert torch.equal(got.points, wanted.points)


# ---- training and evaluation ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def faces() -> Faces:
    return embedded_faces(3, 16, identities=6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training(changed, faces, tmp_path, optimizer):
    config = TrainConfig(
        epochs=1, batch_size=6, widths=(4, 8), depths=(1, 1), embedding_size=16, dropout=0.1,
        accumulate=2, clip_norm=1.0, optimizer=optimizer,
    )  # fmt: skip
    folders = iter(range(10))

    def run():
        folder = tmp_path / str(next(folders))
        trained = train(config, faces, folder)
        loaded, _ = load_backbone(folder)
        modules = (trained.backbone, trained.head, loaded)
        return trained.history, [list(module.state_dict().items()) for module in modules]

    check(changed, run)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_centers(changed, dtype):
    config = CentersConfig(20, 8, dtype=dtype, seed=3)
    check(changed, lambda: [(c := Centers.create(config)).weight, c.last_step])


def test_sources(changed, faces, folders):
    generator = EigenfaceGenerator(8, 16)
    config = TrainConfig(epochs=1, batch_size=5, embedding_size=16)
    sources = [
        MixedSource(faces, faces, mix_in_workers=True, workers=1),
        MixedSource(faces, faces, workers=1),
        FacesSource(list_folder(folders[0]), size=(8, 8), workers=1),
        GeneratedSource(normal(4, 8), generator, 2, identity_mixup=IdentityMixup(), real=faces),
    ]
    check(
        changed,
        lambda: [
            [step, *(part.clone() for part in batch if part is not None)]
            for source in sources
            for step, batch in source.batches(config, 0)
        ],
    )


def test_evaluation(changed, faces):
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 8)).eval()
    rows = nn.functional.normalize(normal(6, 8))
    template, media = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 0, 0, 1, 2])
    first, same = torch.tensor([0, 1, 2, 3]), torch.tensor([True, False, True, False])
    fold = torch.tensor([0, 0, 1, 1])

    def run():
        pixels = pixel_embeddings(faces.images)
        cosine = pair_cosines(rows, first, first + 2)
        return [
            embed(model, faces.images), pixels, pool(rows, template, media), cosine,
            verify(pixels, faces.labels, folds=2), verify_pairs(cosine, same, fold),
            identify(rows, first.repeat(2)[:6], rows.flip(0), first.repeat(2)[:6]),
        ]  # fmt: skip

    check(changed, run)


def test_plan(changed, monkeypatch):
    monkeypatch.setattr(plan, "_backbone", plan._backbone.__wrapped__)  # without its cache
    check(changed, lambda: plan.memory(plan.Settings(1000, backbone="r18")))
