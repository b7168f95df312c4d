"""The configuration of class centers and their optimizer."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from ...common.check import check_bool, check_integer, check_number, describe

ROWS, LAST_STEP = "rows.bin", "last_step.bin"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class CentersConfig:
    """Size, dtype, optimizer and seed of class centers.

    Attributes:
        num_classes: C, in [1, 2^31). embedding_size: D, in [1, 2^20].
        dtype: of the centers and of their optimizer's state: ``"bfloat16"``, stored with seeded
            stochastic rounding, or ``"float32"``.
        optimizer: ``"sgd"`` (`sk.row_sgd_`) or ``"adamw"`` (`sk.row_adamw_`).
        momentum, nesterov: of SGD; without momentum there is no buffer.
        betas, eps: of AdamW.
        weight_decay: of the optimizer.
        catch_up: when a row is sampled, it first takes the steps that it missed, as a dense
            optimizer would have taken them. False: rows that are not sampled stay as they are.
        init_std: standard deviation of the initial values.
        seed: of the initial values, the sampled classes and the stochastic rounding.
    """

    num_classes: int
    embedding_size: int
    dtype: str = "bfloat16"
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    catch_up: bool = True
    init_std: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name, most in (("num_classes", 2**31 - 1), ("embedding_size", 2**20)):
            check_integer(name, getattr(self, name), 1, most)
        check_integer("seed", self.seed, 0)
        for name, allowed in (("dtype", tuple(DTYPES)), ("optimizer", ("sgd", "adamw"))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be {' or '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name in ("momentum", "eps", "weight_decay", "init_std"):
            check_number(name, getattr(self, name), 0)
        for name in ("nesterov", "catch_up"):
            check_bool(name, getattr(self, name))
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum > 0, got 0")
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise TypeError(f"betas must be a pair of numbers, got {describe(self.betas)}")
        object.__setattr__(self, "betas", tuple(self.betas))
        for beta in self.betas:
            check_number("betas", beta, 0)
            if beta >= 1:
                raise ValueError(f"betas must be in [0, 1), got {self.betas}")

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the optimizer's states, one (C, D) matrix each."""
        if self.optimizer == "adamw":
            return "exp_avg", "exp_avg_sq"
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def width(self) -> int:
        """Count of values in a record: a center, then its states."""
        return (1 + len(self.states)) * self.embedding_size

    @property
    def record_bytes(self) -> int:
        return self.width * DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> dict[str, int]:
        """Size of each file (or, in memory, tensor)."""
        return {ROWS: self.num_classes * self.record_bytes, LAST_STEP: 4 * self.num_classes}

    @classmethod
    def from_json(cls, values: Any) -> CentersConfig:
        """Return a configuration from JSON; raise ValueError or TypeError for invalid values."""
        if not isinstance(values, dict):
            raise TypeError(f"config must be an object, got {type(values).__name__}")
        wrong = values.keys() ^ {f.name for f in fields(cls)}
        if wrong:
            raise ValueError(f"config lacks, or should not have, {', '.join(sorted(wrong))[:200]}")
        return cls(**values)
