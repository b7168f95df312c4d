"""Mixers against their definitions: pixels, labels, weights, and what they are drawn from."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from synface.data.mixing import (
    Beta,
    Constant,
    CutMix,
    DomainMixup,
    Grid,
    IdentityMixup,
    Mixup,
    TimmMixup,
    timm_mixup,
)
from synface.heads import PartialFC
from torch import Tensor

import synface_kernels as sk
from tests.helpers.mixing import SIZE, assert_weights, expected, on_grid, pixels, seeded

ROOT = Path(__file__).parents[2]


# ---- SynFace -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "margin", [sk.ArcFace(), sk.CosFace(32.0, 0.2), sk.CombinedMargin(16.0, 1.1, 0.3, 0.1)]
)
def test_two_calls_equal_three_classifiers(margin):
    """Z = Σ_k t_k·(logits with the margin at label k), L = Σ_k t_k·CE(z, label k), in float64."""
    batch, num_synthetic, num_real, size = 12, 7, 5, (4, 5, 3)
    count = num_synthetic + num_real
    alpha = torch.randn(batch, 6, dtype=torch.float64, requires_grad=True)
    generator = torch.randn(6, 60, dtype=torch.float64)
    backbone = torch.randn(60, 16, dtype=torch.float64, requires_grad=True)
    centers = torch.randn(count, 16, dtype=torch.float64, requires_grad=True)
    real = torch.rand(batch, *size, dtype=torch.float64)
    own, other = torch.randint(num_synthetic, (batch,)), torch.randint(num_real, (batch,))
    draws = seeded(5)

    identities = IdentityMixup()(alpha, own, draws)
    synthetic = (identities.coefficients @ generator).sigmoid().view(batch, *size)
    mix = DomainMixup(num_synthetic, num_real, per_sample=True, dtype=torch.float64)
    mixed = mix(
        synthetic, identities.targets, real, other,
        synthetic_weights=identities.weights, generator=draws,
    )  # fmt: skip
    loss = sk.margin_cross_entropy(
        mixed.images.flatten(1) @ backbone, centers, mixed.targets, margin,
        target_weight=mixed.weights,
    )  # fmt: skip
    gradients = torch.autograd.grad(loss, (alpha, backbone, centers), retain_graph=True)

    # The same from the shares alone.
    phi, psi = on_grid(identities.weights[:, 0]), 1 - on_grid(mixed.weights[:, 2])
    partner = identities.targets[:, 1]
    assert torch.equal(identities.targets[:, 0], own)
    assert sorted(partner.tolist()) == sorted(own.tolist())
    labels = torch.stack([own, partner, other + num_synthetic], 1)
    assert torch.equal(mixed.targets, labels)
    share = torch.stack([phi * psi, (1 - phi) * psi, 1 - psi], 1)
    assert (mixed.weights.double() - share).abs().max() <= 2**-24
    assert_weights(mixed.weights)
    assert (labels[:, 0] == labels[:, 1]).any()  # two labels coincide

    share = mixed.weights.double()
    images = psi.view(-1, 1, 1, 1) * synthetic + (1 - psi).view(-1, 1, 1, 1) * real
    x = ((images - 0.5) / 0.5).permute(0, 3, 1, 2).flatten(1) @ backbone
    cosine = F.normalize(x) @ F.normalize(centers).T
    logits = torch.zeros_like(cosine)
    for k in range(3):
        hot = F.one_hot(labels[:, k], count).bool()
        logits = logits + share[:, k, None] * margin.scale * torch.where(
            hot, margin.target_cosine(cosine), cosine
        )
    three = sum(
        (share[:, k] * F.cross_entropy(logits, labels[:, k], reduction="none")).mean()
        for k in range(3)
    )
    torch.testing.assert_close(loss, three, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        gradients, torch.autograd.grad(three, (alpha, backbone, centers)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_identity_mixup_draws_one_share_for_each_image():
    alpha = torch.randn(50, 4, generator=seeded(1), dtype=torch.float64)
    labels = torch.arange(50)
    mixed = IdentityMixup()(alpha, labels, seeded())
    phi = on_grid(mixed.weights[:, 0])
    assert len(phi.unique()) > 10
    partner = mixed.targets[:, 1]
    assert sorted(partner.tolist()) == labels.tolist()
    assert torch.equal(
        mixed.coefficients, phi[:, None] * alpha + (1 - phi[:, None]) * alpha[partner]
    )
    single = IdentityMixup(Constant(0.3))(alpha[:1], labels[:1])
    torch.testing.assert_close(single.coefficients, alpha[:1])
    assert single.targets.tolist() == [[0, 0]]


# ---- two domains ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "others"), [(1, 1), (5, 5), (7, 3), (3, 8), (0, 0), (0, 4)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_domain_mixup_of_any_batches(count, others, per_sample):
    synthetic, real = pixels(count), pixels(others, 1)
    own = torch.arange(count)
    other = torch.arange(others)
    mix = DomainMixup(10, 8, per_sample=per_sample, mean=0.4, std=0.3)
    assert mix.num_classes == 18
    images, targets, weights = mix(synthetic, own, real, other, generator=seeded(count))
    assert images.shape == (count, 3, *SIZE)
    assert targets.dtype == torch.int64
    assert weights.shape == targets.shape == (count, 2)
    if count == 0:
        return
    assert_weights(weights)
    cycle = own % others  # image i meets real image i mod R
    assert torch.equal(targets, torch.stack([own, 10 + cycle], 1))
    psi = on_grid(weights[:, 0])
    exact = expected(synthetic, real[cycle], psi, 0.4, 0.3)
    torch.testing.assert_close(images, exact.float(), rtol=2**-23, atol=0)
    if per_sample and count > 4:
        assert len(psi.unique()) > 1
    if not per_sample:
        assert len(psi.unique()) == 1


def test_each_side_is_flipped_on_its_own():
    batch = 200
    synthetic, real, labels = pixels(batch), pixels(batch, 1), torch.arange(batch)
    mix = DomainMixup(batch, batch, ratio=Constant(0.25), flip=0.5)
    images = mix(synthetic, labels, real, labels, generator=seeded()).images
    share = torch.full((batch,), 0.25)
    sides = [[x, x.flip(2)] for x in (synthetic, real)]
    seen = Counter()
    for i, j in itertools.product((0, 1), (0, 1)):
        exact = expected(sides[0][i], sides[1][j], share, 0.5, 0.5)
        same = ((images - exact).abs() < 1e-6).flatten(1).all(1)
        seen[i, j] = int(same.sum())
    assert sum(seen.values()) == batch
    assert stats.chisquare([seen[i, j] for i in (0, 1) for j in (0, 1)]).pvalue > 1e-3
    always = DomainMixup(batch, batch, ratio=Constant(0.25), flip=1.0)
    both = always(synthetic, labels, real, labels, generator=seeded()).images
    torch.testing.assert_close(
        both, expected(sides[0][1], sides[1][1], share, 0.5, 0.5).float(), rtol=2**-23, atol=0
    )


def test_what_is_drawn_serves_who_mixes_elsewhere():
    synthetic, real, labels = pixels(9), pixels(9, 1), torch.arange(9)
    mix = DomainMixup(9, 9, per_sample=True, flip=0.3)
    mixed = mix(synthetic, labels, real, labels.flip(0), generator=seeded())
    psi, flip = mix.draw(9, seeded())
    assert torch.equal(sk.domain_mixup(synthetic, real, psi, flip=flip), mixed.images)
    targets, weights = mix.label(labels, labels.flip(0), psi)
    assert torch.equal(targets, mixed.targets)
    assert torch.equal(weights, mixed.weights)
    assert DomainMixup(9, 9).draw(9)[1] is None
    with pytest.raises(ValueError, match=r"real_labels must be in \[0, 9\), got 10 in row 1"):
        mix.label(labels, labels + 9 * (labels == 1), psi)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_sum_to_one_whatever_came(dtype):
    """Thirds sum to 1 in no binary format; the results' sum to 1 in all."""
    labels = torch.zeros(300, 3, dtype=torch.int64)
    own = torch.rand(300, 3, generator=seeded(), dtype=torch.float64).softmax(1).to(dtype)
    own[0] = 1 / 3
    mix = DomainMixup(1, 1, ratio=Beta(0.4), per_sample=True)
    weights = mix(
        pixels(300), labels, pixels(300), labels[:, 0], synthetic_weights=own, generator=seeded()
    ).weights
    assert_weights(weights)
    psi = 1 - weights[:, 3:].double()
    shares = psi * own.double() / own.double().sum(1, keepdim=True)
    assert (weights[:, :3] - shares).abs().max() <= 2**-23


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_results_come_as_asked_for(dtype, memory_format):
    synthetic, real, labels = pixels(4), pixels(4, 1), torch.arange(4)
    options = {"dtype": dtype, "memory_format": memory_format, "mean": (0.5, 0.4, 0.3)}
    last = DomainMixup(4, 4, **options)(synthetic, labels, real, labels, generator=seeded())
    assert last.images.dtype == dtype
    assert last.images.is_contiguous(memory_format=memory_format)
    planes = [x.permute(0, 3, 1, 2).contiguous() for x in (synthetic, real)]
    mix = DomainMixup(4, 4, layout="NCHW", **options)
    out = torch.full_like(last.images, torch.nan)
    first = mix(planes[0], labels, planes[1], labels, generator=seeded(), out=out)
    assert first.images is out
    assert torch.equal(out, last.images)


