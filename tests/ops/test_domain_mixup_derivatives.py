"""Higher orders, forward mode and torch.func differentiate domain mixup as plain torch does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import synface_kernels as sk

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
FLIP = torch.tensor([[True, False], [True, True]])
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def pair(dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    synthetic, real = (torch.rand(2, 2, 3, 3, generator=rng, dtype=F64).to(dtype) for _ in range(2))
    return synthetic, real


def mixer(layout: Any = "NHWC", **options: Any) -> Callable[..., Tensor]:
    def run(synthetic: Tensor, real: Tensor, psi: Tensor) -> Tensor:
        if layout == "NCHW":
            synthetic, real = synthetic.permute(0, 3, 1, 2), real.permute(0, 3, 1, 2)
        given = {"mean": MEAN, "std": STD, "flip": FLIP, "dtype": F64} | options
        return sk.domain_mixup(synthetic, real, psi, layout=layout, **given)

    return run


def plain(synthetic: Tensor, real: Tensor, psi: Tensor) -> Tensor:
    """Compute what `mixer` does in torch's own differentiable operations."""
    sides = [
        torch.stack([x.flip(1) if f else x for x, f in zip(side, flags, strict=True)])
        for side, flags in zip((synthetic, real), FLIP.tolist(), strict=True)
    ]
    share = psi.expand(2).view(-1, 1, 1, 1)
    mixed = share * sides[0] + (1 - share) * sides[1]
    return ((mixed - torch.tensor(MEAN, dtype=F64)) / torch.tensor(STD, dtype=F64)).permute(
        0, 3, 1, 2
    )


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_gradgradcheck(impl: str) -> None:
    shares = (torch.tensor([0.3, 0.6], dtype=F64), torch.tensor(0.4, dtype=F64))
    for layout, memory_format, psi in (
        ("NHWC", torch.contiguous_format, shares[0]),
        ("NCHW", torch.channels_last, shares[0]),
        ("NCHW", torch.contiguous_format, shares[1]),
        ("NHWC", torch.channels_last, shares[1]),
    ):
        run = mixer(layout, memory_format=memory_format, impl=impl)
        inputs = [t.clone().requires_grad_() for t in (*pair(), psi)]
        assert torch.autograd.gradgradcheck(run, inputs)
    (synthetic, real, share), run = inputs, mixer(impl=impl)
    assert torch.autograd.gradgradcheck(lambda p: run(synthetic.detach(), real.detach(), p), share)
    square = run(synthetic, real.detach(), 0.3).square().sum()  # ψ asks for no gradient
    (first,) = torch.autograd.grad(square, synthetic, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), synthetic)
    expected = (2 * 0.3**2 / torch.tensor(STD, dtype=F64).square()).expand(second.shape)
    torch.testing.assert_close(second, expected)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_four_orders_are_those_of_plain_torch(impl: str) -> None:
    inputs = [t.requires_grad_() for t in (*pair(), torch.tensor([0.3, 0.6], dtype=F64))]
    results = []
    for run in (mixer(impl=impl), plain):
        value = run(*inputs).square().sum()
        orders = []
        for _ in range(4):
            found = torch.autograd.grad(value, inputs, create_graph=True)
            orders += [t.detach() for t in found]
            value = sum((t / 10).square().sum() for t in found)
        results.append(orders)
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max())
        )
    assert results[0][-1].abs().max() > 1


def test_bytes_leave_the_second_derivative_of_psi() -> None:
    """A gradient penalty reaches psi where the images, being bytes, have no gradient."""
    synthetic, real = (torch.randint(256, (2, 4, 4, 3), dtype=torch.uint8) for _ in range(2))
    psi = torch.tensor(0.25, dtype=F64, requires_grad=True)
    mixed = sk.domain_mixup(synthetic, real, psi, dtype=F64)
    (first,) = torch.autograd.grad(mixed.square().sum(), psi, create_graph=True)
    first.backward()
    difference = (synthetic.double() - real.double()) / 255 / 0.5
    torch.testing.assert_close(psi.grad, 2 * difference.square().sum())


