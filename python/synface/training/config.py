"""Configuration of a training run, without an import of torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import synface_kernels as sk

# What configurations had no name for at first; it then was as it now is by default.
LATER = {
    "accumulate",
    "precision",
    "power",
    "clip_norm",
    "freeze_statistics",
    "sample_rate",
    "fused_update",
}
PRECISIONS = ("float32", "bfloat16", "float16")  # of torch's dtypes


@dataclass(frozen=True)
class TrainConfig:
    """What makes a run. Two runs of one configuration on one machine are bitwise the same.

    Attributes:
        epochs, batch_size: the last, shorter batch of an epoch is trained on too.
        accumulate: in how many parts a batch goes through the network, whose gradients are added
            up: less memory, and batch statistics of a part each.
        precision: of the network's arithmetic, by autocast: "float32", "bfloat16", or "float16"
            with a scaled loss. Parameters, head and loss stay float32.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adamw"; lr, weight_decay: its settings.
        schedule: "cosine", "polynomial" ((1 − t)^power), "step" (÷10 after 60 % and 85 % of the
            steps) or "constant"; warmup_epochs of linear warm-up come first.
        clip_norm: the network's gradient is cut to this norm; 0 leaves it.
        freeze_statistics: normalize by the running statistics, not by a batch's.
        sample_rate: share of the classes that take part in a step (Partial FC). Below 1 the
            centers take their optimizer's steps row by row: `synface.optim`.
        fused_update: the backward pass takes these steps on the centers itself, whose gradient
            never exists; with accumulate 1.
        scale, m1, m2, m3: of the margin, m2 in radians.
        widths, depths, embedding_size, dropout: of the backbone.
        augment: strength of the augmentation, 0 for none.
        checkpoint_every: epochs between checkpoints, such as 0.1 where an epoch takes hours.
        seed: of everything random.
    """

    epochs: int = 40
    batch_size: int = 32
    accumulate: int = 1
    precision: str = "float32"
    optimizer: str = "sgd"
    lr: float = 0.2
    weight_decay: float = 1e-3
    schedule: str = "cosine"
    power: float = 2.0
    warmup_epochs: float = 2.0
    clip_norm: float = 0.0
    freeze_statistics: bool = False
    sample_rate: float = 1.0
    fused_update: bool = False
    scale: float = 32.0
    m1: float = 1.0
    m2: float = 0.3
    m3: float = 0.0
    widths: tuple[int, ...] = (16, 32, 64, 128)
    depths: tuple[int, ...] = (1, 1, 1, 1)
    embedding_size: int = 128
    dropout: float = 0.2
    augment: float = 1.0
    checkpoint_every: float = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not math.isfinite(self.checkpoint_every):
            raise ValueError(f"checkpoint_every must be finite, got {self.checkpoint_every}")
        positive = ("epochs", "batch_size", "lr", "power", "embedding_size", "checkpoint_every")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_epochs", "clip_norm", "augment", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 1 <= self.accumulate <= self.batch_size:
            raise ValueError(
                f"accumulate must be in [1, batch_size = {self.batch_size}], got {self.accumulate}"
            )
        if self.fused_update and self.accumulate > 1:
            raise ValueError(
                "fused_update steps the centers after each part of a batch: accumulate must be 1, "
                f"got {self.accumulate}"
            )
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {self.sample_rate}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for name, allowed in (
            ("optimizer", ("sgd", "adamw")),
            ("schedule", ("cosine", "polynomial", "step", "constant")),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        from ..data import Augment

        self.margin()
        Augment(self.augment)

    def margin(self) -> sk.CombinedMargin:
        return sk.CombinedMargin(self.scale, self.m1, self.m2, self.m3)

    @staticmethod
    def from_json(values: dict[str, Any]) -> TrainConfig:
        from ..common.files import CheckpointError

        known = {f.name for f in fields(TrainConfig)}
        different = sorted((values.keys() ^ known) - (LATER - values.keys()))
        if different:
            raise CheckpointError(f"a configuration with unknown or missing keys: {different}")
        lists: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return TrainConfig(**lists)
