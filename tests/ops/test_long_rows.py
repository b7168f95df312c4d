"""Rows of any finite length have the cosines of the normalized rows.

Squares of 1e200 overflow float64, those of 1e20 float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import synface_kernels as sk
import synface_kernels.numpy
from synface_kernels import _load
from tests.helpers.cpu import cpu

ISAS = _load.cpu_isas()
N, C, D = 9, 40, 24
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
# dtype, lengths of some of x's rows and of some of y's: as great as normal gradients allow
LENGTHS = [
    (F64, 1e200, 1e180),
    (F64, 1e300, 1e300),
    (F64, 1e-9, 1e200),
    (F32, 1e30, 1.0),
    (F32, 1e32, 1e32),
    (F32, 1e-9, 1e32),
    (BF16, 1e30, 1e32),
]
# of values and of gradients, as rounding leaves them
TOLERANCES = {F64: (1e-13, 1e-12), F32: (1e-6, 1e-5), BF16: (1e-6, 1e-2)}
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "smooth": {"label_smoothing": 0.1},
    "workspace": {"workspace": 10**6},
    "class_ids": {"class_ids": torch.arange(C)},
    "sub-centers": {},
}
ENERGIES = [sk.LogSumExp(), sk.Riesz(), sk.MaxCosine(2), sk.KoLeo()]


def rows(n: int, dtype: torch.dtype, length: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows, every other one of that length; the same in double over factors; the factors."""
    unit = torch.randn(n, D, dtype=F64).clamp(-3, 3)
    given = unit.to(dtype)
    given[::2] = (unit[::2] * length).to(dtype)
    factor = given.double().abs().amax(1, keepdim=True)
    return given, given.double() / factor, factor


def assert_relatively_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    assert actual.isfinite().all()
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()


