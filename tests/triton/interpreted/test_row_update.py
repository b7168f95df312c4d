"""The Triton row updates, interpreted on CPU tensors, against their definition.

Needs TRITON_INTERPRET=1 before Triton is imported; see ../test_interpreter.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import synface_kernels as sk

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
CASES: list[tuple[dict[str, Any], bool]] = [
    ({"lr": 0.1, "weight_decay": 0.01}, False),
    ({"lr": 0.1, "momentum": 0.8, "weight_decay": 0.05, "dampening": 0.3}, False),
    ({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "nesterov": True}, False),
    ({"lr": 0.01, "weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-3}, True),
    ({}, True),
    ({"lr": 0.01, "weight_decay": 0.1, "betas": (0.9, 0.5)}, True),
]
each_case = pytest.mark.parametrize(("options", "adamw"), CASES)


def normal(*shape: int, seed: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(
    impl: str, options: dict[str, Any], adamw: bool, dtypes: tuple[torch.dtype, ...],
    seed: int | None, steps: dict[int, list[int]], last: Tensor | None = None,
) -> list[Tensor]:  # fmt: skip
    """Take steps on the rows that ``steps`` names; without a gradient where it names all."""
    dtype, state_dtype, grad_dtype = dtypes
    weight = normal(7, 530, seed=0, dtype=dtype)
    states = [torch.zeros(7, 530, dtype=state_dtype) for _ in range(2)]
    for step, rows in steps.items():
        ids = torch.tensor(rows, dtype=torch.int64)
        grad = None
        if len(rows) < 7:
            grad = normal(len(rows), 530, seed=step, dtype=grad_dtype)
        shared = options | {"seed": seed, "last_step": last, "impl": impl}
        if adamw:
            sk.row_adamw_(weight, grad, ids, *states, step, **shared)
        else:
            buffer = states[0] if options.get("momentum") else None
            sk.row_sgd_(weight, grad, ids, momentum_buffer=buffer, step=step, **shared)
    return [weight, *states]


@each_case
@pytest.mark.parametrize(
    ("dtypes", "seed"),
    [((F32, F32, F32), None), ((BF16, F32, BF16), 11), ((BF16, BF16, F16), 2**63 - 1),
     ((BF16, BF16, F32), None)],
)  # fmt: skip
def test_the_definitions_bits(
    options: dict[str, Any], adamw: bool, dtypes: Any, seed: int | None
) -> None:
    steps = {1: [0, 2, 3, 6], 2: [1, 2, 5], 3: []}
    ours = run("triton", options, adamw, dtypes, seed, steps)
    for got, expected in zip(
        ours, run("reference", options, adamw, dtypes, seed, steps), strict=True
    ):
        assert torch.equal(got, expected)


@each_case
def test_rows_that_catch_up(options: dict[str, Any], adamw: bool) -> None:
    steps = {1: [0, 1, 2], 2: [1, 5], 40: [2, 5], 300: [0, 2], 310: list(range(7))}
    last = torch.zeros(7, dtype=torch.int32)
    ours = run("triton", options, adamw, (F32, F32, F32), None, steps, last)
    assert (last == 310).all()
    last.zero_()
    theirs = run("reference", options, adamw, (F32, F32, F32), None, steps, last)
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)
