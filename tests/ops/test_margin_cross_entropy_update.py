"""The backward pass that steps the centers itself: bit for bit backward, then the rows' update."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import synface_kernels as sk
from synface_kernels._load import cpu_isas
from synface_kernels.ops.margin_cross_entropy.update import optimizer_step
from synface_kernels.testing import peak_bytes
from tests.helpers.centers import MARGIN, RULES, Centers, assert_bits, batch, normal
from tests.helpers.cpu import cpu
from tests.helpers.forked import numbers_of
from tests.helpers.ranks import on_ranks

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
OPS = torch.ops.synface_kernels


# ---- bit for bit ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [False, True], ids=["all", "sampled"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("dtype", "seed", "input_dtype"),
    [(F32, None, F32), (F32, None, BF16), (BF16, 5, BF16), (BF16, None, F32), (F64, None, F64)],
    ids=str,
)
def test_the_bits_of_backward_and_update(
    dtype: Any, seed: Any, input_dtype: Any, rule: str, ids: bool
) -> None:
    for isa, threads in zip(cpu_isas(), (1, 2, 3, 1, 2), strict=False):
        with cpu(isa, threads):
            assert_bits(rule, dtype, seed=seed, ids=ids, input_dtype=input_dtype, impl="cpu")


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("dtype", "seed", "options"),
    [
        (F32, None, {"m": 3}),
        (BF16, 7, {"m": 2, "ids": True}),
        (F32, None, {"label_smoothing": 0.1}),
        (BF16, 7, {"k": 3, "mix": "separate"}),
        (F64, None, {"k": 2, "ids": True}),
        (F32, None, {"c": 1, "d": 1}),
        (F32, None, {"c": 1100, "reduction": "sum"}),
        (F32, None, {"n": 0}),
        (F32, None, {"c": 1100, "workspace": 70 * 4 * 600}),
    ],
    ids=str,
)
def test_the_bits_with_options(dtype: Any, seed: Any, options: dict[str, Any], impl: str) -> None:
    for rule in ("nesterov", "adamw"):
        assert_bits(rule, dtype, seed=seed, impl=impl, **options)


def test_the_bits_with_a_limit_and_gaps_between_rows() -> None:
    x, target, _ = batch(30, 90, 12, 1, 1)
    margin = replace(MARGIN, interclass_filter=0.3)
    wide = normal(90, 20, seed=3).float()
    weights = [wide[:, :12], wide.clone()[:, :12]]
    sk.margin_cross_entropy(
        x.float(), weights[0], target, margin, update=sk.SGDUpdate(lr=0.5)
    ).backward()
    weight = weights[1].detach().requires_grad_()
    sk.margin_cross_entropy(x.float(), weight, target, margin).backward()
    assert weight.grad is not None
    sk.row_sgd_(weights[1], weight.grad, torch.arange(90), lr=0.5)
    assert torch.equal(*weights)
    assert torch.equal(wide[:, 12:], normal(90, 20, seed=3).float()[:, 12:])


def test_a_batch_that_is_ignored_decays_the_centers() -> None:
    x, target = normal(3, 8, seed=1).float(), torch.full((3,), -100)
    for rule in RULES:
        one, two = (Centers((600, 8), F32, rule) for _ in range(2))
        one.fused(1, x, target)
        two.in_two_steps(1, x, target)
        assert torch.equal(one.weight, two.weight)
        assert not torch.equal(one.weight, Centers((600, 8), F32, rule).weight)


# ---- against float64 -----------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("rule", RULES)
def test_torchs_optimizers_in_float64(rule: str, impl: str) -> None:
    """The definition of everything: the loss by its reference, the step by torch.optim."""
    ours = Centers((50, 16), F64, rule)
    theirs = ours.weight.clone().requires_grad_()
    kind = torch.optim.AdamW if rule == "adamw" else torch.optim.SGD
    optimizer = kind([theirs], **RULES[rule])
    for step in range(1, 6):
        x, target, _ = batch(20, 50, 16, 1, step)
        ours.fused(step, x, target, impl=impl)
        optimizer.zero_grad()
        (8 * sk.margin_cross_entropy(x, theirs, target, MARGIN, impl="reference")).backward()
        optimizer.step()
        torch.testing.assert_close(ours.weight, theirs.detach(), rtol=1e-10, atol=1e-12)


def test_fifty_steps_twice_are_bitwise_the_same() -> None:
    def run() -> list[Tensor]:
        centers = Centers((400, 16), BF16, "nesterov", seed=9)
        for step in range(1, 51):
            x, target, _ = batch(32, 400, 16, 1, step)
            g = torch.Generator().manual_seed(step)
            ids, target = sk.sample_classes(target, 400, 100, g)
            losses.append(centers.fused(step, x.float(), target, class_ids=ids)[0].item())
        return centers.tensors

    losses: list[float] = []
    first, second = run(), run()
    assert losses[:50] == losses[50:]
    assert all(map(torch.equal, first, second))


# ---- memory --------------------------------------------------------------------------------------


def print_peak() -> None:
    """Print the peak in MiB, and the sizes of the gradients of inputs and centers."""
    n, d, classes = 256, 256, 250_000

    def peak(c: int) -> int:
        x = torch.randn(n, d, requires_grad=True)
        weight, buffer = torch.ones(c, d), torch.ones(c, d)
        update = sk.SGDUpdate(lr=0.1, momentum=0.9, momentum_buffer=buffer)
        loss = partial(sk.margin_cross_entropy, x, weight, torch.arange(n) % c, update=update)
        return peak_bytes(lambda: loss().backward())

    peak(600)  # so that all code is loaded
    print(peak(classes) / 2**20, n * d * 4 / 2**20, classes * d * 4 / 2**20)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
def test_peak_memory_is_the_inputs_gradient_and_64_mib(tmp_path: Path) -> None:
    peak, grad_input, grad_weight = numbers_of(tmp_path / "shown", print_peak)
    assert grad_weight > 200
    assert peak <= grad_input + 64


# ---- autograd ------------------------------------------------------------------------------------


@pytest.fixture(params=["cpu", "reference"])
def setting(request: Any) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Embeddings, centers, targets and options."""
    x, target, _ = batch(6, 9, 4, 1, 0)
    options = {"update": sk.SGDUpdate(lr=1.0), "impl": request.param}
    return x.requires_grad_(), normal(9, 4, seed=1), target, options


