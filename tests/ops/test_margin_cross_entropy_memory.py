"""Memory of the margin softmax: the workspace, class ids, peaks, and no needless work."""

from __future__ import annotations

import itertools
import math
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import synface_kernels as sk
from synface_kernels.testing import peak_bytes
from tests.helpers.forked import numbers_of
from tests.helpers.margin import COMBINED, ISAS, OPTIONS, problem, problem_of, run, sampled


def test_only_what_is_asked_for_is_computed():
    x, w, target, _, _ = problem(4, 9, 8, 1, torch.float32)
    labels = target[:, None]
    op = torch.ops.synface_kernels
    forward = partial(op.margin_cross_entropy_forward, x, w, None, labels, 64.0, math.inf)
    out = forward(False, False, 0, False, "cpu")
    assert [v.numel() for v in out[3:]] == [0] * 5
    g = torch.ones(4, dtype=torch.float64)
    out = forward(True, False, 0, False, "cpu")
    for needs in itertools.product((False, True), repeat=2):
        grads = op.margin_cross_entropy_backward(
            x,
            w,
            None,
            labels,
            out[0],
            *out[5:],
            g,
            g[:, None],
            g[:0],
            64.0,
            math.inf,
            *needs,
            False,
            "cpu",
        )
        assert [tuple(v.shape) for v in grads] == [
            tuple(v.shape) if need else (0,) for v, need in zip((x, w), needs, strict=True)
        ]
    x.requires_grad_()  # frozen centers
    sk.margin_cross_entropy(x, w, target).backward()
    assert x.grad is not None
    assert w.grad is None


