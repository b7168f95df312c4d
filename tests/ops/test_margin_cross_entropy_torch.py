"""The margin softmax under torch.compile and torch.export."""

from __future__ import annotations

import pytest
import torch

import synface_kernels as sk
from tests.helpers.margin import OPTIONS, problem, problem_of


@pytest.mark.slow
def test_compile_fullgraph():
    x, w, target, t, _ = problem(8, 40, 16, 2, torch.float32)
    x, w = x.float().requires_grad_(), w.float().requires_grad_()

    def step(x, w, target, t):
        loss, stats = sk.margin_cross_entropy(
            x, w, target, sk.ArcFace(), target_weight=t, return_stats=True, workspace=1000
        )
        return loss + 1e-4 * stats.lse.square().mean(), stats.top1

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for n in (8, 5):
        args = (x[:n], w, target[:n], t[:n].float())
        actual, top1 = compiled(*args)
        expected, expected_top1 = step(*args)
        torch.testing.assert_close(actual, expected)
        assert torch.equal(top1, expected_top1)
        for a, e in zip(
            torch.autograd.grad(actual, (x, w)), torch.autograd.grad(expected, (x, w)), strict=True
        ):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "backend"),
    [("smoothing", "inductor"), ("zero", "aot_eager"), ("sub-centers", "aot_eager")],
)
def test_compile_fullgraph_with_options(name, backend):
    """Inductor's own code for the last two is that for the first."""
    x, w, target, t, _ = problem_of(8, 40, 2, 16, 2, torch.float32)
    w = w if name == "sub-centers" else w.flatten(0, 1)
    x, w, t = x.float().requires_grad_(), w.float().requires_grad_(), t.float()

    def step(x, w, target, t):
        return sk.margin_cross_entropy(x, w, target, target_weight=t, **OPTIONS[name])

    actual = torch.compile(step, fullgraph=True, backend=backend)(x, w, target, t)
    expected = step(x, w, target, t)
    torch.testing.assert_close(actual, expected)
    grads = torch.autograd.grad(actual, (x, w))
    for a, e in zip(grads, torch.autograd.grad(expected, (x, w)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["plain", "class_ids", "autocast"])
def test_compile_fullgraph_without_a_gradient(name, impl):
    x, w, target, _, _ = problem(8, 40, 16, 1, torch.float32)
    x, w, ids = x.float(), w.float(), torch.arange(40) if name == "class_ids" else None

    def loss(x, w):
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
            return sk.margin_cross_entropy(x, w, target, class_ids=ids, impl=impl)

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w), loss(x, w))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x.requires_grad_(), w), loss(x, w))


@pytest.mark.parametrize(("impl", "backend"), [("cpu", "inductor"), ("reference", "aot_eager")])
@pytest.mark.slow
def test_compile_fullgraph_with_class_ids(impl, backend):
    x, w, target, _, _ = problem(8, 40, 16, 1, torch.float32)
    x, w = x.float().requires_grad_(), w.float().requires_grad_()

    def step(x, w, target, ids):
        return sk.margin_cross_entropy(x, w, target, class_ids=ids, impl=impl)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for num_sampled in (12, 17):
        ids, indices = sk.sample_classes(target, 40, num_sampled)
        dx, dw = torch.autograd.grad(compiled(x, w, indices, ids), (x, w))
        assert not dw.is_sparse
        expected = torch.autograd.grad(step(x, w, indices, ids), (x, w))
        torch.testing.assert_close(dx, expected[0])
        torch.testing.assert_close(dw, expected[1].to_dense())


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, x, w, target):
            return sk.margin_cross_entropy(x, w, target, sk.CosFace())

    x, w, target, _, _ = problem(8, 40, 16, 1, torch.float32)
    args = (x.float(), w.float(), target)
    exported = torch.export.export(Loss(), args)
    torch.testing.assert_close(exported.module()(*args), Loss()(*args))
