"""Classes and batches spread over the ranks of a process group give what one process gives."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Sequence
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import synface_kernels as sk
from tests.helpers.forked import start_server
from tests.helpers.ranks import on_ranks

N, C, D = 23, 37, 16
PER_ROW = "per row"
MARGINS = {
    "arcface": sk.ArcFace(),
    "cosface": sk.CosFace(),
    "sphereface": sk.SphereFace(),
    "combined": sk.CombinedMargin(64.0, 0.9, 0.4, 0.15),
    "straight": sk.ArcFace(target_grad="straight_through", beyond_pi="none"),
    "drop": sk.ArcFace(interclass_filter=0.1),
    "zero": sk.ArcFace(interclass_filter=0.1, interclass_filter_mode="zero"),
    "smooth": sk.ArcFace(),
    "sub-centers": sk.ArcFace(),
    PER_ROW: None,
}
KINDS = [(1, "joint"), (3, "joint"), (3, "separate")]  # labels per row, and how they mix
MORE = [
    *((torch.float32, "combined", *kind, "mean") for kind in KINDS),
    *((torch.float64, PER_ROW, 3, "joint", reduction) for reduction in ("sum", "none")),
]
# Even shares have each margin with each kind of labels; uneven ones have all margins and all kinds.
CASES = [
    *((False, torch.float64, name, *kind, "mean") for name in MARGINS for kind in KINDS),
    *(
        (True, torch.float64, name, *kind, "mean")
        for name, kind in zip(MARGINS, itertools.cycle(KINDS), strict=False)
    ),
    *((uneven, *case) for uneven in (False, True) for case in MORE),
]


def problem(dtype: torch.dtype, k: int) -> tuple[Tensor, ...]:
    """Make embeddings, centers, targets, their weights, per-row margins, the losses' gradient.

    Some rows and labels are ignored, some embeddings and centers are zero or not normalized.
    """
    g = torch.Generator().manual_seed(k)
    x = torch.randn(N, D, generator=g, dtype=torch.float64)
    w = torch.randn(C, D, generator=g, dtype=torch.float64) * 10
    target = torch.randint(0, C, (N, k), generator=g)
    x[:4] = w[target[:4, 0]] + 0.1 * x[:4]
    x[5], w[C - 1] = 0, 0
    weight = torch.rand(N, k, generator=g, dtype=torch.float64).softmax(1)
    target[3], target[N - 1] = -100, C - 1
    if k > 1:
        target[4, 1] = target[4, 0]
        weight[6, 0], target[6, 0] = 0, -100
        weight[6] /= weight[6].sum()
    m = 0.2 + 0.3 * torch.rand(N, generator=g, dtype=torch.float64)
    upstream = torch.rand(N, generator=g, dtype=torch.float64)
    return x.to(dtype), w.to(dtype), target, weight, m, upstream


def shares(total: int, ranks: int, uneven: bool) -> list[int]:
    if uneven:  # the last has few, or none
        return [total - 1, 1, 0, 0][:ranks]
    return [total * (r + 1) // ranks - total * r // ranks for r in range(ranks)]


def class_shares(ranks: int, uneven: bool) -> list[int]:
    return [C - 2 * (ranks - 1), *[2] * (ranks - 1)] if uneven else shares(C, ranks, False)


def step(case: Sequence, rows: slice, classes: slice, **options) -> list[Tensor]:
    """Loss, statistics and gradients of some rows and classes, and of a per-row margin."""
    dtype, name, k, mix, reduction = case
    x, w, target, weight, m, upstream = problem(dtype, k)
    x, w, m = (v.clone().requires_grad_() for v in (x[rows], w[classes], m[rows]))
    margin = sk.CombinedMargin(64.0, m2=m, m3=0.1) if name == PER_ROW else MARGINS[name]
    plain = k == 1
    if name == "sub-centers":
        w = torch.stack([w, w.roll(1, 1)], 1).detach().requires_grad_()
    if name == "smooth":
        options["label_smoothing"] = 0.1
    loss, stats = sk.margin_cross_entropy(
        x,
        w,
        target[rows, 0] if plain else target[rows],
        margin,
        target_weight=None if plain else weight[rows],
        mix=mix,
        reduction=reduction,
        return_stats=True,
        **options,
    )
    inputs = (x, w, m) if name == PER_ROW else (x, w)
    factor = upstream[rows].to(dtype) if reduction == "none" else 3.0
    scalar = (loss * factor).sum()
    grads = torch.autograd.grad(scalar, inputs, retain_graph=True)
    # and of what else is differentiable: a z-loss, and the targets' cosines
    other = stats.lse.square().sum() + stats.target_cosine.sum()
    others = torch.autograd.grad(other, (x, w))
    return [loss.detach(), *(s.detach() for s in stats), *grads, *others]


def steps(rank: int, ranks: int) -> list[list[Tensor]]:
    results = []
    for uneven, *case in CASES:
        counts, classes = shares(N, ranks, uneven), class_shares(ranks, uneven)
        start, first = sum(classes[:rank]), sum(counts[:rank])
        rows = slice(first, first + counts[rank])
        own = slice(start, start + classes[rank])
        results.append(step(case, rows, own, group=dist.group.WORLD, class_start=start))
    return results


def assert_same(got: Tensor, expected: Tensor, tolerance: float, case: Sequence) -> None:
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape), case
    if got.dtype == torch.bool:
        assert torch.equal(got, expected), case
        return
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, (case, error)


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.slow
def test_ranks_equal_one(ranks, tmp_path):
    results = on_ranks(ranks, steps, tmp_path)
    for at, (_, *case) in enumerate(CASES):
        dtype, _, _, _, reduction = case
        tolerance = 1e-12 if dtype == torch.float64 else 1e-5
        loss, *rest = step(case, slice(0, N), slice(0, C))
        losses, *parts = zip(*(rank[at] for rank in results), strict=True)
        if reduction == "none":
            losses = [torch.cat(losses)]
        assert all(torch.equal(other, losses[0]) for other in losses), case
        assert_same(losses[0], loss, tolerance, case)
        for got, expected in zip(parts, rest, strict=True):
            assert_same(torch.cat(got), expected, tolerance, case)


def others(rank: int, ranks: int) -> list[list]:
    """Run everything that two ranks are enough for, as starting processes takes longer."""
    mains = (low_precision, autocast, sampled, nothing, one_bad_row, mistakes, training)
    return [main(rank, ranks) for main in mains]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict[str, list[list]]:
    names = (
        "low_precision", "autocast", "sampled", "nothing", "one_bad_row", "mistakes", "training",
    )  # fmt: skip
    results = on_ranks(2, others, tmp_path_factory.mktemp("ranks"))
    return dict(zip(names, zip(*results, strict=True), strict=True))


def low_precision(rank: int, ranks: int) -> list[Tensor]:
    x, w, target, *_ = problem(torch.float32, 1)
    rows, own = slice(rank * 12, rank * 12 + 12), slice(rank * 20, rank * 20 + 20)
    x, w = (v.bfloat16().requires_grad_() for v in (x[rows], w[own]))
    loss = sk.margin_cross_entropy(
        x, w, target[rows, 0], group=dist.group.WORLD, class_start=rank * 20
    )
    return [loss.detach(), *torch.autograd.grad(loss, (x, w))]


@pytest.mark.slow
def test_bfloat16(two_ranks):
    x, w, target, *_ = problem(torch.float32, 1)
    x, w = (v.bfloat16().requires_grad_() for v in (x, w))
    loss = sk.margin_cross_entropy(x, w, target[:, 0])
    losses, *grads = zip(*two_ranks["low_precision"], strict=True)
    assert_same(losses[1], loss.detach(), 1e-5, ())
    for got, expected in zip(grads, torch.autograd.grad(loss, (x, w)), strict=True):
        got = torch.cat(got)
        assert got.dtype == torch.bfloat16
        assert_same(got.double(), expected.double(), 2**-7, ())


AUTOCAST = [torch.bfloat16, torch.float16]


def autocast(rank: int, ranks: int) -> list[list[Tensor]]:
    rows, own = slice(rank * 12, rank * 12 + 12), slice(rank * 20, rank * 20 + 20)
    results = []
    for dtype in AUTOCAST:
        with torch.autocast("cpu", dtype):
            case = (torch.float32, "combined", 3, "joint", "mean")
            results.append(step(case, rows, own, group=dist.group.WORLD, class_start=rank * 20))
    return results


def test_autocast(two_ranks):
    case = (torch.float32, "combined", 3, "joint", "mean")
    for at, dtype in enumerate(AUTOCAST):
        plain = step(case, slice(0, N), slice(0, C))
        with torch.autocast("cpu", dtype):
            expected = step(case, slice(0, N), slice(0, C))
        losses, *parts = zip(*(rank[at] for rank in two_ranks["autocast"]), strict=True)
        assert torch.equal(*losses)
        assert_same(losses[0], expected[0], 1e-5, ())
        assert (plain[0] - expected[0]).abs() > 1e-5 * plain[0].abs()
        for got, right in zip(parts, expected[1:], strict=True):
            assert_same(torch.cat(got), right, 2**-7, ())


TAKEN = [0, 1, 3, 4, 6, 11, 17, 18, 20, 25, 28, 30, 36]  # of the C classes, in a sampled step


def sampled(rank: int, ranks: int) -> list[Tensor]:
    x, w, *_ = problem(torch.float64, 1)
    target = torch.tensor(TAKEN)[torch.arange(N) % len(TAKEN)]
    rows, start, end = slice(rank * 12, rank * 12 + 12), (0, 20)[rank], (20, C)[rank]
    ids = torch.tensor([c - start for c in TAKEN if start <= c < end])
    x, w = x[rows].requires_grad_(), w[start:end].requires_grad_()
    options = {"group": dist.group.WORLD, "class_start": start}
    loss = sk.margin_cross_entropy(x, w, target[rows], class_ids=ids, **options)
    dx, dw = torch.autograd.grad(loss, (x, w))
    assert torch.equal(dw.coalesce().indices()[0], ids)
    with pytest.raises(ValueError, match="rank 1: class_ids must hold every label") as error:
        sk.margin_cross_entropy(x, w, target[rows], class_ids=ids[: len(ids) - rank], **options)
    assert "got 36" in str(error.value)
    with pytest.raises(ValueError, match="rank 1: class_ids must rise strictly"):
        sk.margin_cross_entropy(
            x, w, target[rows], class_ids=ids.flip(0) if rank else ids, **options
        )
    positive = target[rows][:, None].repeat(1, 2)
    positive[0, 1] = -100
    drawn, same = sk.sample_classes(positive, end - start, 2, **options)
    assert same is positive
    assert drawn.tolist() == ids.tolist()  # more positives than asked for: they alone
    drawn, _ = sk.sample_classes(target[rows], end - start, 15, **options)
    assert len(drawn) == 15
    sk.margin_cross_entropy(x, w, target[rows], class_ids=drawn, **options)
    with pytest.raises(ValueError, match=r"rank 1: num_sampled must be in \[1, 17\]"):
        sk.sample_classes(target, end - start, 18, **options)
    with pytest.raises(ValueError, match="whether there are class_ids must be the same"):
        sk.margin_cross_entropy(x, w, target[rows], class_ids=None if rank else ids, **options)
    return [loss.detach(), dx, dw.to_dense()]


def test_sampled_classes(two_ranks):
    x, w, *_ = problem(torch.float64, 1)
    x, w = x.requires_grad_(), w.requires_grad_()
    indices, ids = torch.arange(N) % len(TAKEN), torch.tensor(TAKEN)
    loss = sk.margin_cross_entropy(x, w, indices, class_ids=ids)
    losses, *grads = zip(*two_ranks["sampled"], strict=True)
    assert_same(losses[1], loss.detach(), 1e-12, ())
    for got, expected in zip(grads, torch.autograd.grad(loss, (x, w)), strict=True):
        assert_same(torch.cat(got), expected.to_dense(), 1e-12, ())


def nothing(rank: int, ranks: int) -> list:
    """Run without rows, without a valid row, and with targets' classes alone."""
    group, results = dist.group.WORLD, []
    w = torch.eye(2)[rank : rank + 1].requires_grad_()
    for n, label in ((0, 0), (3, -100)):
        x, target = torch.ones(n, 2, requires_grad=True), torch.full((n,), label)
        loss = sk.margin_cross_entropy(x, w, target, group=group, class_start=rank)
        results += [loss.detach(), *torch.autograd.grad(loss, (x, w))]
    x = torch.ones(1, 2, requires_grad=True)
    loss = sk.margin_cross_entropy(
        x,
        w,
        torch.tensor([[0, 1]]),
        target_weight=torch.tensor([[0.5, 0.5]]),
        group=group,
        class_start=rank,
    )
    return [*results, loss.detach(), *torch.autograd.grad(loss, (x, w))]


