"""A training step of backbone and head: compiled, under autocast, on strided embeddings."""

import copy
from functools import partial

import pytest
import torch
from synface.heads import (
    AdaFace,
    ArcFaceLoss,
    CosFaceLoss,
    MagFace,
    MarginHead,
    PartialFC,
    SubCenterArcFaceLoss,
)
from synface.models.iresnet import IResNet
from synface.optim import RowSGD
from torch.utils.checkpoint import checkpoint

import synface_kernels as sk

N, D, C = 8, 16, 12

HEADS = {
    "MarginHead": lambda: MarginHead(D, C),
    "AdaFace": lambda: AdaFace(D, C, momentum=0.5),
    "MagFace": lambda: MagFace(D, C, l_a=1.0),
    "ArcFaceLoss": lambda: ArcFaceLoss(C, D),
    "CosFaceLoss": lambda: CosFaceLoss(C, D),
    "SubCenterArcFaceLoss": lambda: SubCenterArcFaceLoss(C, D),
    "PartialFC": lambda: PartialFC(sk.ArcFace(), D, C),
    "PartialFC, sampled": lambda: PartialFC(sk.ArcFace(), D, C, 0.7),
    "PartialFC, sampled, dense": lambda: PartialFC(sk.ArcFace(), D, C, 0.7, sparse=False),
}


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def dense(grad):
    return grad.to_dense() if grad.is_sparse else grad


@pytest.mark.parametrize("name", HEADS)
def test_a_step_compiles_as_one_graph(name):
    torch.compiler.reset()
    net: torch.nn.Module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, D))
    if name == "AdaFace":  # one of them behind a real network
        net = IResNet((16, 16), 1, (4,), (1,), D, dropout=0.0)
    nets = [net]
    heads = [HEADS[name]()]
    for each in (nets, heads):
        each.append(copy.deepcopy(each[0]))
    images, labels = torch.randn(N, 1, 16, 16), torch.randint(C, (N,))

    def step(net, head, images, labels):
        return head(net(images), labels)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for round_ in range(2):
        losses = []
        for run, net, head in zip((step, compiled), nets, heads, strict=True):
            torch.manual_seed(round_)
            loss = run(net, head, images, labels)
            loss.backward()
            losses.append(loss)
        torch.testing.assert_close(*losses)
    for modules in (nets, heads):
        for one, two in zip(*(m.parameters() for m in modules), strict=True):
            if one.requires_grad:
                torch.testing.assert_close(dense(one.grad), dense(two.grad), rtol=1e-4, atol=1e-5)
        for one, two in zip(*(m.buffers() for m in modules), strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", HEADS)
def test_autocast(name):
    """Embeddings are bfloat16, and so are the GEMMs' centers; sums and logits are not."""
    head = HEADS[name]()
    same = copy.deepcopy(head)
    net = torch.nn.Linear(10, D)
    images, labels = torch.randn(N, 10), torch.randint(C, (N,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = net(images)
        torch.manual_seed(1)
        loss = head(embeddings, labels)
    assert embeddings.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()
    assert net.weight.grad.isfinite().all()
    assert head.weight.grad.dtype == torch.float32
    for impl, tolerance in (("cpu", 1e-3), ("reference", 1e-5)):  # not under autocast, under it
        torch.manual_seed(1)
        same.impl, on = impl, impl == "reference"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            expected = copy.deepcopy(same)(embeddings.detach(), labels)
        torch.testing.assert_close(loss, expected, rtol=tolerance, atol=tolerance)
        assert on or not torch.equal(loss, expected)


@pytest.mark.parametrize("name", HEADS)
def test_autocast_of_a_recomputed_pass_and_of_a_step_in_the_backward_pass(name):
    """They have the bits of a pass under autocast, wherever the backward pass runs."""
    first = HEADS[name]()
    images, labels = torch.randn(N, D), torch.randint(C, (N,))

    def step(wrap, fused=False):
        head, x = copy.deepcopy(first), images.clone().requires_grad_()
        optimizer = RowSGD(head.parameters(), lr=0.5)
        if fused:
            head.step_in_backward(optimizer)
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = wrap(head, x, labels)
        loss.backward()
        optimizer.step()
        return loss, x.grad, head.weight.detach()

    plain = step(lambda head, *batch: head(*batch))
    again = step(partial(checkpoint, use_reentrant=False))
    assert all(map(torch.equal, plain, again))
    if isinstance(first, (MarginHead, PartialFC)) and first.sparse:
        assert all(map(torch.equal, plain, step(lambda head, *batch: head(*batch), True)))


@pytest.mark.parametrize("name", HEADS)
def test_strides(name):
    head = HEADS[name]().eval()
    x, labels = torch.randn(N, D), torch.randint(C, (N,))
    spread = torch.zeros(D, 2 * N).T[::2].copy_(x).requires_grad_()
    assert not spread.is_contiguous()
    x.requires_grad_()
    losses = []
    for each in (x, spread):
        torch.manual_seed(1)
        loss = head(each, labels)
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(x.grad, spread.grad)
