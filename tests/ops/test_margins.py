"""Margins are values: the easy margin, what `dataclasses.replace` changes, what numbers pass."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from synface.heads import MagFace, MarginHead, PartialFC
from torch import Tensor

import synface_kernels as sk

IMPLS = ("cpu", "reference")
N, C, D = 12, 9, 6


def points() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    w = torch.randn(C, D, dtype=torch.float64, requires_grad=True)
    return x, w, torch.arange(N) % C


# ---- easy margin ---------------------------------------------------------------------------------


def easy_arcface(x: Tensor, w: Tensor, target: Tensor, s: float, m: float) -> Tensor:
    """Return each row's cross entropy as SynFace's and ArcFace's code with easy_margin=True."""
    cosine = torch.nn.functional.linear(
        torch.nn.functional.normalize(x), torch.nn.functional.normalize(w)
    )
    sine = (1.0 - cosine.square()).sqrt()
    phi = cosine * math.cos(m) - sine * math.sin(m)
    phi = torch.where(cosine > 0, phi, cosine)
    one_hot = torch.nn.functional.one_hot(target, len(w))
    return torch.nn.functional.cross_entropy(
        s * torch.where(one_hot > 0, phi, cosine), target, reduction="none"
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_easy_margin_is_the_published_one(impl: str) -> None:
    x, w, target = points()
    margin = sk.ArcFace(32.0, 0.5, "easy")
    expected = easy_arcface(x, w, target, 32.0, 0.5)
    loss = sk.margin_cross_entropy(x, w, target, margin, reduction="none", impl=impl)
    cosine = torch.nn.functional.cosine_similarity(x, w[target])
    assert 2 < (cosine > 0).sum() < N - 2  # both branches are there
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.rand(N, dtype=torch.float64)
    for found, other in zip(
        torch.autograd.grad(loss, (x, w), upstream),
        torch.autograd.grad(expected, (x, w), upstream),
        strict=True,
    ):
        torch.testing.assert_close(found, other, rtol=1e-10, atol=1e-12)


def test_easy_margin_of_angles() -> None:
    theta = torch.linspace(0, math.pi, 101, dtype=torch.float64)[1:-1, None]
    cosine = theta.cos().requires_grad_()
    for margin, psi, slope in (
        (sk.ArcFace(margin=0.5, beyond_pi="easy"), (theta + 0.5).cos(), (theta + 0.5).sin()),
        (
            sk.SphereFace(margin=1.7, beyond_pi="easy"),
            (1.7 * theta).cos(),
            1.7 * (1.7 * theta).sin(),
        ),
        (
            sk.CombinedMargin(64.0, 1.2, 0.3, 0.1, "easy"),
            (1.2 * theta + 0.3).cos() - 0.1,
            1.2 * (1.2 * theta + 0.3).sin(),
        ),
        (sk.ArcFace(margin=0.5, beyond_pi="easy", target_grad="straight_through"), None, None),
    ):
        found = margin.target_cosine(cosine)
        (grad,) = torch.autograd.grad(found.sum(), cosine)
        easy = cosine.detach() <= 0
        if psi is None or slope is None:
            psi, slope = (theta + 0.5).cos(), theta.sin()
        m3 = margin.m3
        torch.testing.assert_close(found.detach(), torch.where(easy, cosine.detach() - m3, psi))
        torch.testing.assert_close(grad, torch.where(easy, 1.0, slope / theta.sin()))


def test_easy_margin_per_row_and_at_a_right_angle() -> None:
    cosine = torch.tensor([[0.5], [0.0], [-0.5], [math.nan]], dtype=torch.float64)
    m = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64, requires_grad=True)
    psi = sk.ArcFace(margin=m, beyond_pi="easy").target_cosine(cosine)
    expected = [math.cos(math.acos(0.5) + 0.1), 0.0, -0.5, math.nan]
    torch.testing.assert_close(psi[:, 0].tolist(), expected, equal_nan=True)
    (grad,) = torch.autograd.grad(psi[:3].sum(), m)
    torch.testing.assert_close(grad[:3].tolist(), [-math.sin(math.acos(0.5) + 0.1), 0.0, 0.0])