def margin(x: Tensor, w: Tensor, mode: str, **options: Any) -> tuple[Tensor, ...]:
    x, w = (v.clone().requires_grad_() for v in (x, w))
    target = torch.arange(N) * 7 % (C // 2)
    target[3] = -100
    centers = w.unflatten(0, (C // 2, 2)) if mode == "sub-centers" else w
    loss, stats = sk.margin_cross_entropy(
        x, centers, target, reduction="none", return_stats=True, **MODES[mode] | options
    )
    grad_x, grad_w = torch.autograd.grad(loss.sum() + 0.1 * stats.lse.sum(), (x, w))
    grad_w = grad_w.to_dense() if grad_w.is_sparse else grad_w
    return loss.detach(), stats.target_cosine.detach(), grad_x, grad_w


@pytest.mark.parametrize("isa", [*ISAS, "reference"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "of_x", "of_w"), LENGTHS)
def test_margin_cross_entropy(
    dtype: torch.dtype, of_x: float, of_w: float, mode: str, isa: str
) -> None:
    (x, exact_x, factor_x), (w, exact_w, factor_w) = rows(N, dtype, of_x), rows(C, dtype, of_w)
    expected = margin(exact_x, exact_w, mode, impl="reference")
    if isa == "reference":
        found = margin(x, w, mode, impl=isa)
    else:
        with cpu(isa):
            found = margin(x, w, mode, impl="cpu")
    value, gradient = TOLERANCES[dtype]
    loss, cosine, grad_x, grad_w = found
    assert_relatively_close(loss, expected[0], value)
    assert_relatively_close(cosine, expected[1], value)
    assert_relatively_close(grad_x.double() * factor_x, expected[2], gradient)
    assert_relatively_close(grad_w.double() * factor_w, expected[3], gradient)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("energy", ENERGIES, ids=str)
@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize(("dtype", "of_x", "of_y"), LENGTHS)
def test_hypersphere_repulsion(
    dtype: torch.dtype, of_x: float, of_y: float, gallery: bool, energy: Any, impl: str
) -> None:
    (x, exact_x, factor_x), (y, exact_y, factor_y) = rows(N, dtype, of_x), rows(C, dtype, of_y)

    def run(x: Tensor, y: Tensor, impl: str) -> tuple[Tensor, ...]:
        x, y = (v.clone().requires_grad_() for v in (x, y))
        loss = sk.hypersphere_repulsion(x, y if gallery else None, energy=energy, impl=impl)
        return loss.detach(), *torch.autograd.grad(loss, (x, y) if gallery else (x,))

    expected, found = run(exact_x, exact_y, "reference"), run(x, y, impl)
    value, gradient = TOLERANCES[dtype]
    assert_relatively_close(found[0], expected[0], value)
    for grad, factor, exact in zip(found[1:], (factor_x, factor_y), expected[1:], strict=False):
        assert_relatively_close(grad.double() * factor, exact, gradient)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(("dtype", "of_x", "of_y"), LENGTHS)
def test_nearest_neighbors(dtype: torch.dtype, of_x: float, of_y: float, impl: str) -> None:
    (x, exact_x, _), (y, exact_y, _) = rows(N, dtype, of_x), rows(C, dtype, of_y)
    cosine, index = sk.nearest_neighbors(x, y, 3, impl=impl)
    expected, expected_index = sk.nearest_neighbors(exact_x, exact_y, 3, impl="reference")
    assert torch.equal(index, expected_index)
    assert_relatively_close(cosine, expected, TOLERANCES[dtype][0])


def by_columns(x: Tensor) -> Tensor:
    """Return the same values with contiguous columns."""
    return x.T.contiguous().T


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("k", [1, N])
@pytest.mark.parametrize(("dtype", "of_x", "of_y"), LENGTHS)
def test_strides_change_nothing(
    dtype: torch.dtype, of_x: float, of_y: float, k: int, impl: str
) -> None:
    """Rows of which the first k are long, or short, whatever the order of their elements."""
    x, y = rows(N, dtype, 1.0)[0], rows(C, dtype, 1.0)[0]
    x[:k], y[:k] = (x[:k].double() * of_x).to(dtype), (y[:k].double() * of_y).to(dtype)
    mixed = torch.stack([x, x], 2)[..., 0]
    for a, b in ((by_columns(x), by_columns(y)), (mixed, by_columns(y))):
        assert a.stride(1) != 1
        pairs = [(x, None, a, None), (x, y, a, b)]
        for one, others, same, too in pairs:
            for energy in ENERGIES:
                found, expected = (
                    sk.hypersphere_repulsion(v.requires_grad_(), w, energy=energy, impl=impl)
                    for v, w in ((same.clone(memory_format=torch.preserve_format), too),
                                 (one.clone(), others))
                )  # fmt: skip
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
            got = sk.nearest_neighbors(same, too, 2, impl=impl)
            wanted = sk.nearest_neighbors(one, others, 2, impl=impl)
            assert torch.equal(got[1], wanted[1])
        for got, wanted in zip(
            margin(a, by_columns(y), "plain", impl=impl), margin(x, y, "plain", impl=impl),
            strict=True,
        ):  # fmt: skip
            assert_relatively_close(got, wanted.double(), TOLERANCES[dtype][1])


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_rows_that_are_not_finite_or_zero_stay_an_error(impl: str) -> None:
    for value in (float("nan"), float("inf"), 1e-30):
        x = torch.randn(5, D, dtype=F64)
        x[0] *= 1e200
        x[3] = value
        with pytest.raises(ValueError, match=r"x must have finite, non-zero rows.* in row 3"):
            sk.hypersphere_repulsion(x, impl=impl)


def test_tiny_rows_count_as_zero() -> None:
    x, w = torch.randn(N, D, dtype=F64), torch.randn(C, D, dtype=F64)
    x[0], w[0] = 1e-30, 1e-30
    for impl in ("cpu", "reference"):
        _, cosine, grad_x, grad_w = margin(x, w, "plain", impl=impl)
        assert cosine[0] == 0
        assert grad_x[0].count_nonzero() == grad_w[0].count_nonzero() == 0


def test_numpy() -> None:
    (x, exact_x, factor_x), (w, exact_w, factor_w) = rows(N, F64, 1e200), rows(C, F64, 1e180)
    labels = np.arange(N)[:, None]

    def run(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        given = x.numpy(), w.numpy(), labels
        lse, most, cosine, mean = sk.numpy.margin_cross_entropy_forward(
            *given, needs_input_grad=True
        )
        ones = np.ones(N)
        grads = sk.numpy.margin_cross_entropy_backward(*given, lse, mean, ones, ones[:, None])
        return tuple(map(torch.from_numpy, (lse, most, cosine, *grads)))

    found, expected = run(x, w), run(exact_x, exact_w)
    for value, exact in zip(found[:3], expected[:3], strict=True):
        assert_relatively_close(value, exact, 1e-13)
    assert_relatively_close(found[3] * factor_x, expected[3], 1e-12)
    assert_relatively_close(found[4] * factor_w, expected[4], 1e-12)
