"""Optimizer steps as values: the rule, its hyperparameters and its states."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..._check import describe

# Relative to a series' first term, a rest that may be left out: for float32, for float64.
NEGLIGIBLE = (2.0**-26, 2.0**-55)


class SGDNumbers(NamedTuple):
    """The hyperparameters of an SGD step, in the order of the ops' schemas."""

    lr: float
    momentum: float
    weight_decay: float
    dampening: float
    nesterov: bool


class AdamWNumbers(NamedTuple):
    """The hyperparameters of an AdamW step, in the order of the ops' schemas."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


NUMBERS: dict[str, type[SGDNumbers] | type[AdamWNumbers]] = {
    "sgd": SGDNumbers,
    "adamw": AdamWNumbers,
}


@dataclass(frozen=True, eq=False, kw_only=True)
class SGDUpdate:
    """A step of SGD that `margin_cross_entropy` takes on its centers in its backward pass.

    Attributes: as `row_sgd_`'s arguments, with the same meaning, defaults and errors. The states
    have the weight's shape. Only that backward pass writes them.

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
        """The optimizer's states by their names."""
        return {"momentum_buffer": self.momentum_buffer}

    @property
    def numbers(self) -> SGDNumbers:
        """The step's hyperparameters."""
        return SGDNumbers(self.lr, self.momentum, self.weight_decay, self.dampening, self.nesterov)


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
        """The optimizer's states by their names."""
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}

    @property
    def numbers(self) -> AdamWNumbers:
        """The step's hyperparameters."""
        return AdamWNumbers(self.lr, *self.betas, self.eps, self.weight_decay)


RowUpdate = SGDUpdate | AdamWUpdate

# Greatest number of missed steps that are added one by one: milliseconds for a row.
MOST_TERMS = 2**17


def terms(lr: float, beta1: float, beta2: float, weight_decay: float, negligible: float) -> int:
    """Return how many missed steps of AdamW move a weight by more than a rounding error.

    A bound for any bias correction; 2³¹ − 1 where the series does not converge.
    """
    if beta1 == 0:
        return 1
    keep = 1 - lr * weight_decay
    ratio = beta1 / (math.sqrt(beta2) * keep) if beta2 > 0 and keep > 0 else math.inf
    if ratio >= 1:
        return 2**31 - 1
    enough = negligible * (1 - ratio) * (1 - beta1) * math.sqrt(1 - beta2)
    return math.ceil(math.log(enough) / math.log(ratio)) + 1


def most_missed(rule: str, numbers: Iterable[float], dtype: torch.dtype) -> int | None:
    """Return how many steps a row may miss, None for any number; ``dtype`` is the weight's."""
    if rule == "sgd":
        return None
    adamw = AdamWNumbers(*numbers)
    negligible = NEGLIGIBLE[dtype == torch.float64]
    needed = terms(adamw.lr, adamw.beta1, adamw.beta2, adamw.weight_decay, negligible)
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