def test_nothing_to_learn(two_ranks):
    for results in two_ranks["nothing"]:
        for value in results[:6]:
            assert not value.any()
        assert all(value.isfinite().all() for value in results)
        torch.testing.assert_close(results[6].item(), torch.tensor(2.0).log().item())


def one_bad_row(rank: int, ranks: int) -> list[Tensor]:
    x, w, target, *_ = problem(torch.float64, 1)
    counts, classes = shares(N, ranks, False), class_shares(ranks, False)
    first, start = sum(counts[:rank]), sum(classes[:rank])
    x[2] = torch.nan
    x = x[first : first + counts[rank]].requires_grad_()
    w = w[start : start + classes[rank]].requires_grad_()
    target = target[first : first + counts[rank], 0]
    loss = sk.margin_cross_entropy(
        x, w, target, group=dist.group.WORLD, class_start=start, reduction="none"
    )
    (grad,) = torch.autograd.grad(loss.sum(), x)
    return [loss.detach(), grad]


def test_a_row_that_is_not_finite_spoils_its_own_loss_alone(two_ranks):
    loss, grad = (torch.cat(p) for p in zip(*two_ranks["one_bad_row"], strict=True))
    x, w, target, *_ = problem(torch.float64, 1)
    x.requires_grad_()
    expected = sk.margin_cross_entropy(x, w, target[:, 0], reduction="none")
    (expected_grad,) = torch.autograd.grad(expected.sum(), x)
    others = torch.arange(N) != 2
    assert loss[2].isnan()
    assert_same(loss[others], expected.detach()[others], 1e-12, ())
    assert_same(grad[others], expected_grad[others], 1e-12, ())


