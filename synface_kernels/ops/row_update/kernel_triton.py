"""Row updates in Triton: one program per row and block of columns, in the definition's order.

No fused multiply-adds, and correctly rounded roots and quotients: the same bits as the definition,
except for missed steps, which are in closed form as in C++ (docs/kernels/row_update.md).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .reference import Update, row_keys
from .updates import NEGLIGIBLE
from .updates import terms as series_terms

BLOCK = 512


@triton.jit
def _store(state, at, mask, value, key, column, FORMAT: tl.constexpr):
    """Store float32 (FORMAT 0), or bfloat16, rounded to nearest (1) or as reference.py does (2)."""
    if FORMAT == 0:
        tl.store(state + at, value, mask=mask)
    else:
        bits = value.to(tl.uint32, bitcast=True)
        if FORMAT == 1:
            rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        else:
            low, high = (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
            golden = tl.full((), 0x9E3779B9, tl.uint32)
            x = column.to(tl.uint32) * golden + low
            x = (x ^ (x >> 16)) * tl.full((), 0x21F0AAAD, tl.uint32) ^ high
            x = (x ^ (x >> 15)) * tl.full((), 0xD35A2D97, tl.uint32)
            rounded = bits + ((x ^ (x >> 15)) >> 16)
        half = tl.where(value == value, rounded >> 16, 0x7FC0).to(tl.uint16)
        tl.store(state + at, half.to(tl.bfloat16, bitcast=True), mask=mask)


@triton.jit
def _load(state, at, mask):
    return tl.load(state + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _sgd_kernel(
    weight, gradient, ids, buffer, maps, keys, count, columns, s_weight, s_gradient, s_buffer,
    lr, momentum, decay, take,
    GRADIENT: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, LAZY: tl.constexpr,
    W_FORMAT: tl.constexpr, B_FORMAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    row = tl.load(ids + i)
    at_w, at_b = row * s_weight + column, row * s_buffer + column
    w = _load(weight, at_w, mask)
    b = tl.zeros_like(w)
    if MOMENTUM:
        b = _load(buffer, at_b, mask)
    if LAZY:  # (w, b) ← A·(w, b), A the power for the missed steps
        old = w
        w = tl.load(maps + 4 * i) * old + tl.load(maps + 4 * i + 1) * b
        b = tl.load(maps + 4 * i + 2) * old + tl.load(maps + 4 * i + 3) * b
    if GRADIENT:
        g = _load(gradient, i * s_gradient + column, mask) + decay * w
        if MOMENTUM:
            b = momentum * b + take * g
            w = w - lr * (g + momentum * b if NESTEROV else b)
        else:
            w = w - lr * g
    _store(weight, at_w, mask, w, tl.load(keys + i), column, W_FORMAT)
    if MOMENTUM:
        _store(buffer, at_b, mask, b, tl.load(keys + count + i), column, B_FORMAT)


@triton.jit
def _adamw_kernel(
    weight, gradient, ids, mean, square, missed, last_powers, constants, keys, count, columns,
    s_weight, s_gradient, s_mean, s_square, terms,
    keep, beta1, take1, beta2, take2, size, root, eps,
    GRADIENT: tl.constexpr, LAZY: tl.constexpr, W_FORMAT: tl.constexpr, M_FORMAT: tl.constexpr,
    V_FORMAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < columns
    row = tl.load(ids + i)
    at_w, at_m, at_v = row * s_weight + column, row * s_mean + column, row * s_square + column
    w, m, v = _load(weight, at_w, mask), _load(mean, at_m, mask), _load(square, at_v, mask)
    if LAZY:
        steps = tl.load(missed + i)
        if steps > 0:
            # lr, β₁, β₂ and 1/(1 − lr·weight_decay), float64; their powers are running products.
            rate, b1 = tl.load(constants), tl.load(constants + 1)
            b2, grow = tl.load(constants + 2), tl.load(constants + 3)
            power1, power2 = tl.load(last_powers + 5 * i), tl.load(last_powers + 5 * i + 1)
            later = tl.load(last_powers + 5 * i + 2)  # (1 − lr·weight_decay)^missed
            moment1, moment2 = rate * 0.0 + 1.0, rate * 0.0 + 1.0
            total, start = tl.zeros_like(w), tl.sqrt_rn(v)
            decayed = later
            for _ in range(tl.minimum(steps, terms)):
                power1 *= b1
                power2 *= b2
                moment1 *= b1
                moment2 *= b2
                decayed *= grow
                step_size = rate * moment1 / (1.0 - power1) * decayed
                factor = tl.sqrt(moment2 / (1.0 - power2))
                denominator = start * factor.to(tl.float32) + eps
                total += tl.div_rn(tl.zeros_like(w) + step_size.to(tl.float32), denominator)
            total = tl.where(m == 0, 0.0, total)
            w = later.to(tl.float32) * w - m * total
            m = m * tl.load(last_powers + 5 * i + 3).to(tl.float32)
            v = v * tl.load(last_powers + 5 * i + 4).to(tl.float32)
    if GRADIENT:
        g = _load(gradient, i * s_gradient + column, mask)
        m = beta1 * m + take1 * g
        v = beta2 * v + take2 * g * g
        w = keep * w - size * tl.div_rn(m, tl.sqrt_rn(v) * root + eps)
    _store(weight, at_w, mask, w, tl.load(keys + i), column, W_FORMAT)
    _store(mean, at_m, mask, m, tl.load(keys + count + i), column, M_FORMAT)
    _store(square, at_v, mask, v, tl.load(keys + 2 * count + i), column, V_FORMAT)


def _format(state: Tensor, seed: int | None) -> int:
    return 0 if state.dtype == torch.float32 else 1 if seed is None else 2


def _keys(update: Update, streams: int) -> Tensor:
    _, _, ids, _, step, seed = update
    if seed is None:
        return ids.new_empty((streams, ids.numel()))  # loaded but not used
    return torch.stack([row_keys(seed, step, stream, ids) for stream in range(streams)])


def _powers(matrix: Tensor, exponents: Tensor, most: int) -> Tensor:
    """Return powers (S, 2, 2) of a float64 matrix by repeated squaring; no exponent is > most."""
    result = torch.eye(2, dtype=torch.float64, device=exponents.device).expand(len(exponents), 2, 2)
    for bit in range(most.bit_length()):
        base = matrix.to(exponents.device)
        odd = (exponents >> bit & 1).bool()[:, None, None]
        result = torch.where(odd, result @ base, result)
        matrix = matrix @ matrix
    return result


def _launch(kernel: Any, class_ids: Tensor, columns: int, *args: Any, **config: Any) -> None:
    if class_ids.numel() and columns:
        grid = (class_ids.numel(), triton.cdiv(columns, BLOCK))
        # Fused multiply-adds would give other bits than the definition.
        kernel[grid](*args, **config, BLOCK=BLOCK, enable_fp_fusion=False)


def _contiguous(update: Update) -> tuple[Update, Tensor]:
    """Return the update with contiguous ids, and a gradient of contiguous rows or a placeholder."""
    gradient = update.weight if update.row_grad is None else update.row_grad
    if gradient.stride(1) != 1:
        gradient = gradient.contiguous()
    return update._replace(class_ids=update.class_ids.contiguous()), gradient


def sgd(
    update: Update,
    momentum_buffer: Tensor | None,
    lr: float,
    momentum: float,
    weight_decay: float,
    dampening: float,
    nesterov: bool,
) -> None:
    """Take a step of SGD; arguments as for `reference.sgd`."""
    update, gradient = _contiguous(update)
    weight, row_grad, ids, last_step, step, seed = update
    buffer = weight if momentum_buffer is None else momentum_buffer
    maps = weight
    if last_step is not None:
        into = (1 - dampening) * weight_decay
        fast = lr * (weight_decay + momentum * into) if nesterov else lr * into
        coast = lr * momentum * (momentum if nesterov else 1)
        if momentum_buffer is None:
            fast, into, coast = lr * weight_decay, 0.0, 0.0
        idle = torch.tensor(
            [[1 - fast, -coast], [into, momentum]], dtype=torch.float64, device="cpu"
        )
        missed = update.until - last_step.index_select(0, ids).long()
        maps = _powers(idle, missed, step).float().contiguous()
    _launch(
        _sgd_kernel, ids, weight.shape[1],
        weight, gradient, ids, buffer, maps, _keys(update, 2), ids.numel(),
        weight.shape[1], weight.stride(0), gradient.stride(0), buffer.stride(0),
        lr, momentum, weight_decay, 1 - dampening,
        GRADIENT=row_grad is not None, MOMENTUM=momentum_buffer is not None, NESTEROV=nesterov,
        LAZY=last_step is not None, W_FORMAT=_format(weight, seed), B_FORMAT=_format(buffer, seed),
    )  # fmt: skip
    if last_step is not None:
        last_step.index_fill_(0, ids, step)


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
    """Take a step of AdamW; arguments as for `reference.adamw`."""
    update, gradient = _contiguous(update)
    weight, row_grad, ids, last_step, step, seed = update
    missed, powers, constants, terms = ids, weight, weight, 0
    keep = 1 - lr * weight_decay
    if last_step is not None:
        if keep <= 0:
            raise NotImplementedError(
                f"last_step with impl='triton' needs lr·weight_decay < 1, got {lr * weight_decay}"
            )
        last = last_step.index_select(0, ids).long()
        missed = update.until - last
        powers = torch.stack(
            [
                *(base ** last.double() for base in (beta1, beta2)),
                *(base ** missed.double() for base in (keep, beta1, beta2)),
            ],
            dim=1,
        )
        constants = ids.new_tensor([lr, beta1, beta2, 1 / keep], dtype=torch.float64)
        terms = series_terms(lr, beta1, beta2, weight_decay, NEGLIGIBLE[0])
    size, root = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    _launch(
        _adamw_kernel, ids, weight.shape[1],
        weight, gradient, ids, exp_avg, exp_avg_sq, missed, powers, constants,
        _keys(update, 3), ids.numel(), weight.shape[1], weight.stride(0),
        gradient.stride(0), exp_avg.stride(0), exp_avg_sq.stride(0), terms,
        keep, beta1, 1 - beta1, beta2, 1 - beta2, size, root, eps,
        GRADIENT=row_grad is not None, LAZY=last_step is not None,
        W_FORMAT=_format(weight, seed), M_FORMAT=_format(exp_avg, seed),
        V_FORMAT=_format(exp_avg_sq, seed),
    )  # fmt: skip
    if last_step is not None:
        last_step.index_fill_(0, ids, step)
