"""The ops are differentiable once, in reverse mode: autograd and torch.func. Others raise."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from synface.heads import AdaFace, MagFace
from torch import Tensor

import synface_kernels as sk
from tests.helpers.ranks import on_ranks

N, C, D = 6, 10, 8
IMPLS = ("cpu", "reference")
ENERGIES = (
    sk.LogSumExp(),
    sk.Gaussian(),
    sk.Riesz(),
    sk.Log(),
    sk.Hinge(0.1),
    sk.Hinge(-0.5, power=1),
    sk.KoLeo(),
    sk.MaxCosine(),
    sk.MaxCosine(3),
    sk.ClosestPair(),
)
Loss = Callable[[Tensor, Tensor], Tensor]
SECOND = "has no second derivative"
FORWARD = "has no forward-mode derivative"


def margin_losses(impl: str) -> dict[str, Loss]:
    """Return losses of x (N, D) and w (C, D) that cover every mode."""
    target = torch.arange(N) * 7 % C
    many = torch.stack([target, (target + 1) % C], 1)
    shares = torch.full((N, 2), 0.5)
    ids = torch.tensor([0, 1, 2, 4, 5, 7, 8])

    def loss(
        x: Tensor, w: Tensor, target: Tensor = target, margin: Any = None, **options: Any
    ) -> Any:
        return sk.margin_cross_entropy(x, w, target, margin or sk.ArcFace(), impl=impl, **options)

    def stats(x: Tensor, w: Tensor) -> Any:
        return loss(x, w, return_stats=True)[1]

    adaface = AdaFace(D, C, impl=impl).eval()
    magface = MagFace(D, C, impl=impl, l_a=1.0, u_a=9.0)

    def head(head: torch.nn.Module, x: Tensor, w: Tensor) -> Any:
        return torch.func.functional_call(head, {"weight": w}, (x, target))

    return {
        "plain": loss,
        "cosface": lambda x, w: loss(x, w, margin=sk.CosFace()),
        "joint": lambda x, w: loss(x, w, many, target_weight=shares),
        "separate": lambda x, w: loss(x, w, many, target_weight=shares, mix="separate"),
        "per row": lambda x, w: loss(x, w, margin=sk.ArcFace(margin=torch.linspace(0.1, 0.5, N))),
        "class_ids": lambda x, w: loss(x, w, torch.arange(N), class_ids=ids),
        "smooth": lambda x, w: loss(x, w, label_smoothing=0.1),
        "filter": lambda x, w: loss(x, w, margin=sk.ArcFace(interclass_filter=0.3)),
        "workspace": lambda x, w: loss(x, w, workspace=10**6),
        "lse": lambda x, w: stats(x, w).lse.sum(),
        "target_cosine": lambda x, w: stats(x, w).target_cosine.sum(),
        "sub-centers": lambda x, w: loss(x, w.unflatten(0, (5, 2)), target % 5),
        "AdaFace": lambda x, w: head(adaface, x, w),
        "MagFace": lambda x, w: head(magface, x, w),
    }


def losses(impl: str) -> dict[str, Loss]:
    every = {f"margin_cross_entropy {name}": loss for name, loss in margin_losses(impl).items()}
    for energy in ENERGIES:
        every[f"{energy}"] = lambda x, w, e=energy: (
            sk.hypersphere_repulsion(x, energy=e, impl=impl) + 0 * w.sum()
        )
        every[f"{energy} gallery"] = lambda x, w, e=energy: sk.hypersphere_repulsion(
            x, w, energy=e, impl=impl
        )
    every["neighbors"] = lambda x, w: sk.nearest_neighbors(x, w, 2, impl=impl)[0].sum()
    return every


NAMES = list(losses("cpu"))
MARGIN_NAMES = [name for name in NAMES if name.startswith("margin")]


def points() -> tuple[Tensor, Tensor]:
    return torch.randn(N, D).double(), torch.randn(C, D).double()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_penalty_raises(name: str, impl: str) -> None:
    loss = losses(impl)[name]
    x, w = (v.requires_grad_() for v in points())
    (grad,) = torch.autograd.grad(loss(x, w), x, create_graph=True)
    penalty = grad.square().sum()
    with pytest.raises(RuntimeError, match=SECOND):
        penalty.backward(retain_graph=True)
    # Beside a term that does depend on x, and where unused inputs are allowed, it is not lost.
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(penalty + x.sum(), x, allow_unused=True, retain_graph=True)
    if "gallery" in name or name in MARGIN_NAMES:
        with pytest.raises(RuntimeError, match=SECOND):
            torch.autograd.grad(penalty + w.sum(), w)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", MARGIN_NAMES)
def test_a_gradient_penalty_of_the_centers_raises(name: str, impl: str) -> None:
    x, w = (v.requires_grad_() for v in points())
    (grad,) = torch.autograd.grad(losses(impl)[name](x, w), w, create_graph=True)
    penalty = (grad.to_dense() if grad.is_sparse else grad).square().sum()
    with pytest.raises(RuntimeError, match=SECOND):
        (penalty + w.sum()).backward()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_penalty_under_update_raises(impl: str) -> None:
    x, w = points()
    x.requires_grad_()
    _, stats = sk.margin_cross_entropy(
        x, w, torch.zeros(N).long(), update=sk.SGDUpdate(lr=0.1), return_stats=True, impl=impl
    )
    (grad,) = torch.autograd.grad(stats.target_cosine.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        (grad.square().sum() + x.sum()).backward()


MARGINS = {
    "m1": lambda m: sk.SphereFace(8.0, 1.3 + m),
    "m2": lambda m: sk.ArcFace(8.0, m),
    "m2, straight through": lambda m: sk.ArcFace(8.0, m, target_grad="straight_through"),
    "m2, easy": lambda m: sk.ArcFace(8.0, m, beyond_pi="easy"),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", MARGINS)
def test_a_margins_gradient_has_no_derivative(name: str, impl: str) -> None:
    """The slope is a constant of the graph, by the embeddings and by the margins."""
    x, w = points()
    x.requires_grad_()

    def loss(m: Tensor, x: Tensor) -> Any:
        return sk.margin_cross_entropy(x, w, torch.arange(N), MARGINS[name](m), impl=impl)

    m = torch.linspace(0.1, 0.5, N, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(loss(m, x), m, create_graph=True)
    assert torch.autograd.gradcheck(lambda m: loss(m, x.detach()), (m,))
    for of in (x, m):
        with pytest.raises(RuntimeError, match=SECOND):
            torch.autograd.grad(grad.sum() + of.sum(), of, retain_graph=True)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.func.grad(lambda x: torch.func.grad(loss)(m.detach(), x).sum())(x.detach())
    of_margin = torch.func.grad(loss)
    with pytest.raises((RuntimeError, NotImplementedError), match=f"{SECOND}|{FORWARD}"):
        torch.func.jvp(lambda x: of_margin(m.detach(), x), (x.detach(),), (x.detach(),))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradient_by_cosfaces_margin_has_right_derivatives(impl: str) -> None:
    x, w = points()
    m = torch.linspace(0.1, 0.5, N, dtype=torch.float64, requires_grad=True)

    def grad(m: Tensor) -> Tensor:
        loss = sk.margin_cross_entropy(x, w, torch.arange(N), sk.CosFace(8.0, m), impl=impl)
        return torch.autograd.grad(loss, m, create_graph=True)[0]

    assert torch.autograd.gradcheck(grad, (m,))


def test_the_margins_own_function_is_differentiable_once() -> None:
    cosine = torch.linspace(-0.9, 0.9, 7, dtype=torch.float64)[:, None].requires_grad_()
    (grad,) = torch.autograd.grad(
        sk.ArcFace().target_cosine(cosine).square().sum(), cosine, create_graph=True
    )
    with pytest.raises(RuntimeError, match=SECOND):
        grad.sum().backward()
    ones = torch.ones_like(cosine)
    _, slope = torch.func.jvp(sk.ArcFace().target_cosine, (cosine.detach(),), (ones,))
    (expected,) = torch.autograd.grad(sk.ArcFace().target_cosine(cosine).sum(), cosine)
    torch.testing.assert_close(slope, expected)
    assert sk.ArcFace().target_cosine(torch.tensor(0.3)).shape == ()


def _penalties(rank: int, ranks: int) -> list[str]:
    group = torch.distributed.group.WORLD
    x, y = torch.randn(5 + rank, D), torch.arange(4.0 * D).view(4, D).sin()
    messages = []
    for energy in ENERGIES:
        for gallery in (None, y):
            own = x.clone().requires_grad_()
            value = sk.hypersphere_repulsion(own, gallery, energy=energy, group=group)
            (grad,) = torch.autograd.grad(value, own, create_graph=True)
            try:
                (grad.square().sum() + own.sum()).backward()
                messages.append(f"{energy}: nothing was raised")
            except RuntimeError as error:
                messages.append(str(error))
    return messages


def test_a_gradient_penalty_over_ranks_raises(tmp_path: Path) -> None:
    for messages in on_ranks(2, _penalties, tmp_path):
        assert all("second" in message or "twice" in message for message in messages), messages


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_raises(name: str, impl: str) -> None:
    loss = losses(impl)[name]
    x, w = points()
    for at in range(1 + ("gallery" in name or name in MARGIN_NAMES)):
        only = (lambda x: loss(x, w)) if at == 0 else (lambda w: loss(x, w))
        value = (x, w)[at]
        with pytest.raises(NotImplementedError, match=FORWARD):
            torch.func.jvp(only, (value,), (value,))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=FORWARD):
            only(forward_ad.make_dual(value, value))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=FORWARD):
            only(forward_ad.make_dual(value.clone().requires_grad_(), value))
    with pytest.raises(NotImplementedError, match=FORWARD):
        torch.func.jvp(torch.func.grad(lambda x: loss(x, w)), (x,), (x,))


@pytest.mark.parametrize("impl", IMPLS)
def test_forward_mode_of_target_weights_raises(impl: str) -> None:
    x, w = points()
    target, weight = torch.zeros(N, 1).long(), torch.ones(N, 1)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weight, weight)
        with pytest.raises(NotImplementedError, match=FORWARD):
            sk.margin_cross_entropy(x, w, target, target_weight=dual, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_forward_mode_by_a_margin_is_right(impl: str) -> None:
    """Target terms are plain torch code: only input and weight lack a tangent."""
    x, w = points()
    target, margin = torch.arange(N), torch.full((N,), 0.5, dtype=torch.float64)

    def loss(margin: Tensor) -> Tensor:
        return sk.margin_cross_entropy(x, w, target, sk.ArcFace(margin=margin), impl=impl)

    _, tangent = torch.func.jvp(loss, (margin,), (torch.ones_like(margin),))
    step = 1e-6
    expected = (loss(margin + step) - loss(margin - step)) / (2 * step)
    torch.testing.assert_close(tangent, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", NAMES)
def test_func_grad_is_autograds(name: str, impl: str) -> None:
    loss = losses(impl)[name]
    x, w = points()
    leaves = [v.clone().requires_grad_() for v in (x, w)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    grads, value = torch.func.grad_and_value(loss, argnums=(0, 1))(x, w)
    assert torch.equal(value, loss(x, w))
    for grad, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, other.to_dense() if other.is_sparse else other)
    _, pull = torch.func.vjp(loss, x, w)
    torch.testing.assert_close(pull(torch.tensor(2.0).double())[0], 2 * expected[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_func_grad_twice_raises(impl: str) -> None:
    x, w = points()
    for loss in losses(impl).values():

        def penalty(x: Tensor, loss: Loss = loss) -> Tensor:
            return torch.func.grad(loss)(x, w).square().sum()

        with pytest.raises(RuntimeError, match=SECOND):
            torch.func.grad(penalty)(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", NAMES)
def test_vmap_of_grad_is_a_loop(name: str, impl: str) -> None:
    loss = losses(impl)[name]
    _, w = points()
    batch = torch.randn(3, N, D).double()
    grad = torch.func.grad(loss)
    if impl == "reference" and name not in MARGIN_NAMES:
        with pytest.raises(NotImplementedError, match=r"'reference' .* torch\.vmap: take"):
            torch.vmap(grad, (0, None))(batch, w)
        return
    expected = torch.stack([grad(x, w) for x in batch])
    torch.testing.assert_close(torch.vmap(grad, (0, None))(batch, w), expected)
    # Where vmap is inside, nothing in it seems to require a gradient.
    total = torch.func.grad(lambda batch: torch.vmap(loss, (0, None))(batch, w).sum())
    torch.testing.assert_close(total(batch), expected)


def test_what_torch_func_does_not_take_is_named() -> None:
    x, w = points()
    target = torch.arange(N)

    def update(x: Tensor) -> Tensor:
        return sk.margin_cross_entropy(x, w, target, update=sk.SGDUpdate(lr=0.1))

    with pytest.raises(NotImplementedError, match=r"update and group .* torch\.autograd"):
        torch.func.grad(update)(x)


@pytest.mark.parametrize("name", NAMES)
def test_retained_graphs_give_the_same_gradient_twice(name: str) -> None:
    x, w = (v.requires_grad_() for v in points())
    value = losses("cpu")[name](x, w)
    first = torch.autograd.grad(value, x, create_graph=True)[0]
    assert math.isfinite(first.norm().item())
    assert torch.equal(first, torch.autograd.grad(value, x)[0])


def test_transforms_inside_compiled_code_raise() -> None:
    """Dynamo's graphs would drop the tangent."""
    points = torch.randn(9, 4, dtype=torch.float64)

    def along(x: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(sk.hypersphere_repulsion, (x,), (torch.ones_like(x),))[1]

    with pytest.raises(Exception, match="hypersphere_repulsion under"):
        torch.compile(along, backend="eager", fullgraph=True)(points)