BAD = [
    ("rank 1: input must be a tensor, got list", TypeError),
    ("rank 1: target must be int64", ValueError),
    ("rank 1: target must be at least 0, or ignore_index (-100), got -3 at 1", ValueError),
    ("rank 1: target must be in [0, 6), or ignore_index (-100), got 6", ValueError),
    ("D must be the same on all ranks, got [4, 3] on ranks 0, 1, …", ValueError),
    ("K must be the same on all ranks, got [1, 2] on ranks 0, 1, …", ValueError),
    ("dtype of input must be the same", ValueError),
    ("requires_grad of weight must be the same on all ranks, got [False, True]", ValueError),
    ("margin must be the same on all ranks", ValueError),
    ("reduction must be the same on all ranks, got ['mean', 'sum']", ValueError),
    ("dtype of autocast must be the same on all ranks, got [None, torch.bfloat16]", ValueError),
    ("class_start: the ranks' classes must follow each other from 0, without a hole or an "
     "overlap, got [0, 3), [4, 7) on ranks 0, 1, …", ValueError),
    ("class_start: the ranks' classes must follow each other from 0, without a hole or an "
     "overlap, got [0, 3), [2, 5) on ranks 0, 1, …", ValueError),
    ("class_start: the ranks' classes must follow each other from 0, without a hole or an "
     "overlap, got [0, 3), [0, 3) on ranks 0, 1, …", ValueError),
    ("rank 1: class_start must not be negative, got -1", ValueError),
    ("rank 1: class_start must be an int, got float", TypeError),
    ("rank 0: impl must be 'cpu' or 'triton' with a group, got 'reference'", ValueError),
]  # fmt: skip


