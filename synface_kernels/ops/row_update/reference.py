"""Optimizer steps on some rows: the definition, in plain torch on any device.

Arithmetic is float32, or float64 for float64 weights. Missed steps are taken one by one here; the
kernels take the same steps in closed form, see `docs/kernels/row_update.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..._splitmix import GOLDEN, mixed, shifted, signed

# ---- stochastic rounding -------------------------------------------------------------------------


def _mix(z: Tensor) -> Tensor:
    return mixed(z + signed(GOLDEN))


def key_base(seed: int, step: int, stream: int) -> int:
    """Return the int64 that all rows' keys are derived from, computed on the host."""
    return int(_mix(_mix(torch.tensor(seed, device="cpu")) ^ (4 * step + stream)))


def row_keys(seed: int, step: int, stream: int, class_ids: Tensor) -> Tensor:
    """Return int64 keys (S,) of the rows' random bits; each state of an optimizer has a stream."""
    return _mix(key_base(seed, step, stream) ^ class_ids)


def random_bits(keys: Tensor, columns: int) -> Tensor:
    """Hash each row's key and the column to int64 (S, D) in [0, 2^16)."""
    word = 2**32 - 1
    x = torch.arange(columns, device=keys.device) * 0x9E3779B9 & word
    x = (x + (keys & word)[:, None]) & word
    x = ((x ^ (x >> 16)) * 0x21F0AAAD & word) ^ shifted(keys, 32)[:, None]
    x = (x ^ (x >> 15)) * 0xD35A2D97 & word
    return (x ^ (x >> 15)) >> 16


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """Round float32 to bfloat16: away from zero with the probability of the truncated part."""
    cut = (x.view(torch.int32).long() + bits) >> 16 << 16
    rounded = cut.to(torch.int32).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)


# ---- the steps -----------------------------------------------------------------------------------

Rows = list[Tensor]


class Update(NamedTuple):
    """The arguments of a step that all optimizers share; see `row_sgd_`."""

    weight: Tensor
    row_grad: Tensor | None
    class_ids: Tensor
    last_step: Tensor | None
    step: int
    seed: int | None

    @property
    def until(self) -> int:
        """The last step that rows without a gradient for it take."""
        return self.step if self.row_grad is None else self.step - 1


def _take(
    update: Update,
    states: Rows,
    idle: Callable[[Rows, Tensor], Rows],
    step: Callable[[Rows, Tensor], Rows],
) -> None:
    """Read rows of the states, take the missed steps and the one with gradients, write the rows.

    Args:
        states: the weight and the optimizer's states, (C, D) each.
        idle: takes a step without gradients: ``idle(rows, number)``, numbers (S, 1) float64.
        step: takes the step with gradients: ``step(rows, gradients)``.
    """
    weight, row_grad, class_ids, last_step, number, _ = update
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    rows = [state.index_select(0, class_ids).to(dtype) for state in states]
    if last_step is not None:
        rows = _catch_up(rows, last_step.index_select(0, class_ids).long(), update.until, idle)
        last_step[class_ids] = number
    if row_grad is not None:
        rows = step(rows, row_grad.to(dtype))
    for stream, (state, new) in enumerate(zip(states, rows, strict=True)):
        _write(update, state, new, stream)


def _catch_up(rows: Rows, last: Tensor, until: int, idle: Callable[[Rows, Tensor], Rows]) -> Rows:
    """Take the steps last + 1 … until, without gradients."""
    for k in range(1, int((until - last).max()) + 1 if last.numel() else 0):
        number = last + k
        active = (number <= until)[:, None]
        moved = idle(rows, number[:, None].double())
        rows = [torch.where(active, new, old) for new, old in zip(moved, rows, strict=True)]
    return rows


def _write(update: Update, state: Tensor, rows: Tensor, stream: int) -> None:
    """Write rows of a state in its dtype, rounded stochastically where the update has a seed."""
    if update.seed is not None and state.dtype == torch.bfloat16:
        keys = row_keys(update.seed, update.step, stream, update.class_ids)
        rows = round_stochastically(rows, random_bits(keys, rows.shape[1]))
    state.index_copy_(0, update.class_ids, rows.to(state.dtype))


def _sqrt(x: Tensor) -> Tensor:
    """Return correctly rounded roots, unlike torch's vectorized float32 sqrt."""
    return x.double().sqrt().to(x.dtype)


def sgd(
    update: Update,
    momentum_buffer: Tensor | None,
    lr: float,
    momentum: float,
    weight_decay: float,
    dampening: float,
    nesterov: bool,
) -> None:
    """Take a step of `row_sgd_`."""

    def step(rows: Rows, grad: Tensor | float) -> Rows:
        w, *buffer = rows
        g = grad + weight_decay * w
        if not buffer:
            return [w - lr * g]
        b = momentum * buffer[0] + (1 - dampening) * g
        return [w - lr * (g + momentum * b if nesterov else b), b]

    states = [update.weight] if momentum_buffer is None else [update.weight, momentum_buffer]
    _take(update, states, lambda rows, _: step(rows, 0.0), step)


def adamw(
    update: Update,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Take a step of `row_adamw_`."""

    def moved(
        w: Tensor, m: Tensor, v: Tensor, size: float | Tensor, root: float | Tensor
    ) -> Tensor:
        return (1 - lr * weight_decay) * w - size * (m / (_sqrt(v) * root + eps))

    def idle(rows: Rows, number: Tensor) -> Rows:
        w, m, v = rows
        m, v = beta1 * m, beta2 * v
        size = (lr / (1 - beta1**number)).to(w.dtype)
        root = (1 - beta2**number).rsqrt().to(w.dtype)
        return [moved(w, m, v, size, root), m, v]

    def step(rows: Rows, g: Tensor) -> Rows:
        w, m, v = rows
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        size, root = lr / (1 - beta1**update.step), 1 / math.sqrt(1 - beta2**update.step)
        return [moved(w, m, v, size, root), m, v]

    _take(update, [update.weight, exp_avg, exp_avg_sq], idle, step)