def test_heads_take_the_easy_margin() -> None:
    x, _, target = points()
    margin = sk.ArcFace(32.0, 0.5, "easy")
    for head in (
        MarginHead(D, C, margin, init_std=1.0, dtype=torch.float64),
        PartialFC(margin, D, C, dtype=torch.float64),
    ):
        expected = easy_arcface(x, head.weight, target, 32.0, 0.5).mean()
        torch.testing.assert_close(head(x, target), expected)
    head = MagFace(D, C, scale=32.0, beyond_pi="easy", l_a=1.0, u_a=9.0, lambda_g=0.0, l_m=0.5,
                   u_m=0.5, init_std=1.0, dtype=torch.float64)  # fmt: skip
    expected = easy_arcface(x, head.weight, target, 32.0, 0.5).mean()
    torch.testing.assert_close(head(x, target), expected)


# ---- replace -------------------------------------------------------------------------------------

VALUES: list[tuple[Any, dict[str, Any]]] = [
    (sk.ArcFace(64.0, 0.3, "none", "straight_through"), {"scale": 32.0}),
    (sk.ArcFace(interclass_filter=0.3, interclass_filter_mode="zero"), {"margin": 0.2}),
    (sk.CosFace(30.0, 0.2), {"scale": 32.0}),
    (sk.CosFace(30.0, 0.2), {"margin": 0.1}),
    (sk.SphereFace(30.0, 1.5, "easy"), {"margin": 1.2}),
    (sk.CombinedMargin(32.0, 1.1, 0.2, 0.1, "easy"), {"m2": 0.3}),
    (sk.LogSumExp(10.0), {"t": 20.0}),
    (sk.Gaussian(), {"t": 3.0}),
    (sk.Riesz(2.0), {"s": 3.0}),
    (sk.Hinge(0.1, 1), {"threshold": 0.2}),
    (sk.MaxCosine(2), {"topk": 3}),
    (sk.KoLeo(), {}),
    (sk.Log(), {}),
    (sk.ClosestPair(), {}),
    (sk.SGDUpdate(lr=0.1, weight_decay=0.2), {"lr": 0.3}),
    (sk.AdamWUpdate(exp_avg=torch.zeros(1), exp_avg_sq=torch.zeros(1), step=1), {"lr": 0.3}),
]


@pytest.mark.parametrize(("value", "changes"), VALUES, ids=str)
def test_replace_changes_that_alone(value: Any, changes: dict[str, Any]) -> None:
    replaced = dataclasses.replace(value, **changes)
    assert type(replaced) is type(value)
    expected = {**vars(value), **changes}
    if isinstance(value, sk.CombinedMargin) and "margin" in changes:
        name = {sk.ArcFace: "m2", sk.CosFace: "m3", sk.SphereFace: "m1"}[type(value)]
        expected[name] = changes["margin"]
    assert vars(replaced) == expected
    assert repr(copy.copy(value)) == repr(value)


def test_replace_checks_too() -> None:
    with pytest.raises(ValueError, match="scale must be finite and positive"):
        dataclasses.replace(sk.ArcFace(), scale=-1.0)
    with pytest.raises(ValueError, match="m2 is an angle in radians"):
        dataclasses.replace(sk.ArcFace(), margin=28.0)


def test_a_margins_repr_makes_it_again() -> None:
    names = {kind.__name__: kind for kind in (sk.ArcFace, sk.CosFace, sk.SphereFace)}
    for value, _ in VALUES[:5]:
        assert vars(eval(repr(value), names)) == vars(value)


# ---- numbers -------------------------------------------------------------------------------------