def mistakes(rank: int, ranks: int) -> list[str]:
    x, w, target, wrong = torch.eye(4), torch.ones(3, 4), torch.arange(4), rank == 1
    start = 3 * rank
    calls = [
        {"input": [1.0] if wrong else x},
        {"target": target.float() if wrong else target},
        {"target": torch.tensor([0, -3, 1, 2]) if wrong else target},
        {"target": target + 3 * rank},
        {"input": x[:, :3], "weight": w[:, :3]} if wrong else {},
        {"target": target[:, None].repeat(1, 2), "target_weight": torch.full((4, 2), 0.5)}
        if wrong else {},
        {"input": x.bfloat16() if wrong else x},
        {"weight": w.clone().requires_grad_(wrong)},
        {"margin": sk.ArcFace(margin=0.4 + rank / 10)},
        {"reduction": "sum" if wrong else "mean"},
        {"autocast": wrong},
        {"class_start": 4 if wrong else 0},
        {"class_start": 2 if wrong else 0},
        {"class_start": 0},
        {"class_start": -1 if wrong else 0},
        {"class_start": 3.0 if wrong else 0},
        {"impl": "reference"},
    ]  # fmt: skip
    messages = []
    for call, (_, kind) in zip(calls, BAD, strict=True):
        usual = {"input": x, "weight": w, "target": target, "class_start": start}
        on = torch.autocast("cpu", torch.bfloat16, enabled=call.pop("autocast", False))
        with on, pytest.raises(kind) as error:
            sk.margin_cross_entropy(**(usual | call), group=dist.group.WORLD)
        messages.append(str(error.value))
    # and the ranks still understand each other
    sk.margin_cross_entropy(x, w, target, class_start=start, group=dist.group.WORLD)
    return messages