WORKSPACE = {
    **{name: (name, {}, torch.float32) for name in OPTIONS},
    "class ids": ("plain", {"class_ids": torch.arange(1, 1500, 2)}, torch.float32),
    "float64": ("drop", {}, torch.float64),
    "bfloat16": ("plain", {}, torch.bfloat16),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", WORKSPACE)
def test_no_bit_depends_on_the_workspace(name, isa, monkeypatch):
    """Ignored rows, and NaN rows with a zero upstream gradient, are included."""
    monkeypatch.setenv("SYNFACE_CPU_ISA", isa)
    option, more, dtype = WORKSPACE[name]
    options = {"margin": COMBINED, **OPTIONS[option], **more}
    n, m = 530, 2 if option == "sub-centers" else 1  # two blocks of rows, several tiles
    x, w, target, t, upstream = problem_of(n, 1500, m, 24, 2, dtype)
    w = w if m > 1 else w.flatten(0, 1)
    target = target % 750  # indices into class_ids
    target[7] = -100
    x[3, 5], upstream[3] = math.nan, 0
    each = m * n * (8 if dtype == torch.float64 else 4)  # bytes of a class
    results = [
        run(x, w, target, t, upstream, dtype, workspace=workspace, **options)
        for workspace in (0, "auto", each - 1, 700 * each, 10**9)
    ]
    assert results[0][0].isnan().nonzero().tolist() == [[3]]
    for gradient in results[0][1:]:
        dense = gradient.to_dense()
        assert dense.isfinite().all()
        assert dense.any()
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert torch.equal(a.to_dense().nan_to_num(9), b.to_dense().nan_to_num(9))


def test_what_the_workspace_saves():
    x, w, target, _, _ = problem(4, 90, 8, 1, torch.float32)
    target[2] = -1
    op = torch.ops.synface_kernels
    forward = partial(op.margin_cross_entropy_forward, x.float(), w.float(), None, target[:, None])
    valid = [0, 1, 3]
    for workspace, classes in ((0, 0), (4 * 4 - 1, 0), (50 * 4 * 4, 50), (10**6, 90)):
        saved = forward(64.0, math.inf, False, False, workspace, False, "cpu")[-1]
        assert saved.shape == (classes, 4)
        cosine = F.linear(F.normalize(w), F.normalize(x))[:classes, valid]
        cosine[torch.arange(classes)[:, None] == target[valid]] = -torch.inf
        torch.testing.assert_close(saved[:, :3], cosine.float(), rtol=1e-5, atol=1e-6)
        assert not saved[:, 3].any()
    x, w = x.float().requires_grad_(), w.float().requires_grad_()
    loss = sk.margin_cross_entropy(x, w, target, ignore_index=-1, workspace=10**6)
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    for a, b in zip(torch.autograd.grad(loss, (x, w)), first, strict=True):
        assert torch.equal(a, b)


def ahead(loss):
    """Return the gradient of the centers that the graph of a loss holds, if any, in a dict."""
    node = loss.grad_fn
    while node is not None and not hasattr(node, "ahead"):
        node = next((next_node for next_node, _ in node.next_functions if next_node), None)
    return None if node is None else node.ahead


IN_GRADIENT = {  # N, D, dtype: how many cosines a center's row takes
    "a part of a row": (40, 64, torch.float32, 40),
    "the whole row": (90, 64, torch.float32, 64),
    "a whole block": (700, 520, torch.float32, 512),
    "two blocks, but one is saved": (600, 1100, torch.float64, 512),
    "half a row": (90, 64, torch.bfloat16, 32),
    "half a row of float16": (90, 64, torch.float16, 32),
    "one number": (3, 1, torch.float32, 1),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("case", IN_GRADIENT)
def test_cosines_in_the_memory_of_the_gradient(case, isa, monkeypatch):
    monkeypatch.setenv("SYNFACE_CPU_ISA", isa)
    n, d, dtype, columns = IN_GRADIENT[case]
    x, w, target, _, _ = problem(n, 600, d, 1, dtype)
    x, w = (v.to(dtype).requires_grad_() for v in (x, w))
    target[1] = -1
    loss = sk.margin_cross_entropy(x, w, target, ignore_index=-1)
    rows = ahead(loss)["rows"]
    assert (rows.shape, rows.dtype) == (w.shape, w.dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    valid = [0, *range(2, n)][:columns]
    cosine = F.linear(F.normalize(w.to(wide)), F.normalize(x.to(wide)))[:, valid].detach()
    cosine[target[valid], torch.arange(len(valid))] = -torch.inf
    saved = rows.detach().view(wide)[:, : len(valid)]
    torch.testing.assert_close(saved, cosine, rtol=1e-5, atol=1e-5)
    where = rows.data_ptr()
    del rows
    loss.backward(retain_graph=True)
    assert not ahead(loss)
    assert w.grad.data_ptr() == where  # not copied
    first = w.grad
    second = torch.autograd.grad(loss, (x, w))
    expected = torch.autograd.grad(
        sk.margin_cross_entropy(x, w, target, ignore_index=-1, workspace=0), (x, w)
    )
    for gradients in (second, (x.grad, first)):
        for a, b in zip(gradients, expected, strict=True):
            assert torch.equal(a, b)


def test_where_no_gradient_is_allocated_early():
    x, w, target, _, _ = problem(6, 9, 8, 1, torch.float32)
    x, w = x.float().requires_grad_(), w.float().requires_grad_()
    loss = partial(sk.margin_cross_entropy, target=target)
    assert ahead(loss(x, w))
    assert ahead(loss(x, w.detach())) is None
    assert ahead(loss(x, w, workspace=0)) is None
    assert ahead(loss(x, w, impl="reference")) is None
    odd = w.detach()[:, 1:].bfloat16().requires_grad_()  # rows of no whole number of cosines
    assert ahead(loss(x[:, 1:], odd)) is None
    for more, early in ((10, True), (11, False)):  # 64 and 70 rows, of which 8 fit
        rows, labels = torch.cat([x] * more + [x[:4]]), torch.cat([target] * more + [target[:4]])
        assert bool(ahead(sk.margin_cross_entropy(rows, w, labels))) == early
    with torch.no_grad():
        assert loss(x, w).grad_fn is None
    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: held.append(v) or v, lambda v: v):
        assert ahead(loss(x, w)) is None
    assert all(v.shape != w.shape or v is w for v in held)
    checkpointed = torch.utils.checkpoint.checkpoint(loss, x, w, use_reentrant=False)
    for a, b in zip(
        torch.autograd.grad(checkpointed, (x, w)),
        torch.autograd.grad(loss(x, w), (x, w)),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_there_is_one_gradient_at_a_time():
    x, w, target, _, _ = problem(6, 9, 8, 1, torch.float32)
    x, w = x.float().requires_grad_(), w.float().requires_grad_()
    loss = partial(sk.margin_cross_entropy, x, w, target)
    first, second = loss(), loss()
    assert ahead(first)
    assert ahead(second) is None  # the first one's waits for its backward pass
    assert ahead(sk.margin_cross_entropy(x, w.detach().requires_grad_(), target))  # other centers
    first.backward()
    assert ahead(loss()) is None  # w.grad is the gradient
    expected, w.grad = w.grad, None
    third = loss()
    assert ahead(third)
    del third
    assert ahead(loss())
    (again,) = torch.autograd.grad(second, w)
    assert torch.equal(again, expected)


def print_peak_of_two_steps():
    """Print the peak in MiB, and the size of the centers' gradient."""
    n, c, d = 64, 100_000, 128
    x, w = torch.randn(n, d), torch.randn(c, d, requires_grad=True)
    t = torch.randint(0, c, (n,))

    def two_steps():
        for _ in range(2):
            loss = sk.margin_cross_entropy(x, w, t)
            w.grad = None  # after the forward pass
            loss.backward()

    sk.margin_cross_entropy(x, w, t).backward()
    w.grad = None
    sk.empty_cache()
    print(peak_bytes(two_steps) / 2**20, c * d * 4 / 2**20)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_gradients_that_are_cleared_late_do_not_add_up(tmp_path):
    peak, gradient = numbers_of(tmp_path / "shown", print_peak_of_two_steps)
    assert peak < 1.5 * gradient


def test_vmap_of_a_gradient():
    x, w, target, _, _ = problem(6, 9, 8, 1, torch.float32)
    x, w = x.float(), w.float().requires_grad_()
    loss = sk.margin_cross_entropy(x, w, target)

    def scaled(factor):
        return torch.autograd.grad(loss, w, retain_graph=True)[0].sum() * factor

    total = torch.vmap(scaled)(torch.arange(3.0))
    (gradient,) = torch.autograd.grad(loss, w)
    torch.testing.assert_close(total, gradient.sum() * torch.arange(3.0))


def test_a_batch_of_gradients():
    x, w, target, _, _ = problem(6, 9, 8, 1, torch.float32)
    x, w = x.float().requires_grad_(), w.float().requires_grad_()
    loss = sk.margin_cross_entropy(x, w, target, reduction="none")
    gradients = partial(torch.autograd.grad, loss, (x, w), retain_graph=True)
    batched = gradients(torch.eye(6), is_grads_batched=True)
    each = zip(*(gradients(row) for row in torch.eye(6)), strict=True)
    for a, b in zip(batched, each, strict=True):
        torch.testing.assert_close(a, torch.stack(b))


def test_gradients_add_up_over_two_losses():
    x, w, target, _, _ = problem(6, 9, 8, 1, torch.float32)
    x, w = x.float().requires_grad_(), w.float().requires_grad_()
    for part in (slice(0, 3), slice(3, 6)):
        sk.margin_cross_entropy(x[part], w, target[part], reduction="sum").backward()
    total = sk.margin_cross_entropy(x, w, target, reduction="sum", workspace=0)
    for a, b in zip((x.grad, w.grad), torch.autograd.grad(total, (x, w)), strict=True):
        torch.testing.assert_close(a, b)


# ---- some rows of weight -------------------------------------------------------------------------


@pytest.mark.parametrize("mix", ["joint", "separate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", ISAS)
def test_class_ids_give_the_bits_of_the_rows_that_they_name(isa, dtype, mix, monkeypatch):
    monkeypatch.setenv("SYNFACE_CPU_ISA", isa)
    for n, c, d, k in ((64, 4097, 129, 3), (7, 2000, 8, 1), (5, 9, 1, 2), (1, 1, 4, 1)):
        x, w, _, t, upstream = problem(n, c, d, k, dtype)
        ids = sampled(c)
        target = torch.randint(0, len(ids), (n, k) if k > 1 else (n,))
        results = []
        for impl, weight, class_ids in (
            ("cpu", w, ids),
            ("cpu", w[ids], None),
            ("reference", w, ids),
            ("reference", w[ids], None),
        ):
            loss, dx, dw = run(
                x, weight, target, t, upstream, dtype, mix=mix, class_ids=class_ids, impl=impl
            )
            if class_ids is not None:
                assert dw.is_coalesced()
                assert dw.shape == w.shape
                assert torch.equal(dw.indices()[0], ids)
                dw = dw.values()
            results.append((loss, dx, dw))
        for with_ids, of_rows in (results[:2], results[2:]):
            for a, e in zip(with_ids, of_rows, strict=True):
                assert torch.equal(a, e)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_a_step_on_sampled_classes(impl):
    x, w, target, _, _ = problem(20, 500, 16, 1, torch.float64)
    target[3] = -100
    ids, indices = sk.sample_classes(target, 500, 60, torch.Generator().manual_seed(1))
    weight = w.clone().requires_grad_()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for scale in (1, 2):  # two losses of one step
        (scale * sk.margin_cross_entropy(x, weight, indices, class_ids=ids, impl=impl)).backward()
    optimizer.step()
    rows = w[ids].requires_grad_()
    (grad,) = torch.autograd.grad(sk.margin_cross_entropy(x, rows, indices, impl="reference"), rows)
    torch.testing.assert_close(weight.detach()[ids], w[ids] - 0.3 * grad)
    others = torch.ones(500, dtype=torch.bool).index_fill(0, ids, False)
    assert torch.equal(weight.detach()[others], w[others])
    loss = sk.margin_cross_entropy(x, weight, indices, class_ids=ids, impl=impl)
    (grad,) = torch.autograd.grad(loss, weight)
    before = weight.detach().clone()
    with torch.no_grad():
        sk.row_sgd_(weight, grad.values(), ids, lr=0.1)
    torch.testing.assert_close(weight.detach(), before - 0.1 * grad.to_dense())


# ---- peak memory ---------------------------------------------------------------------------------


def print_peak_of_sampled_rows():
    """Print the peak in MiB, and the size of the rows."""
    n, c, d = 8, 120_000, 512
    x, w = torch.randn(n, d), torch.randn(c, d)
    ids = torch.arange(0, c, 2)
    t = torch.randint(0, len(ids), (n,))
    sk.margin_cross_entropy(x, w[:9], t * 0, class_ids=ids[:2])  # so that all code is loaded
    peak = peak_bytes(lambda: sk.margin_cross_entropy(x, w, t, class_ids=ids))
    print(peak / 2**20, len(ids) * d * 4 / 2**20)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_sampled_rows_are_not_gathered(tmp_path):
    peak, gathered = numbers_of(tmp_path / "shown", print_peak_of_sampled_rows)
    assert peak < gathered / 4


def print_peak_of_a_step(workspace, autocast):
    """Print the peak in MiB, and the size of the gradients."""
    n, c, d = 512, 100_000, 64
    x = torch.randn(n, d, requires_grad=True)
    w = torch.randn(c, d, requires_grad=True)
    t = torch.randint(0, c, (n,))
    sk.margin_cross_entropy(x[:2], w[:2], t[:2] * 0).backward()
    x.grad = w.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        peak = peak_bytes(lambda: sk.margin_cross_entropy(x, w, t, workspace=workspace).backward())
    print(peak / 2**20, (n + c) * d * 4 / 2**20)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("workspace", "autocast"),
    [("auto", False), (0, False), (100, False), ("auto", True), (0, True)],
)
@pytest.mark.slow
def test_peak_memory_is_the_gradients_the_workspace_and_64_mib(workspace, autocast, tmp_path):
    given = workspace if workspace == "auto" else workspace << 20
    peak, gradients = numbers_of(tmp_path / "shown", print_peak_of_a_step, given, autocast)
    workspace = 0 if workspace == "auto" else workspace
    used = 0.9 * workspace
    assert gradients / 2 + used < peak <= gradients + workspace + 64  # N×C would be 195 MiB