def test_each_forward_pass_has_one_backward_pass(setting: Any) -> None:
    x, weight, target, options = setting
    loss = sk.margin_cross_entropy(x, weight, target, **options)
    loss.backward(retain_graph=True)
    moved = weight.clone()
    with pytest.raises(RuntimeError, match=r"centers have moved.*cannot be accumulated"):
        loss.backward()
    assert torch.equal(weight, moved)
    losses = [sk.margin_cross_entropy(x, weight, target, **options) for _ in range(2)]
    losses[0].backward()
    moved = weight.clone()
    with pytest.raises(RuntimeError, match="one backward pass, before the next forward pass"):
        losses[1].backward()
    assert torch.equal(weight, moved)


def test_other_graphs_learn_that_the_centers_were_written(setting: Any) -> None:
    x, weight, target, options = setting
    product = (x @ weight.T).sum()
    sk.margin_cross_entropy(x, weight, target, **options).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_no_step_without_a_backward_pass(setting: Any) -> None:
    x, weight, target, options = setting
    before = weight.clone()
    with torch.no_grad():
        loss = sk.margin_cross_entropy(x, weight, target, **options)
    assert not loss.requires_grad
    sk.margin_cross_entropy(x, weight, target, **options)
    assert torch.equal(weight, before)


def test_embeddings_that_are_given(setting: Any) -> None:
    """The centers are updated where the embeddings need no gradient."""
    x, weight, target, options = setting
    expected = weight.clone()
    sk.margin_cross_entropy(x, expected, target, **options).backward()
    sk.margin_cross_entropy(x.detach(), weight, target, **options).backward()
    assert torch.equal(weight, expected)


def test_the_gradient_of_the_input_alone(setting: Any) -> None:
    """`torch.autograd.grad` steps too, and the gradient is that of the centers before."""
    x, weight, target, options = setting
    plain = sk.margin_cross_entropy(x, weight.clone(), target, impl=options["impl"])
    (expected,) = torch.autograd.grad(plain, x)
    before = weight.clone()
    loss = sk.margin_cross_entropy(x, weight, target, **options)
    (actual,) = torch.autograd.grad(loss, x)
    assert torch.equal(actual, expected)
    assert not torch.equal(weight, before)


