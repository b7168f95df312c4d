"""Bad input to the hypersphere repulsion and its energies is refused with a message."""

from __future__ import annotations

import math

import pytest
import torch

import synface_kernels as sk

GOOD = torch.eye(4)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("energy", [sk.LogSumExp(), sk.MaxCosine()], ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-13, math.inf, math.nan])
def test_rows_must_be_finite_and_not_zero(value, energy, impl):
    bad = torch.eye(4, dtype=torch.float64)
    bad[2] *= 0
    bad[2, 2] = value
    for dtype in (torch.float32, torch.float64):
        good, rows = GOOD.to(dtype), bad.to(dtype)
        with pytest.raises(ValueError, match=r"x must have finite, non-zero rows.*in row 2"):
            sk.hypersphere_repulsion(rows, energy=energy, impl=impl)
        with pytest.raises(ValueError, match=r"y must have finite, non-zero rows.*in row 2"):
            sk.hypersphere_repulsion(good, rows, energy=energy, impl=impl)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((GOOD[:1],), {}, "x must have at least two rows"),
        ((GOOD[:0], GOOD), {}, "at least one row each"),
        ((GOOD, GOOD[:0]), {}, "at least one row each"),
        ((GOOD.long(),), {}, r"x must be float32.*\(N, D\).*got int64 \(4, 4\)"),
        ((GOOD[0],), {}, r"x must be .*got float32 \(4,\)"),
        ((GOOD, GOOD[:, :3]), {}, r"same D, got float32 \(4, 4\).* and float32 \(4, 3\)"),
        ((GOOD, GOOD.double()), {}, "both be float64 or neither"),
        ((GOOD, GOOD.to("meta")), {}, "y must be on x's device cpu"),
        ((GOOD,), {"reduction": "all"}, "reduction must be .*'all'"),
        ((GOOD,), {"reduction": "none"}, "'mean' or 'sum' for LogSumExp"),
        ((GOOD,), {"energy": sk.MaxCosine(4)}, "energy's topk must be .* at most 3.*got 4"),
        ((GOOD,), {"impl": "fast"}, "impl must be one of"),
    ],
)
def test_bad_values(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        sk.hypersphere_repulsion(*arguments, **options)


def test_bad_neighbors():
    for k in (0, 4, -1):
        with pytest.raises(ValueError, match=f"k must be at least 1 and at most 3.*got {k}"):
            sk.nearest_neighbors(GOOD, k=k)
    with pytest.raises(ValueError, match="at most 2, the number of rows of y, got 3"):
        sk.nearest_neighbors(GOOD, GOOD[:2], k=3)
    with pytest.raises(TypeError, match="k must be an int, got float"):
        sk.nearest_neighbors(GOOD, k=1.0)


def test_bad_types():
    with pytest.raises(TypeError, match="x must be a tensor, got list"):
        sk.hypersphere_repulsion([[1.0]])
    with pytest.raises(TypeError, match="energy must be an energy such as LogSumExp"):
        sk.hypersphere_repulsion(GOOD, energy="log")
    with pytest.raises(TypeError, match="topk must be an int"):
        sk.MaxCosine(1.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sk.LogSumExp(0.0), r"t must be in \(0, 1e\+06\], got 0.0"),
        (lambda: sk.Gaussian(1e7), r"t must be in \(0, 1e\+06\], got 10000000.0"),
        (lambda: sk.Gaussian(math.inf), "t must be in"),
        (lambda: sk.Riesz(17), r"s must be in \(0, 16\], got 17"),
        (lambda: sk.Hinge(1.0), "threshold must be in"),
        (lambda: sk.Hinge(0.1, 3), "power must be 1 or 2, got 3"),
        (lambda: sk.MaxCosine(0), "topk must be at least 1, got 0"),
    ],
)
def test_bad_energies(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sk.LogSumExp("a"), "t must be a number, in \\(0, 1e\\+06\\], got str 'a'"),
        (lambda: sk.Gaussian(True), "t must be a number, .* got bool True"),
        (lambda: sk.Riesz(None), r"s must be a number, in \(0, 16\], got NoneType None"),
        (lambda: sk.Hinge("1"), "threshold must be a number, .* got str '1'"),
        (lambda: sk.Hinge(0.1, 2.0), "power must be an int, 1 or 2, got float 2.0"),
        (lambda: sk.MaxCosine(topk=True), "topk must be an int, at least 1, got bool True"),
    ],
)
def test_energies_of_another_type(make, message):
    with pytest.raises(TypeError, match=message):
        make()
