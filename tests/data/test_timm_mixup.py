"""`Mixup` and `FastCollateMixup` are as defined, and as timm's own where it is installed."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from synface.data.mixing import TimmMixup
from synface.data.mixing.parts import cutmix_boxes, cutmix_boxes_within
from synface.data.mixing.timm_mixup import FastCollateMixup, Mixup
from torch import Tensor
from torch.utils.data import DataLoader

SIZE = (6, 7)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flat(batch: int) -> Tensor:
    """Image i is all 10·i bytes: what came from where can be read off."""
    values = 10 * torch.arange(batch, dtype=torch.uint8)
    return values.view(-1, 1, 1, 1).expand(batch, 3, *SIZE).contiguous()


def items(batch: int) -> list[tuple[np.ndarray, int]]:
    return [(image.numpy(), i) for i, image in enumerate(flat(batch))]


def smooth(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Return (1 − ε)·onehot(y) + ε/C."""
    return (1 - smoothing) * F.one_hot(labels, classes).double() + smoothing / classes


def blended(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Return λ·first + (1 − λ)·second in float64, with a λ for each row."""
    share = share.double().view(-1, *[1] * (first.dim() - 1))
    return share * first.double() + (1 - share) * second.double()


# ---- Mixup ---------------------------------------------------------------------------------------


def test_defaults_are_timms():
    mix = Mixup()
    assert (mix.mixup_alpha, mix.cutmix_alpha, mix.cutmix_minmax) == (1.0, 0.0, None)
    assert (mix.mix_prob, mix.switch_prob, mix.mode, mix.correct_lam) == (1.0, 0.5, "batch", True)
    assert (mix.label_smoothing, mix.num_classes, mix.mixup_enabled) == (0.1, 1000, True)
    labels = torch.tensor([7, 999, 0, 3])
    x = torch.rand(4, 3, *SIZE)
    _, dense = mix(x, labels, seeded())
    _, (targets, weights) = Mixup(sparse=True)(x, labels, seeded())
    assert targets.tolist() == [[7, 3], [999, 0], [0, 999], [3, 7]]
    assert dense.dtype == torch.float32
    y = smooth(labels, 1000, 0.1)
    wanted = blended(y, y.flip(0), weights[:, 0])
    torch.testing.assert_close(dense.double(), wanted, rtol=0, atol=2**-23)


def test_timms_attributes_are_read_at_each_call():
    x, labels = torch.rand(6, 1, *SIZE), torch.arange(6)
    mix = Mixup(mode="elem", num_classes=6, label_smoothing=0.0)
    mix.mix_prob = 0.0
    assert mix.prob == 0.0
    unmixed, target = mix(x, labels)
    assert torch.equal(unmixed, x)
    assert torch.equal(target, torch.eye(6))
    mix.mix_prob, mix.mixup_alpha, mix.cutmix_alpha = 1.0, 0.0, 1e6  # λ is ½ but for 0.1 %
    cut, _ = mix(x, labels)
    assert torch.equal(cut, torch.where(cut == x, x, x.flip(0)))
    assert not torch.equal(cut, x)
    mix.mixup_alpha, mix.cutmix_alpha, mix.label_smoothing = 1e6, 0.0, 0.5
    half, target = mix(x, labels)
    torch.testing.assert_close(half, (x + x.flip(0)) / 2, rtol=0, atol=0.01)
    wanted = (torch.eye(6) + torch.eye(6).flip(0)) / 4 + 0.5 / 6
    torch.testing.assert_close(target, wanted, rtol=0, atol=0.005)
    mix.mixup_enabled = False
    assert torch.equal(mix(x, labels)[0], x)
    assert Mixup(cutmix_minmax=(0.2, 0.8)).cutmix_alpha == 1.0


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("multi_label", [False, True])
def test_soft_labels(mode, multi_label):
    classes, smoothing = 5, 0.2
    x = torch.rand(7, 3, *SIZE)
    y = torch.rand(7, classes).softmax(1)
    options = {"mode": mode, "num_classes": classes}
    _, (_, weights) = Mixup(sparse=True, **options)(x, torch.arange(7) % 5, seeded(1))
    if multi_label:
        y = (y > 0.2).to(torch.int32)
    mix = Mixup(label_smoothing=smoothing, multi_label=multi_label, **options)
    _, mixed = mix(x, y, seeded(1))
    smoothed = (1 - smoothing) * y.double() + smoothing * (0.5 if multi_label else 1 / classes)
    wanted = blended(smoothed, smoothed.flip(0), weights[:, 0])
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.double(), wanted, rtol=0, atol=2**-22)


@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.0, 1.0)])
def test_an_image_that_is_not_mixed_keeps_clear_of_its_partner(alphas):
    x = torch.ones(2, 1, *SIZE)
    x[1] = torch.nan
    mix = Mixup(*alphas, prob=0.0, num_classes=2)
    for mixed in (mix(x, torch.arange(2))[0], Mixup(prob=0.0, std=1.5)(x, torch.arange(2))[0]):
        assert mixed[0].isfinite().all()
        assert mixed[1].isnan().all()
    assert mix(x, torch.arange(2))[0].data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "foo"}, "mode must be 'batch', 'pair' or 'elem', got 'foo'"),
        ({"mix_prob": 7}, r"prob must be in \[0, 1\], got 7"),
        ({"label_smoothing": 5}, r"label_smoothing must be in \[0, 1\], got 5"),
        ({"mixup_alpha": 0.0}, "mixup_alpha or cutmix_alpha must be > 0"),
    ],
    ids=str,
)
def test_attributes_set_between_calls_are_checked(change, message):
    mix = Mixup(num_classes=4)
    for name, value in change.items():
        setattr(mix, name, value)
    with pytest.raises(ValueError, match=message):
        mix(torch.rand(2, 3, *SIZE), torch.arange(2))


def test_dense_targets_can_be_asked_for_between_calls():
    mix, x, labels = TimmMixup(num_classes=4), torch.rand(2, 3, *SIZE), torch.arange(2)
    assert isinstance(mix(x, labels)[1], tuple)
    mix.dense = True
    assert mix(x, labels)[1].shape == (2, 4)


def test_one_hot_labels_are_hard_ones():
    x, labels = torch.rand(6, 3, *SIZE), torch.tensor([0, 3, 3, 1, 2, 0])
    mix = Mixup(1.0, 1.0, mode="elem", num_classes=4)
    hard = mix(x, labels, seeded())
    soft = mix(x, F.one_hot(labels, 4).half(), seeded())
    assert torch.equal(hard[0], soft[0])
    torch.testing.assert_close(hard[1], soft[1], rtol=0, atol=2**-23)
    column = mix(x, labels[:, None].int(), seeded())
    assert torch.equal(hard[1], column[1])


@pytest.mark.parametrize(
    ("options", "target", "message"),
    [
        ({}, torch.tensor([0.0, 1.0]),
         r"target must be int64 of shape \(N,\) or soft labels of shape \(N, C\) = \(2, 3\) on "
         r"cpu, got float32 \(2,\)"),
        ({}, torch.rand(2, 4), r"soft labels of shape \(N, C\) = \(2, 3\) .*got float32 \(2, 4\)"),
        ({}, torch.ones(2, 3), "each row of target must sum to 1; labels that each may be 1 need "
         "multi_label=True, got 3.0 in row 0"),
        ({}, torch.tensor([[0.0, 1, 0], [2, -1, 0]]), "target must be finite and ≥ 0, got -1.0"),
        ({}, torch.tensor([0, 3]), r"target must be in \[0, 3\), got 3 in row 1"),
        ({"multi_label": True}, torch.tensor([0, 1]),
         r"target must be soft labels of shape \(N, C\) = \(2, 3\) on cpu, got int64 \(2,\)"),
        ({"sparse": True}, torch.rand(2, 3).softmax(1),
         r"int64 of shape \(N,\) with N = 2 where sparse=True, got float32 \(2, 3\)"),
    ],
)  # fmt: skip
def test_wrong_targets(options, target, message):
    with pytest.raises(ValueError, match=message):
        Mixup(num_classes=3, **options)(torch.rand(2, 3, *SIZE), target)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixup(0.0), "mixup_alpha or cutmix_alpha must be > 0"),
        (lambda: Mixup(num_classes=0), "num_classes must be at least 1, got 0"),
        (lambda: Mixup(mode="half"), "mode must be 'batch', 'pair' or 'elem', got 'half'"),
        (lambda: FastCollateMixup(mode="one"), "'batch', 'pair', 'elem' or 'half', got 'one'"),
        (lambda: Mixup(sparse=True, multi_label=True), "multi_label=True needs dense targets"),
        (lambda: Mixup(layout="HWC"), "layout must be 'NHWC' or 'NCHW', got 'HWC'"),
    ],
)
def test_wrong_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("even", [False, True])
def test_boxes_have_the_sides_of_their_share_and_any_place(even):
    share = torch.full((4000,), 0.5, dtype=torch.float64)
    drawn = cutmix_boxes(*SIZE, share, seeded(), even)
    side = 4  # ⌊6·√½⌋ and ⌊7·√½⌋; the odd one is tried below
    rows = {(max(c - 2, 0), min(c + 2, 6)) for c in range(6)}
    assert set(zip(*drawn[:2].tolist(), strict=True)) == rows
    assert (drawn[1] - drawn[0]).max() == side
    odd = cutmix_boxes(*SIZE, torch.full_like(share, 0.7), seeded(), even)  # ⌊6·√0.3⌋ = 3
    rows = {(max(c - 1, 0), min(c + (1 if even else 2), 6)) for c in range(6)}
    assert set(zip(*odd[:2].tolist(), strict=True)) == rows


def test_boxes_within_bounds_reach_every_border():
    drawn = cutmix_boxes_within(6, 6, (0.4, 0.7), 4000, seeded())
    wanted = {(y, y + side) for side in (2, 3) for y in range(6 - side + 1)}
    assert set(zip(*drawn[:2].tolist(), strict=True)) == wanted
    assert set(zip(*drawn[2:].tolist(), strict=True)) == wanted


def test_the_sparse_class_keeps_its_signature():
    parameters = inspect.signature(TimmMixup).parameters
    assert parameters["num_classes"].default == 0
    assert parameters["label_smoothing"].default == 0.0
    assert list(parameters)[:9] == list(inspect.signature(Mixup).parameters)[:9]
    assert TimmMixup(num_classes=3).sparse
    _, dense = TimmMixup(num_classes=3, dense=True)(torch.rand(2, 1, 2, 2), torch.arange(2))
    assert dense.shape == (2, 3)


# ---- FastCollateMixup ----------------------------------------------------------------------------


def read_boxes(mixed: Tensor, own: Tensor) -> list[tuple[int, int, int, int] | None]:
    """Return top, bottom, left and right of what is not the image's own."""
    found: list[tuple[int, int, int, int] | None] = []
    for image, mine in zip(mixed, own, strict=True):
        y, x = (image != mine)[0].nonzero(as_tuple=True)
        span = (int(y.min()), int(y.max()) + 1, int(x.min()), int(x.max()) + 1) if len(y) else None
        found.append(span)
    return found


@pytest.mark.parametrize("mode", ["batch", "pair", "elem", "half"])
@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("batch", [1, 7, 8])
@pytest.mark.parametrize("tensors", [False, True])
def test_collated(mode, alphas, batch, tensors):
    x, labels = flat(batch), torch.arange(batch)
    rows = (batch + 1) // 2 if mode == "half" else batch
    options = {"mode": mode, "num_classes": 10}
    data = [(torch.from_numpy(a), i) for a, i in items(batch)] if tensors else items(batch)
    images, target = FastCollateMixup(*alphas, **options)(data, generator=seeded(3))
    collate = FastCollateMixup(*alphas, sparse=True, **options)
    same, (targets, weights) = collate(data, generator=seeded(3))
    assert images.dtype == torch.uint8
    assert images.shape == (rows, 3, *SIZE)
    assert torch.equal(same, images)
    assert torch.equal(targets, torch.stack([labels, labels.flip(0)], 1)[:rows])
    share = weights[:, 0]
    y = smooth(labels, 10, 0.1)
    wanted = blended(y[:rows], y.flip(0)[:rows], share)
    torch.testing.assert_close(target.double(), wanted, rtol=0, atol=2**-23)
    own, other = x[:rows], x.flip(0)[:rows]
    if alphas[0]:
        exact = blended(own, other, share)
        assert torch.equal(images, exact.round().to(torch.uint8))
    for image, mine, theirs, part, box in zip(
        images, own, other, share.tolist(), read_boxes(images, own), strict=True
    ):
        if not alphas[1] or torch.equal(mine, theirs):
            continue
        if box is None:
            assert part == 1
            continue
        area = (box[1] - box[0]) * (box[3] - box[2])
        assert part == pytest.approx(1 - area / 42, abs=2**-24)
        assert torch.equal(image[:, box[0] : box[1], box[2] : box[3]],
                           theirs[:, box[0] : box[1], box[2] : box[3]])  # fmt: skip
        assert (image == mine).sum() == 3 * (42 - area)
    for item, before in zip(data, items(batch), strict=True):  # what was given is as it was
        assert np.array_equal(np.asarray(item[0]), before[0])


def test_collating_in_a_loader():
    """Workers draw differently, and a batch that is not mixed is the batch."""
    collate = FastCollateMixup(num_classes=12, mode="half", label_smoothing=0.0)
    loader = DataLoader(items(12), batch_size=4, collate_fn=collate, num_workers=2)
    batches = list(loader)
    assert [image.shape[0] for image, _ in batches] == [2, 2, 2]
    shares = [float(target.max(1).values[0]) for _, target in batches]
    assert len(set(shares)) == 3
    collate.mixup_enabled = False
    images, target = collate(items(4))
    assert torch.equal(images, flat(4)[:2])
    assert torch.equal(target, torch.eye(12)[:2])


def test_read_only_arrays_and_soft_labels_collate(recwarn):
    data = []
    for image, i in items(4):
        image.flags.writeable = False
        data.append((image, torch.eye(4)[i], "a name"))
    images, target = FastCollateMixup(num_classes=4, prob=0.0, label_smoothing=0.0)(data)
    assert torch.equal(images, flat(4))
    assert torch.equal(target, torch.eye(4))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ([], ValueError, "batch must hold at least one pair"),
        ([(np.zeros((3, 2, 2), np.float32), 0)], ValueError,
         r"images must be uint8 \(C, H, W\) of one shape, got float32 \(3, 2, 2\) for image 0"),
        ([(np.zeros((3, 2, 2), np.uint8), 0), (np.zeros((3, 2, 3), np.uint8), 1)], ValueError,
         r"got uint8 \(3, 2, 3\) for image 1, and \(3, 2, 2\) for image 0"),
        ([(np.zeros((3, 2, 2), np.uint8), 0), (torch.zeros(3, 2, 2), 1)], TypeError,
         "image 1 must be a ndarray as image 0 is, got <class 'torch.Tensor'>"),
        ([("a", 0)], TypeError, "images must be NumPy arrays or tensors, got str 'a'"),
        ([(np.zeros((3, 2, 2), np.uint8), 5)], ValueError, r"target must be in \[0, 5\), got 5"),
    ],
)  # fmt: skip
def test_wrong_items(batch, error, message):
    with pytest.raises(error, match=message):
        FastCollateMixup(num_classes=5)(batch)


