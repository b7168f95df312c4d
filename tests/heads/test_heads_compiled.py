"""Heads and margins, compiled with symbolic sizes and floats, agree with eager mode."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from synface.heads import AdaFace, ArcFaceLoss, CosFaceLoss, MagFace, MarginHead, PartialFC
from torch import Tensor

import synface_kernels as sk

D, C = 8, 11
HEADS: dict[str, Callable[[], torch.nn.Module]] = {
    "ArcFace": lambda: MarginHead(D, C, init_std=1.0),
    "sub-centers": lambda: MarginHead(D, C, sk.SphereFace(), sub_centers=2, init_std=1.0),
    "AdaFace": lambda: AdaFace(D, C, init_std=1.0, momentum=0.5),
    "MagFace": lambda: MagFace(D, C, l_a=1.0, u_a=40.0, init_std=1.0),
    "MagFace easy": lambda: MagFace(D, C, l_a=1.0, u_a=40.0, init_std=1.0, beyond_pi="easy"),
    "PartialFC": lambda: PartialFC(sk.CombinedMargin(32.0, 1.1, 0.2, 0.1), D, C),
    "ArcFaceLoss": lambda: ArcFaceLoss(C, D),
    "CosFaceLoss": lambda: CosFaceLoss(C, D),
}
MARGINS: dict[str, Callable[[Any, Any], sk.CombinedMargin]] = {
    "ArcFace": sk.ArcFace,
    "CosFace": sk.CosFace,
    "SphereFace": lambda s, m: sk.SphereFace(s, 1 + m),
    "CombinedMargin": lambda s, m: sk.CombinedMargin(s, 1 + m, m, m / 2),
    "easy": lambda s, m: sk.ArcFace(s, m, "easy"),
    "none": lambda s, m: sk.ArcFace(s, m, "none"),
    "filter": lambda s, m: sk.ArcFace(s, 0.5, interclass_filter=m),
}
# Their graphs hold no operation that another's lacks: autograd's tracing of one graph is enough.
HEADS_ALIKE = {"sub-centers", "MagFace easy", "ArcFaceLoss", "CosFaceLoss"}
MARGINS_ALIKE = {"ArcFace", "CosFace", "SphereFace", "none"}


@pytest.fixture(autouse=True)
def _compiled_anew() -> None:
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], alike: bool = False, **options: Any) -> Any:
    backend = "eager" if alike else "aot_eager"
    return torch.compile(function, dynamic=True, backend=backend, **options)


def step(call: Callable[..., Tensor], head: torch.nn.Module, n: int) -> tuple[Tensor, ...]:
    x = (torch.arange(n * D).view(n, D).sin() * 9).requires_grad_()
    loss = call(x, torch.arange(n) % C)
    parameters = [p for p in head.parameters() if p.requires_grad]
    return loss.detach(), *torch.autograd.grad(loss, [x, *parameters])


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.slow
def test_heads(name: str) -> None:
    eager = HEADS[name]()
    head = copy.deepcopy(eager)
    call = compiled(head, name in HEADS_ALIKE, fullgraph=True)
    for n in (7, 9):
        torch.testing.assert_close(step(call, head, n), step(eager, eager, n))
    for found, expected in zip(head.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.slow
def test_margins_of_symbolic_floats(name: str) -> None:
    x, w, target = torch.randn(6, D, requires_grad=True), torch.randn(C, D), torch.arange(6)

    def loss(s: float, m: float) -> Tensor:
        return sk.margin_cross_entropy(x, w, target, MARGINS[name](s, m))

    call = compiled(loss, name in MARGINS_ALIKE, fullgraph=True)
    for s, m in ((64.0, 0.5), (16.0, 0.25)):
        found, expected = call(s, m), loss(s, m)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))


@pytest.mark.parametrize("make", [sk.LogSumExp, sk.Gaussian, sk.Riesz, lambda t: sk.Hinge(t / 16)])
def test_energies_of_symbolic_floats(make: Any) -> None:
    x = torch.randn(6, D)
    call = compiled(lambda t: sk.hypersphere_repulsion(x, energy=make(t)), fullgraph=True)
    for t in (4.0, 8.0, 12.0):
        torch.testing.assert_close(call(t), sk.hypersphere_repulsion(x, energy=make(t)))


@pytest.mark.parametrize("first", [16.0, -1.0])
@pytest.mark.slow
def test_bad_values_raise_in_compiled_code(first: float) -> None:
    x, w, target = torch.randn(6, D), torch.randn(C, D), torch.arange(6)
    call = compiled(lambda s, m: sk.margin_cross_entropy(x, w, target, sk.ArcFace(s, m)))
    if first > 0:
        call(first, 0.5)
    for scale, bad in itertools.product((-1.0, 0.0, math.nan, math.inf, 1e308), (False, True)):
        with pytest.raises(ValueError, match=r"scale must be (finite and positive|at most)"):
            call(scale, 0.25 if bad else 0.5)
    with pytest.raises(ValueError, match="m2 is an angle in radians"):
        call(16.0, 28.6)