@pytest.mark.parametrize(
    ("mixer", "message"),
    [
        (lambda: DomainMixup(0, 3), "num_synthetic must be at least 1, got 0"),
        (lambda: DomainMixup(3, 0), "num_real must be at least 1, got 0"),
        (lambda: DomainMixup(3, 3, flip=2.0), r"flip must be in \[0, 1\], got 2"),
        (lambda: DomainMixup(3, 3, layout="HWC"), "layout must be 'NHWC' or 'NCHW', got 'HWC'"),
        (lambda: Mixup(partner="next"), "partner must be 'permutation' or 'reverse', got 'next'"),
    ],
)
def test_mixer_errors(mixer, message):
    with pytest.raises(ValueError, match=message):
        mixer()


def test_a_ratio_must_be_one():
    for mixer in (IdentityMixup, Mixup, CutMix):
        with pytest.raises(TypeError, match="ratio must be a Grid, Beta or Constant, got float"):
            mixer(ratio=0.5)


@pytest.mark.parametrize("made", [partial(DomainMixup, 2, 2), Mixup, CutMix, timm_mixup.Mixup])
@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"std": 0.0}, ValueError, "std must be > 0, got 0.0"),
        ({"mean": "a"}, TypeError, "mean must be a number or a sequence of numbers, got 'a'"),
        ({"mean": (0.5,) * 4, "std": (1.0,) * 3}, ValueError, "std must be .* C = 4, got 3"),
        ({"dtype": "f"}, TypeError, "dtype must be a torch.dtype, got str"),
        ({"memory_format": 3}, TypeError, "memory_format must be a torch.memory_format, got int"),
        ({"layout": "HWC"}, ValueError, "layout must be 'NHWC' or 'NCHW', got 'HWC'"),
        ({"impl": "zzz"}, ValueError, "impl must be one of .* got 'zzz'"),
    ],
)  # fmt: skip
def test_settings_are_checked_at_once(made, setting, error, message):
    made(mean=(0.5, 0.5), std=[0.5, 0.5], layout="NCHW", impl="triton")  # for a GPU
    with pytest.raises(error, match=message):
        made(**setting)