@pytest.mark.parametrize("options", [{"prob": 0.0}, {"cutmix_alpha": 1.0}, {"mixup_alpha": 1.0}])
def test_results_are_floating_point(options):
    with pytest.raises(ValueError, match=r"dtype must be .*got torch\.uint8"):
        Mixup(num_classes=9, dtype=torch.uint8, **options)(flat(8), torch.arange(8))


# ---- beside timm's -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def timm():
    """Load timm's module by its file: timm.data imports torchvision, which not every torch has."""
    found = importlib.util.find_spec("timm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("timm is not installed")
    if tuple(map(int, version("timm").split(".")[:3])) < (1, 0, 31):
        pytest.skip("boxes and multi_label are those of timm 1.0.31")
    file = Path(found.submodule_search_locations[0]) / "data" / "mixup.py"
    spec = importlib.util.spec_from_file_location("timm_data_mixup", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_signature_is_timms(timm):
    for theirs, ours in ((timm.Mixup, Mixup), (timm.FastCollateMixup, FastCollateMixup)):
        wanted = inspect.signature(theirs).parameters
        positional = [
            p for p in inspect.signature(ours).parameters.values() if p.kind != p.KEYWORD_ONLY
        ]
        assert [p.name for p in positional] == list(wanted)
        assert [p.default for p in positional] == [p.default for p in wanted.values()]
        missing = set(vars(theirs())) - set(dir(ours()))
        assert not missing


def with_draws(theirs, module, monkeypatch, shares, boxes):
    """Let timm's object take these λ and boxes in the place of its own, and return it."""
    lam = np.array(shares, np.float32)
    cut = boxes is not None
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (float(lam[0]), cut))
    monkeypatch.setattr(
        theirs, "_params_per_elem", lambda n: (lam[:n].copy(), np.full(n, cut, dtype=bool))
    )
    left = iter([b for b, s in zip(boxes or [], shares, strict=False) if s != 1])
    monkeypatch.setattr(module, "cutmix_bbox_and_lam", lambda _shape, lam, **_: (next(left), lam))
    return theirs


@pytest.mark.parametrize(
    ("mode", "fast"),
    [*itertools.product(["batch", "pair", "elem"], [False, True]), ("half", True)],
)
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("multi_label", [False, True])
def test_results_are_timms(timm, monkeypatch, mode, cut, multi_label, fast):
    batch, classes = 8, 11
    x, labels = flat(batch), torch.arange(batch)
    target = F.one_hot(labels, classes) if multi_label else labels
    options = {
        "mixup_alpha": 0.0 if cut else 0.8, "cutmix_alpha": 1.0 if cut else 0.0, "mode": mode,
        "num_classes": classes, "multi_label": multi_label,
    }  # fmt: skip
    data = [(image.numpy(), y) for image, y in zip(x.clone(), target, strict=True)]
    kind, their_kind = (FastCollateMixup, timm.FastCollateMixup) if fast else (Mixup, timm.Mixup)
    sparse = kind(**options | {"multi_label": False}, sparse=True)
    if fast:
        ours, got = kind(**options)(data, generator=seeded(5))
        _, (_, weights) = sparse([(a, i) for i, (a, _) in enumerate(data)], generator=seeded(5))
    else:
        ours, got = kind(**options)(x.float(), target, seeded(5))
        _, (_, weights) = sparse(x.float(), labels, seeded(5))
    boxes = read_boxes(ours, x[: len(ours)]) if cut else None
    theirs = with_draws(their_kind(**options), timm, monkeypatch, weights[:, 0].tolist(), boxes)
    if fast:
        wanted, wanted_target = theirs([(a.copy(), y) for a, y in data])
        assert torch.equal(ours, wanted)
    else:
        wanted, wanted_target = theirs(x.float(), target)
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)
    assert got.dtype == wanted_target.dtype
    torch.testing.assert_close(got, wanted_target, rtol=0, atol=1e-6)