def test_statistics_and_their_gradients(setting: Any) -> None:
    x, weight, target, options = setting
    results = []
    for update in (None, options["update"]):
        w = weight.clone().requires_grad_(update is None)
        loss, stats = sk.margin_cross_entropy(
            x, w, target, **options | {"update": update}, return_stats=True
        )
        (loss + 0.1 * stats.lse.square().mean()).backward()
        results.append(w.detach() - w.grad if w.grad is not None else w)
    torch.testing.assert_close(*results)


def test_second_derivatives_are_an_error(setting: Any) -> None:
    x, weight, target, options = setting
    loss = sk.margin_cross_entropy(x, weight, target, **options)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|once_differentiable"):
        grad.sum().backward()


def test_margins_that_learn() -> None:
    x, target, _ = batch(6, 9, 4, 1, 0)
    m2 = torch.full((6,), 0.3, requires_grad=True)
    margin = sk.CombinedMargin(16.0, m2=m2)
    sk.margin_cross_entropy(
        x, normal(9, 4, seed=1), target, margin, update=sk.SGDUpdate(lr=1.0)
    ).backward()
    assert m2.grad is not None
    assert m2.grad.abs().sum() > 0


def test_compile_says_that_it_cannot() -> None:
    x, target, _ = batch(6, 9, 4, 1, 0)
    weight, update = normal(9, 4, seed=1), sk.SGDUpdate(lr=1.0)

    def step(x: Tensor) -> Tensor:
        return sk.margin_cross_entropy(2 * x, weight, target, update=update)

    with pytest.raises(Exception, match="update cannot be compiled"):
        torch.compile(step, fullgraph=True, backend="eager")(x.requires_grad_())


@pytest.mark.parametrize("rule", RULES)
def test_opcheck(rule: str) -> None:
    x, target, _ = batch(6, 9, 4, 1, 0)
    labels = target[:, None].where(target[:, None] >= 0, -1)
    for dtype, ids in ((F32, None), (BF16, torch.arange(9))):
        centers, none = Centers((9, 4), dtype, rule, seed=1), torch.empty(0, dtype=F64)
        inputs = (x.to(dtype), centers.weight, ids, labels)
        lse, _, cosine, _, _, *saved = OPS.margin_cross_entropy_forward(
            *inputs, 16.0, math.inf, True, False, 200, False, "cpu"
        )
        torch.library.opcheck(
            OPS.margin_cross_entropy_update.default,
            (
                *inputs, lse, *saved, torch.ones_like(lse), cosine, none, 16.0, math.inf, True,
                False, *optimizer_step(centers.update(3)), "cpu",
            ),
        )  # fmt: skip


# ---- ranks ---------------------------------------------------------------------------------------


def rank_main(rank: int, ranks: int) -> list[Tensor]:
    """Return the centers after three steps: fused and separate, sharded and in one process."""
    results: list[Tensor] = []
    c, ends = 21, [0, 8, 21]
    for rule in ("nesterov", "adamw"):
        one, two, alone = (Centers((c, 8), F32, rule) for _ in range(3))
        own = slice(ends[rank], ends[rank + 1])
        for each in (one, two):
            each.weight = each.weight[own].clone()
            each.states = [state[own].clone() for state in each.states]
            each.last_step = each.last_step[own].clone()
        shard = {"group": torch.distributed.group.WORLD, "class_start": ends[rank]}
        for step in range(1, 4):
            x, target, _ = batch(9, c, 8, 1, step)
            rows = slice(0, 4) if rank == 0 else slice(4, 9)
            got = one.fused(step, x[rows].float(), target[rows], **shard)
            expected = two.in_two_steps(step, x[rows].float(), target[rows], **shard)
            for a, b in zip(got + one.tensors, expected + two.tensors, strict=True):
                assert torch.equal(a, b)
            alone.fused(step, x.float(), target)
        for sharded, whole in zip(one.tensors, alone.tensors, strict=True):
            torch.testing.assert_close(sharded, whole[own], rtol=1e-5, atol=1e-6)
        results.append(one.weight)
    update = sk.SGDUpdate(lr=0.1 * (rank + 1))
    with pytest.raises(ValueError, match="update must be the same on all ranks"):
        sk.margin_cross_entropy(x[rows].float(), one.weight, target[rows], update=update, **shard)
    return results