def test_a_generator_must_be_one():
    x, labels, alpha = pixels(2), torch.tensor([0, 1]), torch.randn(2, 3)
    calls = [
        lambda g: DomainMixup(2, 2)(x, labels, x, labels, generator=g),
        lambda g: DomainMixup(2, 2).draw(2, g),
        lambda g: IdentityMixup()(alpha, labels, g),
        lambda g: timm_mixup.Mixup()(x.permute(0, 3, 1, 2), labels, g),
        lambda g: timm_mixup.FastCollateMixup()([(x[0].permute(2, 0, 1), 0)], generator=g),
        lambda g: PartialFC(sk.ArcFace(), 3, 2, generator=g),
        *(lambda g, ratio=ratio: ratio.sample(2, g)
          for ratio in (Grid(), Beta(1.0), Constant(0.5))),
        *(lambda g, made=made, partner=partner: made(partner=partner)(x, labels, g)
          for made in (Mixup, CutMix) for partner in ("permutation", "reverse")),
    ]  # fmt: skip
    for call in calls:
        call(torch.Generator())
        with pytest.raises(TypeError, match=r"generator must be a torch\.Generator, got int 3"):
            call(3)


HALF = torch.full((2, 2), 0.5)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"synthetic_labels": torch.tensor([0, 3])}, ValueError,
         r"synthetic_labels must be in \[0, 3\), got 3 in row 1"),
        ({"real_labels": torch.tensor([2, 0])}, ValueError,
         r"real_labels must be in \[0, 2\), got 2 in row 0"),
        ({"real_labels": torch.tensor([0, -1])}, ValueError, "got -1 in row 1"),
        ({"real_labels": torch.tensor([0, 1, 1])}, ValueError,
         r"real_labels must be int64 of shape \(N,\) with N = 2 on cpu, got int64 \(3,\)"),
        ({"real_labels": torch.tensor([0.0, 1.0])}, ValueError, "must be int64"),
        ({"synthetic_labels": [0, 1]}, TypeError, "synthetic_labels must be a tensor, got list"),
        ({"synthetic_labels": torch.zeros(2, 2, dtype=torch.int64)}, ValueError,
         r"synthetic_weights \(N, J\) is required with synthetic_labels int64 \(2, 2\)"),
        ({"synthetic_weights": HALF}, ValueError, r"must be None with \(N,\) synthetic_labels"),
        ({"synthetic_labels": torch.zeros(2, 2, dtype=torch.int64),
          "synthetic_weights": HALF / 2}, ValueError,
         "each row of synthetic_weights must sum to 1, got 0.5 in row 0"),
        ({"synthetic_labels": torch.zeros(2, 2, dtype=torch.int64),
          "synthetic_weights": torch.tensor([[2.0, -1.0]] * 2)}, ValueError,
         "finite and ≥ 0, got -1.0 in row 0"),
        ({"synthetic_labels": torch.zeros(2, 2, dtype=torch.int64),
          "synthetic_weights": HALF[:1]}, ValueError, "of the shape and device"),
        ({"real": pixels(0), "real_labels": torch.zeros(0, dtype=torch.int64)}, ValueError,
         "real must hold at least one image, got uint8"),
        ({"real": pixels(2)[:, :3]}, ValueError, "real must be of the shape, dtype and device"),
        ({"real": pixels(2)[0]}, ValueError, r"real must be uint8 .* \(N, H, W, C\), got uint8"),
        ({"synthetic": pixels(2).int()}, ValueError, "synthetic must be uint8 or floating point"),
        ({"synthetic": None}, TypeError, "synthetic must be a tensor, got NoneType"),
        ({"out": torch.empty(2, 3, 1, 1)}, ValueError, "out must be float32"),
    ],
)  # fmt: skip
def test_domain_mixup_names_what_is_wrong(changed, error, message):
    arguments = {
        "synthetic": pixels(2),
        "synthetic_labels": torch.tensor([0, 2]),
        "real": pixels(2, 1),
        "real_labels": torch.tensor([1, 0]),
    }
    DomainMixup(3, 2)(**arguments)
    with pytest.raises(error, match=message):
        DomainMixup(3, 2)(**arguments | changed)


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int16, torch.uint8, torch.uint16, torch.uint64]
)
def test_other_integers_and_columns_are_labels_too(dtype):
    labels = torch.tensor([1, 0, 2])
    other = torch.tensor([0, 1])
    column = labels[:, None].to(dtype)
    for mixer in (Mixup(), CutMix(), TimmMixup(1.0, 1.0, num_classes=3, layout="NHWC")):
        pictures = pixels(3)
        wanted = mixer(pictures, labels, seeded())
        torch.testing.assert_close(mixer(pictures, column, seeded()), wanted, rtol=0, atol=0)
    rows = torch.rand(3, 4)
    wanted = IdentityMixup()(rows, labels, seeded())
    torch.testing.assert_close(IdentityMixup()(rows, column, seeded()), wanted, rtol=0, atol=0)
    mix = DomainMixup(3, 2)
    wanted = mix(pixels(3), labels, pixels(2), other, generator=seeded())
    column_of_two = other[:, None].to(dtype)
    mixed = mix(pixels(3), column, pixels(2), column_of_two, generator=seeded())
    torch.testing.assert_close(mixed, wanted, rtol=0, atol=0)
    psi = torch.tensor([0.25, 1.0, 0.5], dtype=torch.float64)
    targets, weights = mix.label(column, other[[0, 1, 0], None].to(dtype), psi)
    assert targets.tolist() == [[1, 3], [0, 4], [2, 3]]
    assert targets.dtype == torch.int64
    assert weights.tolist() == [[0.25, 0.75], [1, 0], [0.5, 0.5]]


