"""Training steps of the margin softmax on a GPU: updates, graphs, compilation, process groups.

Run by `make gpu-evidence`.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import synface_kernels as sk
from tests.gpu.on_device import (
    BF16,
    DEVICE,
    F32,
    assert_no_host_sync,
    assert_same,
    autocast,
    compiled,
    needs_device,
    normal,
    on_another_device,
    one_process_group,
    pick,
    replayed,
    rng,
)

pytestmark = needs_device
N, C, D = pick((64, 20_000, 256), (5, 20, 8))
MARGIN = sk.ArcFace(32.0, 0.3)
# Arguments of `Step`.
STEPS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtypes": (BF16, BF16)},
    "mixed": {"dtypes": (BF16, F32)},
    "autocast": {"under": BF16},
    "several labels": {"k": 3, "dtypes": (BF16, BF16)},
    "class_ids": {"ids": True},
    "sub-centers": {"m": 3, "dtypes": (BF16, BF16)},
    "filter": {"margin": sk.ArcFace(32.0, interclass_filter=0.1)},
    "smoothing": {"label_smoothing": 0.1, "dtypes": (BF16, BF16)},
    "statistics": {"return_stats": True},
}
each_step = pytest.mark.parametrize("name", STEPS)


class Step:
    """A training step on fixed tensors: call it for the loss and the gradients."""

    def __init__(
        self,
        k: int = 1,
        m: int = 1,
        dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
        ids: bool = False,
        under: torch.dtype | None = None,
        margin: sk.CombinedMargin = MARGIN,
        device: str = DEVICE,
        impl: str = "triton",
        **options: Any,
    ) -> None:
        self.x = normal(N, D, seed=1, dtype=dtypes[0]).to(device).requires_grad_()
        shape = (C, D) if m == 1 else (C, m, D)
        self.w = normal(*shape, seed=2, dtype=dtypes[1]).to(device).requires_grad_()
        self.under, self.margin = under, margin
        self.options = options | {"impl": impl}
        classes = C
        if ids:
            self.options["class_ids"] = torch.arange(1, C, 2, device=device)
            classes = C // 2
        target = torch.randint(0, classes, (N, k), generator=rng(3), device=DEVICE)
        self.target = (target if k > 1 else target[:, 0]).to(device)
        if k > 1:
            share = torch.rand(N, k, generator=rng(4), device=DEVICE).softmax(1)
            self.options["target_weight"] = share.to(device)

    def loss(self) -> Any:
        with autocast(self.under):
            return sk.margin_cross_entropy(self.x, self.w, self.target, self.margin, **self.options)

    def __call__(self) -> list[Tensor]:
        result = self.loss()
        losses = [result] if isinstance(result, Tensor) else [result[0], *result[1]]
        grads = torch.autograd.grad(losses[0], (self.x, self.w))
        values = (g._values() if g.is_sparse else g for g in grads)
        return [*(v.detach() for v in losses), *values]


@each_step
def test_two_runs_agree_bitwise(name):
    step = Step(**STEPS[name])
    assert_same(step(), step())


def test_many_classes_agree_bitwise():
    step = Step(dtypes=(BF16, BF16))
    classes = pick(300_000, 200)
    step.w = normal(classes, D, dtype=BF16).requires_grad_()
    assert_same(step(), step())


@each_step
def test_a_replayed_step_is_the_eager_one(name):
    step = Step(**STEPS[name])
    assert_same(replayed(step), step())


@each_step
def test_a_step_never_waits_for_the_gpu(name):
    assert_no_host_sync(Step(**STEPS[name]))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "several labels", "autocast"])
def test_another_device(name):
    on_another_device(lambda device: Step(**STEPS[name], device=device)())


@pytest.mark.parametrize("name", ["bfloat16", "several labels", "sub-centers", "autocast"])
def test_compile_fullgraph(name):
    step = Step(**STEPS[name])
    loss = compiled(step.loss)()
    grads = torch.autograd.grad(loss, (step.x, step.w))
    for actual, expected in zip((loss.detach(), *grads), step(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


# ---- steps of the optimizer in the backward pass -------------------------------------------------

RULES: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "weight_decay": 0.01},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "nesterov": True},
    "adamw": {"lr": 0.01, "weight_decay": 0.1},
}
UPDATES = [
    ("sgd", {}),
    ("nesterov", {"k": 2, "ids": True}),
    ("adamw", {"m": 2}),
    ("nesterov", {"dtypes": (BF16, BF16), "seed": 3}),
    ("adamw", {"dtypes": (BF16, BF16), "seed": 3, "ids": True}),
    ("adamw", {"under": BF16}),
]
each_update = pytest.mark.parametrize(("rule", "options"), UPDATES, ids=str)


class Updating:
    """A training step that updates the centers in its backward pass, or after it."""

    def __init__(
        self, rule: str, seed: int | None = None, track: bool = True, **options: Any
    ) -> None:
        self.rule, self.seed, self.track = rule, seed, track
        self.step = Step(**options)
        self.step.w.requires_grad_(False)
        count = {"sgd": 0, "nesterov": 1, "adamw": 2}[rule]
        self.states = [torch.zeros_like(self.step.w, dtype=F32) for _ in range(count)]
        self.last_step = torch.zeros(C, dtype=torch.int64, device=DEVICE)
        self.written = [self.step.w, *self.states, self.last_step]
        self.initial = [t.clone() for t in self.written]

    def restore(self) -> None:
        for tensor, value in zip(self.written, self.initial, strict=True):
            tensor.copy_(value)

    def update(self, number: int) -> sk.SGDUpdate | sk.AdamWUpdate:
        shared = RULES[self.rule] | {"step": number, "seed": self.seed}
        shared["last_step"] = self.last_step if self.track else None
        if self.rule == "adamw":
            return sk.AdamWUpdate(exp_avg=self.states[0], exp_avg_sq=self.states[1], **shared)
        return sk.SGDUpdate(momentum_buffer=self.states[0] if self.states else None, **shared)

    def inside(self, number: int = 1) -> list[Tensor]:
        """Take the step in the backward pass; return the loss and what was written."""
        self.step.options["update"] = self.update(number)
        loss = self.step.loss()
        (grad,) = torch.autograd.grad(loss, self.step.x)
        return [loss.detach(), grad, *self.written]

    def after(self, number: int = 1) -> list[Tensor]:
        """Take the step after the backward pass, with the gradient."""
        leaf = self.step.w.detach().requires_grad_()
        step = copy(self.step)
        step.w = leaf
        loss = step.loss()
        grad_x, grad = torch.autograd.grad(loss, (step.x, leaf))
        ids = torch.arange(C, device=DEVICE)
        if grad.is_sparse:
            ids, grad = grad._indices()[0], grad._values()
        weight, *states = (t.flatten(1) for t in (self.step.w, *self.states))
        shared = RULES[self.rule] | {"seed": self.seed, "last_step": self.last_step}
        shared["impl"] = "triton"
        if self.rule == "adamw":
            sk.row_adamw_(weight, grad.flatten(1), ids, *states, number, **shared)
        else:
            buffer = states[0] if states else None
            sk.row_sgd_(weight, grad.flatten(1), ids, momentum_buffer=buffer, step=number, **shared)
        return [loss.detach(), grad_x, *self.written]


@each_update
def test_the_bits_of_backward_and_update(rule, options):
    one, two = (Updating(rule, **options) for _ in range(2))
    for number in (1, 2, 5):
        assert_same(one.inside(number), two.after(number))
    assert not torch.equal(one.step.w, one.initial[0])


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("sgd", {}),
        ("sgd", {"under": BF16}),
        ("nesterov", {"k": 2, "ids": True}),
        ("nesterov", {"m": 2, "dtypes": (BF16, BF16)}),
    ],
    ids=str,
)
def test_a_replayed_update_is_the_eager_one(rule, options):
    one, two = (Updating(rule, track=False, **options) for _ in range(2))
    assert_same(replayed(one.inside, one.restore), two.inside())


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("sgd", {"track": True}),
        ("nesterov", {"track": False, "seed": 3, "dtypes": (BF16, BF16)}),
        ("adamw", {"track": False}),
    ],
    ids=str,
)
def test_an_update_that_depends_on_its_number_is_not_captured(rule, options):
    updating = Updating(rule, **options)
    with pytest.raises(RuntimeError, match=r"step must not change .* while a CUDA graph is captur"):
        replayed(updating.inside, updating.restore)


@each_update
def test_an_update_never_waits_for_the_gpu(rule, options):
    updating = Updating(rule, **options)
    numbers = iter((1, 2))
    assert_no_host_sync(lambda: updating.inside(next(numbers)))


# ---- process groups, heads -----------------------------------------------------------------------


def test_a_group_of_one_process_is_no_group():
    for name in ("float32", "bfloat16", "class_ids", "autocast"):
        step = Step(**STEPS[name])
        if name == "class_ids":  # with a group labels are numbers of classes
            alone, step.target = step(), 2 * step.target + 1
        else:
            alone = step()
        with one_process_group() as group:
            step.options["group"] = group
            together = step()
        for actual, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sample_rate", [1.0, 0.2])
def test_a_sharded_head_of_one_process(sample_rate):
    heads = pytest.importorskip("synface.heads")
    x, labels = normal(N, D, seed=5), torch.randint(0, C, (N,), generator=rng(6), device=DEVICE)

    def train(group: Any) -> list[Tensor]:
        generator = torch.Generator()
        head = heads.PartialFC(MARGIN, D, C, sample_rate, generator=generator, group=group)
        with torch.no_grad():
            head.weight.copy_(normal(C, D, seed=7))
        head.to(DEVICE).train()
        generator.manual_seed(0)
        leaf = x.clone().requires_grad_()
        loss = head(leaf, labels)
        loss.backward()
        grad = head.weight.grad
        assert grad is not None
        assert leaf.grad is not None
        return [loss.detach(), leaf.grad, grad.to_dense() if grad.is_sparse else grad]

    alone = train(None)
    with one_process_group() as group:
        together = train(group)
    for actual, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_sampled_classes_is_coalesced():
    step = Step(ids=True)
    (grad,) = torch.autograd.grad(step.loss(), step.w)
    assert grad.is_coalesced()
    assert torch.equal(grad._indices()[0], step.options["class_ids"])