def test_all_ranks_raise_the_error_of_one(two_ranks):
    results = two_ranks["mistakes"]
    assert results[0] == results[1]
    for message, (expected, _) in zip(results[0], BAD, strict=True):
        assert message.startswith(expected)


def test_group_must_be_one():
    with pytest.raises(TypeError, match=r"group must be a .* process group, got int"):
        sk.margin_cross_entropy(torch.eye(4), torch.eye(4), torch.arange(4), group=3)
    with pytest.raises(ValueError, match="class_start must be 0 without a group, got 4"):
        sk.margin_cross_entropy(torch.eye(4), torch.eye(4), torch.arange(4), class_start=4)


def training(rank: int, ranks: int) -> list[Tensor]:
    """Fifty steps, twice."""
    results = []
    for _ in range(2):
        g = torch.Generator().manual_seed(rank)
        w = torch.randn(C, D, generator=torch.Generator().manual_seed(7))[rank::ranks].clone()
        w = torch.nn.Parameter(w)
        starts = [0, (C + 1) // 2]
        optimizer = torch.optim.SGD([w], 0.1, 0.9)
        for _ in range(50):
            x, target = torch.randn(9 + rank, D, generator=g), torch.randint(C, (9 + rank,))
            target = torch.randint(C, (9 + rank,), generator=g)
            loss = sk.margin_cross_entropy(
                x, w, target, group=dist.group.WORLD, class_start=starts[rank]
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        results.append(w.detach().clone())
    return results


def test_same_answer_twice(two_ranks):
    for first, second in two_ranks["training"]:
        assert torch.equal(first, second)


def widowed(rank: int, path: str) -> None:
    """Rank 1 of 3 is killed between two steps, the others go on."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{path}",
        rank=rank,
        world_size=3,
        timeout=timedelta(seconds=10),
    )
    x, w, target = torch.randn(4, D), torch.randn(2, D), torch.arange(4)
    for step in range(3):
        if rank == 1 and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        began = time.monotonic()
        try:
            sk.margin_cross_entropy(x, w, target, group=dist.group.WORLD, class_start=2 * rank)
        except RuntimeError as error:
            with open(f"{path}.{rank}", "w") as file:
                file.write(f"{step} {time.monotonic() - began} {error}")
            os._exit(3)


@pytest.mark.slow
def test_when_a_rank_dies_the_others_say_so(tmp_path):
    path = str(tmp_path / "group")
    server = start_server()
    processes = [server.Process(target=widowed, args=(rank, path)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [3, -signal.SIGKILL, 3]
    for rank in (0, 2):
        with open(f"{path}.{rank}") as file:
            step, seconds, message = file.read().split(" ", 2)
        assert step == "2"
        assert float(seconds) < 20
        assert message.startswith(f"rank {rank} of 3 lost the others: one of them has died")
