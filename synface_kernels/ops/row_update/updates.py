"""Optimizer steps as values: the rule, its numbers and its states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..._check import describe

NEGLIGIBLE = (2.0**-26, 2.0**-55)  # what is left of a series, to its first term; float32, float64


@dataclass(frozen=True, eq=False, kw_only=True)
class SGDUpdate:
    """A step of SGD that `margin_cross_entropy` takes on its centers in its backward pass.

    Attributes: as `row_sgd_`'s arguments, with the same meaning, defaults and errors. The states
    are of the weight's shape. They are written in that backward pass, and nowhere else.

    Source: see `row_sgd_`.
    """

    rule: ClassVar = "sgd"
    lr: float
    momentum_buffer: Tensor | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    step: int | None = None
    last_step: Tensor | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _check_numbers(
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            dampening=self.dampening,
        )
        if (self.momentum_buffer is not None) != (self.momentum > 0):
            raise ValueError(
                "momentum_buffer is required just where momentum > 0, "
                f"got {describe(self.momentum_buffer)} with momentum {self.momentum}"
            )
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise ValueError(
                "nesterov needs momentum > 0 and dampening = 0, "
                f"got momentum {self.momentum} and dampening {self.dampening}"
            )
        _check_step(self.step, self.last_step, self.seed)

    @property
    def states(self) -> dict[str, Tensor | None]:
        return {"momentum_buffer": self.momentum_buffer}

    @property
    def numbers(self) -> tuple[float, ...]:
        """As the op's schema has them."""
        return (self.lr, self.momentum, self.weight_decay, self.dampening, self.nesterov)


@dataclass(frozen=True, eq=False, kw_only=True)
class AdamWUpdate:
    """A step of AdamW that `margin_cross_entropy` takes on its centers in its backward pass.

    Attributes: as `row_adamw_`'s arguments, see `SGDUpdate`.

    Source: see `row_adamw_`.
    """

    rule: ClassVar = "adamw"
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    last_step: Tensor | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        betas = self.betas
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise TypeError(f"betas must be a pair of numbers, got {betas!r}")
        _check_numbers(
            lr=self.lr,
            eps=self.eps,
            weight_decay=self.weight_decay,
            beta1=betas[0],
            beta2=betas[1],
        )
        if max(betas) >= 1:
            raise ValueError(f"betas must be in [0, 1), got {tuple(betas)}")
        if self.step is None:
            raise TypeError("step must be an int, got NoneType")
        for name, state in self.states.items():
            if state is None:
                raise TypeError(f"{name} must be a tensor, got NoneType")
        _check_step(self.step, self.last_step, self.seed)

    @property
    def states(self) -> dict[str, Tensor | None]:
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    @property
    def numbers(self) -> tuple[float, ...]:
        """As the op's schema has them."""
        return (self.lr, *self.betas, self.eps, self.weight_decay)


RowUpdate = SGDUpdate | AdamWUpdate

MOST_TERMS = 2**17  # of missed steps that are added one by one: milliseconds for a row


def terms(lr: float, beta1: float, beta2: float, weight_decay: float, negligible: float) -> int:
    """Return how many missed steps of AdamW move a weight by what is not below rounding.

    Whatever their bias corrections are; 2³¹ − 1 where the series does not fall.
    """
    if beta1 == 0:
        return 1
    keep = 1 - lr * weight_decay
    ratio = beta1 / (math.sqrt(beta2) * keep) if beta2 > 0 and keep > 0 else math.inf
    if ratio >= 1:
        return 2**31 - 1
    enough = negligible * (1 - ratio) * (1 - beta1) * math.sqrt(1 - beta2)
    return math.ceil(math.log(enough) / math.log(ratio)) + 1


def most_missed(rule: str, numbers: Sequence[float], dtype: torch.dtype) -> int | None:
    """Return how many steps a row may miss, None for any number; ``dtype`` is the weight's."""
    if rule == "sgd":
        return None
    lr, beta1, beta2, _, weight_decay = numbers
    negligible = NEGLIGIBLE[dtype == torch.float64]
    needed = terms(lr, beta1, beta2, weight_decay, negligible)
    return MOST_TERMS if needed > MOST_TERMS else None


def _check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {describe(value)}")
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be finite and ≥ 0, got {value}")


def _check_step(step: int | None, last_step: Tensor | None, seed: int | None) -> None:
    for name, value, least in (("step", step, 1), ("seed", seed, 0)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an int, got {describe(value)}")
        short = isinstance(last_step, Tensor) and last_step.dtype == torch.int32
        most = 2**31 if name == "step" and short else 2**63
        if not least <= value < most:
            raise ValueError(f"{name} must be in [{least}, {most}), got {value}")
    if step is None and (last_step is not None or seed is not None):
        raise ValueError("step is required with last_step or seed")