@pytest.mark.parametrize("dtype", [F32, BF16, F16, F64])
def test_forward_mode(dtype: torch.dtype) -> None:
    """Values have the op's bits; tangents are those of the formula."""
    inputs = (*pair(F32), torch.tensor([0.3, 0.6]))
    along = tuple(torch.randn_like(t) for t in inputs)
    run = mixer(dtype=dtype)
    expected = torch.func.jvp(plain, inputs, along)[1].to(dtype)
    value, tangent = torch.func.jvp(run, inputs, along)
    with forward_ad.dual_level():
        dual = run(*(forward_ad.make_dual(t, d) for t, d in zip(inputs, along, strict=True)))
        again = forward_ad.unpack_dual(dual)
    for got, by in ((value, tangent), again):
        assert torch.equal(got, run(*inputs))
        torch.testing.assert_close(by, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    inputs = tuple(t.double().requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(mixer(), inputs, check_forward_ad=True)


def test_torch_func() -> None:
    """grad, vmap of it, and Hessians are those of plain torch."""
    inputs = (*pair(), torch.tensor([0.3, 0.6], dtype=F64))

    def loss(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given: run(*given).sin().sum()

    ours, theirs = loss(mixer()), loss(plain)
    every = (0, 1, 2)
    many = tuple(torch.stack([t, t.flip(0)]) for t in inputs)
    for transform, given in (
        (lambda f: torch.func.grad(f, every), inputs),
        (lambda f: torch.vmap(torch.func.grad(f, every)), many),
        (lambda f: torch.func.hessian(f, 2), inputs),
        (lambda f: torch.func.jacrev(torch.func.jacfwd(f, 2), 0), inputs),
    ):
        got, expected = transform(ours)(*given), transform(theirs)(*given)
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match=r"psi must be in \[0, 1\], got -1 in row 1"):
        torch.func.grad(ours, 2)(*inputs[:2], torch.tensor([0.5, -1.0], dtype=F64))


@pytest.mark.parametrize(
    "transform", [torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))]
)
def test_transforms_compile_to_one_graph(transform: Any) -> None:
    synthetic, real = pair(F32)

    def loss(x: Tensor) -> Tensor:
        return sk.domain_mixup(x, real, 0.3).square().sum()

    compiled = torch.compile(transform(loss), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(synthetic), transform(loss)(synthetic))


def test_what_a_transform_does_not_go_through() -> None:
    (synthetic, real), psi = pair(), torch.tensor(0.5)
    for options, error, message in (
        ({"impl": "cpu"}, RuntimeError, "impl='cpu' of domain_mixup cannot run here.*impl='auto'"),
        ({"out": torch.empty(2, 3, 2, 3, dtype=F64)}, ValueError, "out takes no part in autograd"),
    ):
        with pytest.raises(error, match=message):
            torch.func.grad(lambda x: mixer(**options)(x, real, psi).sum())(synthetic)  # noqa: B023
    many, out = synthetic.expand(4, *synthetic.shape), torch.empty(4, 2, 3, 2, 3, dtype=F64)
    with pytest.raises(ValueError, match=r"out cannot be written under torch\.vmap: call without"):
        torch.vmap(lambda x, out: mixer(out=out)(x, real, psi))(many, out)


@pytest.mark.slow
def test_opcheck_of_the_backward_pass() -> None:
    synthetic, real = (t.permute(0, 3, 1, 2).requires_grad_() for t in pair(F32))
    psi = torch.tensor([0.3, 0.6], dtype=F64, requires_grad=True)
    gradient = torch.randn(2, 3, 2, 3, requires_grad=True)
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(
            torch.ops.synface_kernels.domain_mixup_backward,
            (gradient, synthetic, real, psi, MEAN, STD, FLIP[0], None, *needs, "cpu"),
        )


def test_identity_mixup_under_torch_func() -> None:
    first, second = torch.randn(2, 3, dtype=F64), torch.randn(2, 3, dtype=F64)
    phi = torch.rand(4, 2, dtype=F64)
    got = torch.vmap(torch.func.grad(lambda p: sk.identity_mixup(first, second, p).square().sum()))(
        phi
    )
    mixed = phi[:, :, None] * first + (1 - phi[:, :, None]) * second
    torch.testing.assert_close(got, (2 * mixed * (first - second)).sum(2))
    value, tangent = torch.func.jvp(
        lambda p: sk.identity_mixup(first, second, p), (phi[0],), (torch.ones(2, dtype=F64),)
    )
    torch.testing.assert_close((value, tangent), (mixed[0], first - second))
