"""Optimiser steps on some rows: the definition, in plain torch on any device.

Arithmetic is float32, or float64 for float64 weights. A row that missed steps goes through them one
by one here; the kernels take the same steps in closed form, see `docs/kernels/row_update.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

GOLDEN, MIX1, MIX2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


# ---- random rounding -----------------------------------------------------------------------------


def _shifted(z: Tensor, by: int) -> Tensor:
    return (z >> by) & (2 ** (64 - by) - 1)


def _mix(z: Tensor) -> Tensor:
    """SplitMix64 of int64 words, which wrap as unsigned ones do."""
    z = z + (GOLDEN - 2**64)
    z = (z ^ _shifted(z, 30)) * (MIX1 - 2**64)
    z = (z ^ _shifted(z, 27)) * (MIX2 - 2**64)
    return z ^ _shifted(z, 31)


def row_keys(seed: int, step: int, stream: int, class_ids: Tensor) -> Tensor:
    """(S,) int64 keys of the rows' random bits; ``stream`` tells an optimiser's states apart."""
    base = _mix(torch.tensor(seed)) ^ (4 * step + stream)
    return _mix(_mix(base).to(class_ids.device) ^ class_ids)


def random_bits(keys: Tensor, columns: int) -> Tensor:
    """(S, D) int64 in [0, 2^16): a hash of each row's key and the column."""
    word = 2**32 - 1
    x = torch.arange(columns, device=keys.device) * 0x9E3779B9 & word
    x = (x + (keys & word)[:, None]) & word
    x = ((x ^ (x >> 16)) * 0x21F0AAAD & word) ^ _shifted(keys, 32)[:, None]
    x = (x ^ (x >> 15)) * 0xD35A2D97 & word
    return (x ^ (x >> 15)) >> 16


def round_stochastically(x: Tensor, bits: Tensor) -> Tensor:
    """float32 to bfloat16: away from zero with the chance of what is cut off."""
    cut = (x.view(torch.int32).long() + bits) >> 16 << 16
    rounded = cut.to(torch.int32).view(torch.float32)
    return torch.where(x.isnan(), x, rounded).to(torch.bfloat16)


def _write(
    state: Tensor, rows: Tensor, class_ids: Tensor, step: int, seed: int | None, stream: int
) -> None:
    if seed is not None and state.dtype == torch.bfloat16:
        keys = row_keys(seed, step, stream, class_ids)
        rows = round_stochastically(rows, random_bits(keys, rows.shape[1]))
    state.index_copy_(0, class_ids, rows.to(state.dtype))


# ---- the steps -----------------------------------------------------------------------------------

Rows = list[Tensor]


def _read(weight: Tensor, class_ids: Tensor, *states: Tensor) -> Rows:
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return [state.index_select(0, class_ids).to(dtype) for state in (weight, *states)]


def _catch_up(
    rows: Rows,
    last_step: Tensor,
    class_ids: Tensor,
    until: int,
    idle: Callable[[Rows, Tensor], Rows],
) -> Rows:
    """Takes steps last_step + 1 … until, without gradients; ``idle(rows, step)`` is one of them."""
    last = last_step.index_select(0, class_ids).long()
    for k in range(1, int((until - last).max()) + 1 if last.numel() else 0):
        step = last + k
        active = (step <= until)[:, None]
        moved = idle(rows, step[:, None].double())
        rows = [torch.where(active, new, old) for new, old in zip(moved, rows, strict=True)]
    return rows


def _sqrt(x: Tensor) -> Tensor:
    """Rounded correctly, which torch's own vectorised float32 root is not."""
    return x.double().sqrt().to(x.dtype)


def sgd(
    weight: Tensor,
    row_grad: Tensor | None,
    class_ids: Tensor,
    momentum_buffer: Tensor | None,
    last_step: Tensor | None,
    lr: float,
    momentum: float,
    weight_decay: float,
    dampening: float,
    nesterov: bool,
    step: int,
    seed: int | None,
) -> None:
    def one_step(rows: Rows, grad: Tensor | float) -> Rows:
        w, *buffer = rows
        g = grad + weight_decay * w
        if not buffer:
            return [w - lr * g]
        b = momentum * buffer[0] + (1 - dampening) * g
        return [w - lr * (g + momentum * b if nesterov else b), b]

    states = [weight] if momentum_buffer is None else [weight, momentum_buffer]
    rows = _read(weight, class_ids, *states[1:])
    if last_step is not None:
        until = step if row_grad is None else step - 1
        rows = _catch_up(rows, last_step, class_ids, until, lambda rows, _: one_step(rows, 0.0))
        last_step[class_ids] = step
    if row_grad is not None:
        rows = one_step(rows, row_grad.to(rows[0].dtype))
    for stream, (state, new) in enumerate(zip(states, rows, strict=True)):
        _write(state, new, class_ids, step, seed, stream)


def adamw(
    weight: Tensor,
    row_grad: Tensor | None,
    class_ids: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    last_step: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    seed: int | None,
) -> None:
    def moved(
        w: Tensor, m: Tensor, v: Tensor, size: float | Tensor, root: float | Tensor
    ) -> Tensor:
        return (1 - lr * weight_decay) * w - size * (m / (_sqrt(v) * root + eps))

    def idle(rows: Rows, step: Tensor) -> Rows:
        w, m, v = rows
        m, v = beta1 * m, beta2 * v
        size = (lr / (1 - beta1**step)).to(w.dtype)
        root = (1 - beta2**step).rsqrt().to(w.dtype)
        return [moved(w, m, v, size, root), m, v]

    states = (weight, exp_avg, exp_avg_sq)
    rows = _read(weight, class_ids, exp_avg, exp_avg_sq)
    if last_step is not None:
        until = step if row_grad is None else step - 1
        rows = _catch_up(rows, last_step, class_ids, until, idle)
        last_step[class_ids] = step
    if row_grad is not None:
        w, m, v = rows
        g = row_grad.to(w.dtype)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        size, root = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
        rows = [moved(w, m, v, size, root), m, v]
    for stream, (state, new) in enumerate(zip(states, rows, strict=True)):
        _write(state, new, class_ids, step, seed, stream)