def test_boxes_are_timms(timm):
    for share in (0.0, 0.1, 0.3, 0.5, 0.77, 0.99):
        theirs = timm.rand_bbox((3, *SIZE), share, count=4000)
        lam = torch.full((4000,), share, dtype=torch.float64)
        ours = cutmix_boxes(*SIZE, lam, seeded(), even=False)
        wanted = set(zip(*(side.tolist() for side in theirs), strict=True))
        assert set(zip(*ours.tolist(), strict=True)) == wanted
    theirs = timm.rand_bbox_minmax((3, *SIZE), (0.3, 0.8), count=8000)
    ours = cutmix_boxes_within(*SIZE, (0.3, 0.8), 8000, seeded())
    wanted = set(zip(*(side.tolist() for side in theirs), strict=True))
    assert set(zip(*ours.tolist(), strict=True)) == wanted


@pytest.mark.parametrize("options", [{}, {"mixup_alpha": 0.2, "prob": 0.7}, {"cutmix_alpha": 1.0}])
def test_shares_are_distributed_as_timms(timm, options):
    options = {"mode": "elem", "num_classes": 2000, "label_smoothing": 0.0} | options
    labels = torch.arange(2000)
    x = torch.zeros(2000, 1, 32, 32)
    own = [
        mix(x.clone(), labels)[1].diagonal().double().numpy()
        for mix in (Mixup(**options), timm.Mixup(**options))
    ]
    assert stats.ks_2samp(*own).pvalue > 1e-3