def test_numpys_numbers_are_numbers() -> None:
    x, w, target = points()
    plain = {"workspace": 1000, "ignore_index": 3, "label_smoothing": 0.125}
    numpys = {
        "workspace": np.int64(1000),
        "ignore_index": np.int16(3),
        "label_smoothing": np.float32(0.125),
        "class_start": np.uint8(0),
    }
    margin = sk.CombinedMargin(np.float32(32.0), np.int64(1), np.float16(0.5), np.float64(0.25))
    for impl in IMPLS:
        expected = sk.margin_cross_entropy(
            x, w, target, sk.CombinedMargin(32.0, 1.0, 0.5, 0.25), impl=impl, **plain
        )
        assert torch.equal(
            sk.margin_cross_entropy(x, w, target, margin, impl=impl, **numpys), expected
        )
        for energy, other in (
            (sk.LogSumExp(np.float32(8.0)), sk.LogSumExp(8.0)),
            (sk.Riesz(np.int32(2)), sk.Riesz(2.0)),
            (sk.Hinge(np.float32(0.25), np.int64(1)), sk.Hinge(0.25, 1)),
            (sk.MaxCosine(np.int64(2)), sk.MaxCosine(2)),
        ):
            found = sk.hypersphere_repulsion(x, energy=energy, impl=impl)
            assert torch.equal(found, sk.hypersphere_repulsion(x, energy=other, impl=impl))
        _, index = sk.nearest_neighbors(x, k=np.int64(2), impl=impl)
        assert index.shape == (N, 2)
    ids, _ = sk.sample_classes(target, np.int64(50), np.int32(20), ignore_index=np.int64(-1))
    assert ids.shape == (20,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ignore_index": 1.5}, TypeError, r"ignore_index must be an int, got float 1\.5"),
        ({"ignore_index": True}, TypeError, "ignore_index must be an int, got bool"),
        ({"ignore_index": -(2**63) - 1}, ValueError, "ignore_index must be at least -9223"),
        ({"ignore_index": torch.tensor(1)}, TypeError, "ignore_index must be an int, got int64"),
        ({"workspace": 2**63}, ValueError, r"workspace must be less than 2\^63"),
        ({"workspace": 1e6}, TypeError, "workspace must be an int, got float"),
        ({"workspace": True}, TypeError, "workspace must be an int, got bool"),
        ({"class_start": 2**63}, ValueError, r"class_start must be less than 2\^63"),
        ({"class_start": 0.0}, TypeError, "class_start must be an int, got float"),
        ({"label_smoothing": True}, TypeError, "label_smoothing must be a float, got bool"),
        ({"label_smoothing": math.nan}, ValueError, r"label_smoothing must be in \[0, 1\)"),
    ],
)
def test_bad_numbers(options: dict[str, Any], error: type[Exception], message: str) -> None:
    for impl in IMPLS:
        with pytest.raises(error, match=message):
            sk.margin_cross_entropy(*points(), impl=impl, **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sk.ArcFace(scale=True), TypeError, "scale must be a float, got bool"),
        (lambda: sk.ArcFace(scale=1e308), ValueError, r"scale must be at most 1e\+06, got 1e\+308"),
        (lambda: sk.ArcFace(scale=math.nan), ValueError, "scale must be finite and positive"),
        (lambda: sk.ArcFace(margin=True), TypeError, "m2 must be a float or a tensor, got bool"),
        (lambda: sk.CosFace(interclass_filter=True), TypeError, "interclass_filter must be"),
        (lambda: sk.LogSumExp(True), TypeError, "t must be a number, .* got bool"),
        (lambda: sk.LogSumExp(math.inf), ValueError, "t must be in"),
        (lambda: sk.Hinge(0.1, True), TypeError, "power must be an int, 1 or 2, got bool"),
        (lambda: sk.MaxCosine(1.5), TypeError, r"topk must be an int, .* got float 1\.5"),
        (lambda: sk.MaxCosine(2**63), ValueError, r"topk must be less than 2\^63"),
        (lambda: sk.nearest_neighbors(points()[0], k=True), TypeError, "k must be an int"),
        (lambda: sk.nearest_neighbors(points()[0], k=2**63), ValueError, r"k must be less than"),
        (lambda: sk.nearest_neighbors(points()[0], k=1.0), TypeError, "k must be an int, got fl"),
        (
            lambda: sk.sample_classes(points()[2], 50, 20, ignore_index=1.5),
            TypeError,
            r"ignore_index must be an int, got float 1\.5",
        ),
    ],
)
def test_bad_values(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_greatest_scale_is_right(dtype: torch.dtype) -> None:
    x, w, target = points()
    margin = sk.ArcFace(1e6, 0.3)
    exact = sk.margin_cross_entropy(x, w, target, margin, impl="reference")
    grads = torch.autograd.grad(exact, (x, w))
    a, b = (v.detach().to(dtype).requires_grad_() for v in (x, w))
    loss = sk.margin_cross_entropy(a, b, target, margin, impl="cpu")
    tolerance = 1e-6 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(loss.double(), exact, rtol=tolerance, atol=0)
    for grad, other in zip(torch.autograd.grad(loss, (a, b)), grads, strict=True):
        assert (grad.double() - other).abs().max() <= tolerance * other.abs().max()
