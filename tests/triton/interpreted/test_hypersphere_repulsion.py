"""Hypersphere repulsion's Triton kernels, interpreted on CPU tensors, against float64.

Needs TRITON_INTERPRET=1 before Triton is imported; see ../test_interpreter.py.
"""

import math

import pytest
import torch
from torch import Tensor

import synface_kernels as sk
from synface_kernels.ops.hypersphere_repulsion import launch_triton
from synface_kernels.testing import assert_as_exact_as_torch

pytestmark = pytest.mark.pairwise
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
EPS = torch.finfo(F32).eps
PAIR = [
    sk.LogSumExp(300.0), sk.Riesz(), sk.Log(), sk.Hinge(0.1), sk.Hinge(-0.2, power=1),
]  # fmt: skip
NEIGHBOR = [sk.MaxCosine(topk=2), sk.KoLeo(), sk.ClosestPair()]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make several blocks of few points, of four tiles each, for the interpreter is slow."""
    monkeypatch.setattr(launch_triton, "TILE", 8)
    monkeypatch.setattr(launch_triton, "GROUP", 4)
    monkeypatch.setattr(launch_triton, "_most", lambda width, dtype, weights: 16)


def points(n: int, m: int | None, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(n + d)
    x = torch.randn(n, d, generator=g).to(dtype)
    if dtype != F16:  # whose gradients might overflow, as the reference's would
        x[n // 2] = 2 * x[1]  # the same point, in another block
    x[n - 1] = x[0] + 0.01 * x[2]
    y = None if m is None else torch.randn(m, d, generator=g).to(dtype)
    if y is not None and dtype != F16:
        y[m // 2] = x[3]
    return x, y


def run(x: Tensor, y: Tensor | None, energy: object, dtype: torch.dtype, impl: str):
    inputs = [v.to(dtype, copy=True).requires_grad_() for v in (x, y) if v is not None]
    loss = sk.hypersphere_repulsion(*inputs, energy=energy, impl=impl)
    return loss.detach(), *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("energy", PAIR + NEIGHBOR, ids=str)
@pytest.mark.parametrize("gallery", [False, True])
def test_matches_float64(energy: object, gallery: bool, dtype: torch.dtype) -> None:
    for n, m, d in ((5, 4, 2), (21, 18, 5)) if dtype == F32 else ((19, 5, 3),):
        x, y = points(n, m if gallery else None, d, dtype)
        exact = run(x, y, energy, torch.float64, "reference")
        plain = run(x, y, energy, dtype, "reference")
        actual = run(x, y, energy, dtype, "triton")
        for a, e, p in zip(actual, exact, plain, strict=True):
            # In units of the greatest element, as the pair that coincides outweighs all others.
            sharpness = 1 + getattr(energy, "t", 0)
            atol = 4 * EPS * sharpness * max(e.abs().max().item(), 1 / n)
            assert_as_exact_as_torch(a, e, p, atol=atol, name=str(energy))


@pytest.mark.parametrize("gallery", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_neighbors_are_exact(gallery: bool, dtype: torch.dtype) -> None:
    x, y = points(21 if dtype == F32 else 11, 19 if gallery else None, 5, dtype)
    for k in (1, 3):
        cosine, index = sk.nearest_neighbors(x, y, k, impl="triton")
        values, expected = sk.nearest_neighbors(x, y, k, impl="reference")
        assert (cosine - values).abs().max() <= EPS
        assert torch.equal(index, expected)


@pytest.mark.parametrize("gallery", [False, True])
def test_ties_go_to_the_lowest_index(gallery: bool) -> None:
    """All points are at two positions, so more cosines are equal than a row has room for."""
    signs = torch.randint(0, 2, (40, 1), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    x, y = signs, signs[1:].clone() if gallery else None
    cosine, index = sk.nearest_neighbors(x, y, 2, impl="triton")
    values, expected = sk.nearest_neighbors(x, y, 2, impl="reference")
    assert torch.equal(cosine, values)
    assert torch.equal(index, expected)


@pytest.mark.parametrize("t", [1.0, 1e5])
def test_exponentials_neither_vanish_nor_overflow(t: float) -> None:
    for cosine, x in (
        (-1.0, torch.tensor([[1.0, 0.0], [-2.0, 0.0]])),
        (0.0, torch.eye(9)),
        (-1 / 8, torch.eye(9) - 1 / 9),  # the last tile has one point, and no pair
        (0.3, torch.tensor([[1.0, 0.0], [0.3, math.sqrt(1 - 0.09)]])),
    ):
        x = x.clone().requires_grad_()
        loss = sk.hypersphere_repulsion(x, energy=sk.LogSumExp(t), impl="triton")
        assert loss.item() == pytest.approx(cosine, abs=2e-7)
        loss.backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("energy", [sk.LogSumExp(), sk.Log(), sk.MaxCosine()], ids=str)
@pytest.mark.parametrize("gallery", [False, True])
def test_two_runs_agree_bitwise(gallery: bool, energy: object, dtype: torch.dtype) -> None:
    x, y = points(19, 6 if gallery else None, 3, dtype)
    first, second = (run(x, y, energy, dtype, "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("energy", [sk.LogSumExp(), sk.KoLeo()], ids=str)
@pytest.mark.parametrize("dtypes", [(F32, BF16), (BF16, F16)], ids=str)
def test_a_gallery_of_another_dtype(energy: object, dtypes: tuple[torch.dtype, ...]) -> None:
    """The GEMMs take the points' own bits, so the values are those of float32 points."""
    x, y = points(11, 9, 3, F32)
    inputs = [v.to(dtype).requires_grad_() for v, dtype in zip((x, y), dtypes, strict=True)]
    loss = sk.hypersphere_repulsion(*inputs, energy=energy, impl="triton")
    exact = [v.detach().double().requires_grad_() for v in inputs]
    expected = sk.hypersphere_repulsion(*exact, energy=energy, impl="reference")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for given, actual, e in zip(
        inputs, torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, exact), strict=True
    ):
        assert actual.dtype == given.dtype
        eps = torch.finfo(given.dtype).eps + 20 * EPS
        assert (actual.double() - e).abs().max() <= eps * e.abs().max()


