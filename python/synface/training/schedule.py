"""Learning rate schedules."""

from __future__ import annotations

import math

from .config import TrainConfig


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    total = config.epochs * steps_per_epoch
    warmup = min(int(config.warmup_epochs * steps_per_epoch), total - 1)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "polynomial":
        return config.lr * (1 - done) ** config.power
    if config.schedule == "step":
        return config.lr * 0.1 ** ((done >= 0.6) + (done >= 0.85))
    return config.lr
