"""Row updates on a GPU, against their definition in float64. Run by `make gpu-evidence`."""

from __future__ import annotations

from copy import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import synface_kernels as sk
from synface_kernels.testing import assert_as_exact_as_torch
from tests.gpu.on_device import (
    BF16,
    DEVICE,
    EPS,
    F16,
    F32,
    F64,
    assert_no_host_sync,
    assert_same,
    compiled,
    needs_device,
    normal,
    on_another_device,
    pick,
    replayed,
)

pytestmark = needs_device
C, D = pick((5000, 530), (7, 130))
RULES: list[tuple[str, dict[str, Any]]] = [
    ("sgd", {"lr": 0.1, "weight_decay": 0.01}),
    ("sgd", {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.05, "dampening": 0.3}),
    ("sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "nesterov": True}),
    ("adamw", {"lr": 0.01, "weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-3}),
    ("adamw", {}),
]
each_rule = pytest.mark.parametrize(("rule", "options"), RULES, ids=str)
MOMENTUM, ADAMW = RULES[2], RULES[4]
# Of the weight, its states and the gradient; the seed of stochastic rounding.
DTYPES = [(F32, F32, F32), (BF16, F32, BF16), (BF16, BF16, F16)]


class Rows:
    """A weight with its optimizer's states, and steps on some rows."""

    def __init__(
        self,
        rule: str,
        options: dict[str, Any],
        dtypes: tuple[torch.dtype, ...] = DTYPES[0],
        impl: str = "triton",
        seed: int | None = None,
        track: bool = False,
        device: str = DEVICE,
    ) -> None:
        weight, state, self.grad_dtype = dtypes
        self.rule, self.device = rule, device
        self.shared = options | {"impl": impl, "seed": seed}
        self.weight = normal(C, D, seed=1, dtype=dtypes[0]).to(device)
        self.states = [torch.zeros(C, D, dtype=state, device=device) for _ in range(2)]
        self.last = torch.zeros(C, dtype=torch.int64, device=device)
        if track:
            self.shared["last_step"] = self.last

    def double(self) -> Rows:
        """Return the same rows in float64, for the definition."""
        other = copy(self)
        other.weight = self.weight.double()
        other.states = [state.double() for state in self.states]
        other.last = self.last.clone()
        other.shared = self.shared | {"impl": "reference", "seed": None}
        if "last_step" in self.shared:
            other.shared["last_step"] = other.last
        return other

    @property
    def tensors(self) -> list[Tensor]:
        return [self.weight, *self.states, self.last]

    def ids(self, number: int) -> Tensor:
        """Return the rows of a step: another third of them each time."""
        return torch.arange(number % 3, C, 3, device=self.device)

    def step(self, number: int, catch_up: bool = False) -> list[Tensor]:
        """Take a step on some rows, or let all take the steps that they missed."""
        ids = torch.arange(C, device=self.device) if catch_up else self.ids(number)
        grad = None
        if not catch_up:
            grad = normal(len(ids), D, seed=number, dtype=self.grad_dtype).to(self.device)
            grad = grad.to(F64 if self.weight.dtype == F64 else grad.dtype)
        return self.apply(grad, ids, number)

    def apply(self, grad: Tensor | None, ids: Tensor, number: int) -> list[Tensor]:
        """Take a step on these rows; without a gradient, the steps that they missed."""
        if self.rule == "adamw":
            sk.row_adamw_(self.weight, grad, ids, *self.states, number, **self.shared)
        else:
            buffer = self.states[0] if self.shared.get("momentum") else None
            sk.row_sgd_(self.weight, grad, ids, momentum_buffer=buffer, step=number, **self.shared)
        return self.tensors


def check(rule: str, options: dict[str, Any], dtypes: Any, track: bool, steps: list[int]) -> None:
    ours = Rows(rule, options, dtypes, track=track)
    exact = ours.double()
    plain = Rows(rule, options, dtypes, "reference", track=track)
    for number in steps:
        results = [rows.step(number)[:3] for rows in (ours, exact, plain)]
    if track:
        results = [rows.step(steps[-1] + 7, True)[:3] for rows in (ours, exact, plain)]
    # AdamW divides by a square root near zero: its first steps are about lr, whatever the gradient.
    atol = (8 if rule == "sgd" else 64) * EPS
    for name, *values in zip(("weight", "state", "square"), *results, strict=True):
        assert_as_exact_as_torch(*values, atol=atol, name=name)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@each_rule
def test_matches_float64(rule, options, dtypes):
    check(rule, options, dtypes, track=False, steps=[1, 2, 3, 4])


@each_rule
def test_rows_that_catch_up_match_float64(rule, options):
    check(rule, options, DTYPES[0], track=True, steps=[1, 2, 40, pick(300, 90)])


@pytest.mark.parametrize("rule", [MOMENTUM, ADAMW], ids=str)
def test_other_rows_are_unchanged(rule):
    rows = Rows(*rule)
    before = [t.clone() for t in rows.tensors]
    rows.step(1)
    others = torch.ones(C, dtype=torch.bool, device=DEVICE)
    others[rows.ids(1)] = False
    assert_same([t[others] for t in rows.tensors], [t[others] for t in before])
    assert (rows.weight[rows.ids(1)] != before[0][rows.ids(1)]).any()


@pytest.mark.parametrize("rule", [MOMENTUM, ADAMW], ids=str)
def test_random_rounding_is_to_a_neighbor_and_unbiased(rule):
    ours = Rows(*rule, (BF16, F32, F32), seed=11)
    exact = ours.double()
    exact.step(1)
    ours.step(1)
    rounded, value = ours.weight.double(), exact.weight
    unit = 2.0 ** (torch.frexp(value)[1].double() - 8)  # the distance of bfloat16 numbers there
    assert ((rounded - value).abs() <= unit * (1 + 1e-4) + 1e-7).all()
    rows = ours.ids(1)
    error = ((rounded - value) / unit)[rows]
    assert error.abs().max() > 0.5  # beyond rounding to nearest
    assert error.mean().abs() < 5 * 0.5 / error.numel() ** 0.5
    theirs = Rows(*rule, (BF16, F32, F32), impl="reference", seed=11, device="cpu")
    theirs.step(1)
    # The random bits are those of the CPU; arithmetic may differ in a last bit.
    assert (theirs.weight != ours.weight.cpu()).double().mean() < 1e-3


@pytest.mark.parametrize("seed", [None, 5])
@each_rule
def test_two_runs_agree_bitwise(rule, options, seed):
    one, two = (Rows(rule, options, DTYPES[1], seed=seed, track=True) for _ in range(2))
    for number in (1, 2, 40):
        assert_same(one.step(number), two.step(number))


def replayed_step(rows: Rows, grad: Tensor) -> list[Tensor]:
    initial, ids = [t.clone() for t in rows.tensors], rows.ids(3)

    def restore() -> None:
        for tensor, value in zip(rows.tensors, initial, strict=True):
            tensor.copy_(value)

    return replayed(lambda: rows.apply(grad, ids, 3), restore)


@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
@pytest.mark.parametrize("rule", [RULES[0], MOMENTUM], ids=str)
def test_a_replayed_step_is_the_eager_one(rule, dtypes):
    one, two = (Rows(*rule, dtypes) for _ in range(2))
    grad = normal(len(one.ids(3)), D)
    assert_same(replayed_step(one, grad), two.apply(grad, two.ids(3), 3))


@pytest.mark.parametrize(
    ("rule", "options"),
    [(MOMENTUM, {"seed": 5}), (MOMENTUM, {"track": True}), (ADAMW, {})],
    ids=str,
)
def test_a_step_that_depends_on_its_number_is_not_captured(rule, options):
    rows = Rows(*rule, DTYPES[1], **options)
    with pytest.raises(RuntimeError, match=r"step must not change .* while a CUDA graph is captur"):
        replayed_step(rows, normal(len(rows.ids(3)), D))


@pytest.mark.parametrize("rule", [MOMENTUM, ADAMW], ids=str)
def test_a_step_never_waits_for_the_gpu(rule):
    rows = Rows(*rule, track=True)
    grad, ids, numbers = normal(len(rows.ids(1)), D), rows.ids(1), iter((1, 2))
    assert_no_host_sync(lambda: rows.apply(grad, ids, next(numbers)))


@pytest.mark.parametrize("rule", [MOMENTUM, ADAMW], ids=str)
def test_another_device(rule):
    on_another_device(lambda device: Rows(*rule, device=device, track=True).step(2))


@pytest.mark.parametrize("rule", [MOMENTUM, ADAMW], ids=str)
def test_compile_fullgraph(rule):
    one, two = (Rows(*rule) for _ in range(2))
    grad, ids = normal(len(one.ids(1)), D), one.ids(1)

    def step(weight: Tensor, states: list[Tensor]) -> Tensor:
        if rule[0] == "adamw":
            return sk.row_adamw_(weight, grad, ids, *states, 1, **one.shared) + 0
        return sk.row_sgd_(weight, grad, ids, momentum_buffer=states[0], step=1, **one.shared) + 0

    assert_same([compiled(step)(one.weight, one.states)], [step(two.weight, two.states)])
    assert_same(one.tensors, two.tensors)