def test_one_batch_mixers_name_what_is_wrong():
    for call in (
        lambda y: Mixup()(pixels(2), y),
        lambda y: CutMix()(pixels(2), y),
        lambda y: IdentityMixup()(torch.rand(2, 3), y),
    ):
        with pytest.raises(ValueError, match="labels must be ≥ 0, got -5 in row 1"):
            call(torch.tensor([0, -5]))
        with pytest.raises(ValueError, match="labels must be int64 of shape"):
            call(torch.tensor([[0, 1], [1, 0]]))
    with pytest.raises(ValueError, match=r"alpha must be floating point \(N, D\), got int64"):
        IdentityMixup()(torch.ones(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"target must be in \[0, 2\), got 2 in row 0"):
        TimmMixup(num_classes=2)(pixels(1).permute(0, 3, 1, 2), torch.tensor([2]))


# ---- what holds for all --------------------------------------------------------------------------


def results(mixer, generator, images=None):
    """Return what a mixer makes of a batch of 6, as a list of tensors."""
    labels = torch.arange(6)
    images = pixels(6) if images is None else images
    if isinstance(mixer, IdentityMixup):
        return list(mixer(images.flatten(1).double(), labels, generator))
    if isinstance(mixer, DomainMixup):
        real = pixels(6, 1).to(images.dtype)
        return list(mixer(images, labels, real, labels, generator=generator))
    if isinstance(mixer, TimmMixup):
        mixed, (targets, weights) = mixer(images, labels, generator)
        return [mixed, targets, weights]
    return list(mixer(images, labels, generator))


MIXERS = [
    DomainMixup(6, 6, flip=0.5),
    DomainMixup(6, 6, ratio=Beta(0.5), per_sample=True, dtype=torch.float64),
    IdentityMixup(),
    Mixup(ratio=Beta(0.2), per_sample=True, dtype=torch.float64),
    CutMix(per_sample=True, dtype=torch.float64),
    TimmMixup(1.0, 1.0, mode="elem", num_classes=6, layout="NHWC"),
]


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda m: type(m).__name__)
def test_a_seed_means_one_result(mixer):
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        first = results(mixer, seeded(9))
        assert torch.equal(torch.get_rng_state(), state)  # the global generator was left alone
        for a, b in zip(first, results(mixer, seeded(9)), strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(first[0], results(mixer, seeded(10))[0])
        torch.manual_seed(9)
        for a, b in zip(first, results(mixer, None), strict=True):
            assert torch.equal(a, b)
        assert not torch.equal(torch.get_rng_state(), state)
    assert_weights(first[2])


@pytest.mark.parametrize("mixer", MIXERS[1:], ids=lambda m: type(m).__name__)
def test_gradients_flow_to_floating_images(mixer):
    images = torch.rand(6, 2, 3, 1, dtype=torch.float64, generator=seeded(), requires_grad=True)
    if isinstance(mixer, DomainMixup):
        real = torch.rand(2, 2, 3, 1, dtype=torch.float64, generator=seeded(1), requires_grad=True)
        labels = torch.arange(6)

        def mixed(x, y):
            return mixer(x, labels, y, labels[:2], generator=seeded(2)).images

        assert torch.autograd.gradcheck(mixed, (images, real))
    else:
        assert torch.autograd.gradcheck(lambda x: results(mixer, seeded(2), x)[0], (images,))


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda m: type(m).__name__)
def test_a_gpu_is_not_waited_for(mixer, monkeypatch):
    """Tensors without values stand for a GPU's: reading a value of one raises."""
    monkeypatch.setattr(sk, "domain_mixup", lambda a, b, psi, **_: a * psi.view(-1, 1, 1, 1) + b)
    monkeypatch.setattr(
        sk, "identity_mixup", lambda a, b, phi: phi[:, None] * a + (1 - phi[:, None]) * b
    )
    device = "meta"
    labels = torch.zeros(6, dtype=torch.int64, device=device)
    images = torch.zeros(6, *SIZE, 3, dtype=torch.uint8, device=device)
    if isinstance(mixer, IdentityMixup):
        result = list(mixer(images.flatten(1).double(), labels))
    elif isinstance(mixer, DomainMixup):
        result = list(
            mixer(
                images, torch.stack([labels, labels], 1), images[:4], labels[:4],
                synthetic_weights=torch.zeros(6, 2, device=device),
            )
        )  # fmt: skip
    elif isinstance(mixer, TimmMixup):
        mixed, (targets, weights) = mixer(images, labels)
        result = [mixed, targets, weights]
    else:
        result = list(mixer(images, labels))
    assert all(tensor.device.type == device for tensor in result)


# ---- the documentation ---------------------------------------------------------------------------


def test_the_example_runs():
    page = (ROOT / "docs" / "mixing.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            exec(compile(block, "docs/mixing.md", "exec"), names)
    loss = names["loss"]
    assert isinstance(loss, Tensor)
    assert loss.isfinite()
