"""Rows whose squares overflow float32 go through the Triton kernels with finite results.

Needs TRITON_INTERPRET=1 before Triton is imported; see ../test_interpreter.py.
"""

import pytest
import torch
from torch import Tensor

import synface_kernels as sk

N, C, D = 5, 20, 16


def rows(n: int, length: float, dtype: torch.dtype) -> Tensor:
    x = torch.randn(n, D)
    x[::2] *= length
    return x.to(dtype)


@pytest.mark.usefixtures("design")
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(
    ("dtype", "of_x", "of_w"),
    [(torch.float32, 1e30, 1.0), (torch.float32, 1e-5, 1e30), (torch.bfloat16, 1e20, 1e15)],
)
def test_margin_cross_entropy(dtype: torch.dtype, of_x: float, of_w: float, sampled: bool) -> None:
    target = torch.arange(N)
    ids = torch.arange(C) if sampled else None

    def run(x: Tensor, w: Tensor, impl: str) -> tuple[Tensor, ...]:
        x, w = (v.clone().requires_grad_() for v in (x, w))
        loss = sk.margin_cross_entropy(x, w, target, class_ids=ids, reduction="none", impl=impl)
        grad_x, grad_w = torch.autograd.grad(loss.sum(), (x, w))
        return loss.detach(), grad_x, grad_w.to_dense() if sampled else grad_w

    x, w = rows(N, of_x, dtype), rows(C, of_w, dtype)
    found = run(x, w, "triton")
    expected = run(x.double(), w.double(), "reference")
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for value, exact, factor in zip(found, expected, (None, x, w), strict=True):
        length = 1 if factor is None else factor.double().norm(dim=1, keepdim=True)
        assert value.isfinite().all()
        error = (value.double() - exact) * length
        assert error.abs().max() <= tolerance * (exact * length).abs().max()


@pytest.mark.usefixtures("design")
@pytest.mark.parametrize(("of_x", "of_w"), [(1.0, 1e18), (1.0, 1e30), (1e10, 1e14)])
def test_gradients_by_centers_that_are_all_long(of_x: float, of_w: float) -> None:
    x, w = torch.randn(N, D) * of_x, torch.randn(C, D) * of_w

    def gradient(w: Tensor, x: Tensor, impl: str) -> Tensor:
        w = w.clone().requires_grad_()
        loss = sk.margin_cross_entropy(x, w, torch.arange(N), impl=impl)
        return torch.autograd.grad(loss, w)[0]

    found = gradient(w, x, "triton").double() * of_w
    expected = gradient(w.double(), x.double(), "reference") * of_w
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_pair_energies() -> None:
    x = rows(N, 1e30, torch.float32).requires_grad_()
    found = sk.hypersphere_repulsion(x, impl="triton")
    (grad,) = torch.autograd.grad(found, x)
    exact = x.detach().double().requires_grad_()
    expected = sk.hypersphere_repulsion(exact, impl="reference")
    (exact_grad,) = torch.autograd.grad(expected, exact)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    length = exact.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(grad * length, exact_grad * length, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("length", [1e17, 1e30])
def test_neighbors(length: float) -> None:
    x = rows(N, length, torch.float32)
    assert torch.equal(
        sk.nearest_neighbors(x, impl="triton")[1], sk.nearest_neighbors(x, impl="reference")[1]
    )