@pytest.mark.parametrize("y", [False, True])
def test_one_gradient_alone(y: bool) -> None:
    inputs = list(points(19, 18, 3, BF16))
    inputs[y].requires_grad_()
    for energy in (sk.LogSumExp(), sk.Hinge(0.1), sk.KoLeo()):
        both = [v.detach().clone().requires_grad_() for v in inputs]
        (one,) = torch.autograd.grad(
            sk.hypersphere_repulsion(*inputs, energy=energy, impl="triton"), inputs[y]
        )
        expected = torch.autograd.grad(
            sk.hypersphere_repulsion(*both, energy=energy, impl="triton"), both
        )
        assert torch.equal(one, expected[y])


@pytest.mark.parametrize("t", [10.0, 1e4])
@pytest.mark.parametrize("descending", [False, True])
def test_weights_whose_units_change_from_block_to_block(t: float, descending: bool) -> None:
    """Each block's pairs are nearer, or farther, than those of the block before."""
    turn = torch.linspace(0.0, 1.4, 24).flip(0) if descending else torch.linspace(0.0, 1.4, 24)
    side = 1 - 2 * (torch.arange(24) % 2)
    x = torch.stack([turn.cos() * side, turn.sin()], 1)
    exact = run(x, None, sk.LogSumExp(t), torch.float64, "reference")
    plain = run(x, None, sk.LogSumExp(t), F32, "reference")
    actual = run(x, None, sk.LogSumExp(t), F32, "triton")
    for a, e, p in zip(actual, exact, plain, strict=True):
        assert_as_exact_as_torch(a, e, p, atol=4 * EPS * t * max(e.abs().max().item(), 1 / 24))


def test_tf32_rounds_points_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten bits remain, rounded: the interpreter's GEMM then has TF32's error, and no more."""
    monkeypatch.setattr(launch_triton, "float32_precision", lambda: "tf32")
    x, _ = points(19, None, 5, F32)
    loss, grad = run(x, None, sk.LogSumExp(), F32, "triton")
    exact, exact_grad = run(x, None, sk.LogSumExp(), torch.float64, "reference")
    assert 0 < abs(loss.item() - exact.item()) <= 2**-10
    assert (grad - exact_grad).abs().max() <= 40 * 2**-9 * exact_grad.abs().max()
    for k in (1, 3):  # the search stays exact
        found = sk.nearest_neighbors(x, k=k, impl="triton")[1]
        assert torch.equal(found, sk.nearest_neighbors(x, k=k, impl="reference")[1])


def test_bad_rows() -> None:
    x = torch.eye(4)
    x[2] = 0
    with pytest.raises(ValueError, match=r"x must have finite, non-zero rows.*in row 2"):
        sk.hypersphere_repulsion(x, impl="triton")


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_workspace_is_bounded(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, weights: bool
) -> None:
    monkeypatch.undo()
    for width in (16, 512, 4096):
        most = launch_triton._most(width, dtype, weights)
        per_pair = dtype.itemsize if weights else 8 / launch_triton.GROUP
        per_point = 2 * (width * dtype.itemsize + 4)
        assert most**2 * per_pair + most * per_point <= launch_triton.WORKSPACE_BYTES
        for n in (1, 127, 10_000, 1_000_003):
            size = launch_triton._size(n, most)
            assert size % launch_triton.TILE == 0
            assert size <= most
            assert -(-n // size) <= -(-n // most) + 1