def test_two_ranks_are_one(tmp_path: Path) -> None:
    assert len(on_ranks(2, rank_main, tmp_path)) == 2


# ---- bad input -----------------------------------------------------------------------------------

X, W, T = torch.ones(2, 3), torch.ones(5, 3), torch.tensor([0, 4])
LAST = torch.zeros(5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("weight", "update", "error", "message"),
    [
        (W, {"lr": 0.1}, TypeError, "update must be an SGDUpdate or AdamWUpdate, got dict"),
        (
            W.clone().requires_grad_(),
            sk.SGDUpdate(lr=0.1),
            ValueError,
            r"weight must not require grad with update.*requires_grad_\(False\)",
        ),
        (W.half(), sk.SGDUpdate(lr=0.1), ValueError, "weight must be float32, bfloat16 or float64"),
        (torch.ones(3, 5).T, sk.SGDUpdate(lr=0.1), ValueError, "weight must have contiguous rows"),
        (
            torch.ones(5, 3, 2).transpose(1, 2),
            sk.SGDUpdate(lr=0.1),
            ValueError,
            "weight must be contiguous",
        ),
        (
            W,
            sk.SGDUpdate(lr=0.1, momentum=0.9, momentum_buffer=torch.ones(4, 3)),
            ValueError,
            r"momentum_buffer must be float32 or bfloat16 of shape \(5, 3\) like weight",
        ),
        (
            W,
            sk.AdamWUpdate(exp_avg=W.clone(), exp_avg_sq=W.double(), step=1),
            ValueError,
            "exp_avg_sq must be float32 or bfloat16",
        ),
        (
            W,
            sk.SGDUpdate(lr=0.1, step=1, last_step=LAST[:4]),
            ValueError,
            r"last_step must be int64 or int32, contiguous, of shape \(C,\)",
        ),
        (
            W,
            sk.SGDUpdate(lr=0.1, step=2, last_step=LAST + 2),
            ValueError,
            r"last_step of the rows in class_ids must be in \[0, 1\] at step 2, got 2",
        ),
        (
            W,
            sk.AdamWUpdate(
                exp_avg=W.clone(),
                exp_avg_sq=W.clone(),
                betas=(0.9999999, 0.5),
                step=2**31,
                last_step=LAST,
            ),
            ValueError,
            f"must have missed at most {2**17} steps.*got {2**31 - 1}",
        ),
        (
            torch.ones(1, 3).expand(5, 3),
            sk.SGDUpdate(lr=0.1),
            ValueError,
            "weight must not overlap itself",
        ),
        (
            W,
            sk.SGDUpdate(lr=0.1, momentum=0.9, momentum_buffer=W),
            ValueError,
            "weight must not share memory with momentum_buffer",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input(weight: Tensor, update: Any, error: type[Exception], message: str) -> None:
    before = weight.detach().clone()
    with pytest.raises(error, match=message):
        sk.margin_cross_entropy(X.to(weight.dtype), weight, T, update=update)
    assert torch.equal(weight, before)


def test_embeddings_must_not_be_the_centers_memory() -> None:
    """The backward pass would read embeddings that it has moved already."""
    weight = torch.randn(5, 3)
    with pytest.raises(ValueError, match="weight must not share memory with input"):
        sk.margin_cross_entropy(weight[:2], weight, torch.tensor([1, 0]), update=sk.SGDUpdate(lr=1))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sk.SGDUpdate(lr=-1.0), ValueError, "lr must be finite and ≥ 0, got -1.0"),
        (lambda: sk.SGDUpdate(lr="1"), TypeError, "lr must be a number, got str"),  # type: ignore[arg-type]
        (
            lambda: sk.SGDUpdate(lr=1.0, momentum=0.9),
            ValueError,
            "momentum_buffer is required just where momentum > 0, got NoneType",
        ),
        (lambda: sk.SGDUpdate(lr=1.0, seed=3), ValueError, "step is required with last_step or"),
        (
            lambda: sk.AdamWUpdate(exp_avg=W, exp_avg_sq=W, step=0),
            ValueError,
            r"step must be in \[1,",
        ),
        (
            lambda: sk.AdamWUpdate(exp_avg=W, exp_avg_sq=W, step=1, betas=(0.9, 1.0)),
            ValueError,
            r"betas must be in \[0, 1\)",
        ),
    ],
)
def test_bad_updates(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
