"""Row updates in Triton: one program per row and block of columns, in the definition's order.

No fused multiply-adds, and correctly rounded roots and quotients: the same bits as the definition,
except for missed steps, which are in closed form as in C++ (docs/kernels/row_update.md).

A step is one launch and, with ``last_step``, one more to write it. Nothing is copied to the GPU:
numbers of the step are the kernels' arguments, and powers of float64 numbers are computed there.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._triton import launch
from .reference import Update, key_base
from .updates import NEGLIGIBLE
from .updates import terms as series_terms

BLOCK = 512
# Arguments that change from step to step: no variant of a kernel is compiled for their values.
_CHANGING = ["until", "key0", "key1"]


@triton.jit
def _float64(high, middle, low):
    """Return the sum of three parts, see `_parts`."""
    return ((tl.zeros((), tl.float64) + high) + middle) + low


@triton.jit
def _power(base, exponent):
    """Return base^exponent, float64, by repeated squaring."""
    result = tl.full((), 1.0, tl.float64)
    while exponent > 0:
        result = tl.where((exponent & 1) == 1, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def _matrix_power(a, b, c, d, exponent):
    """Return the power of a 2 × 2 matrix, float64, by repeated squaring."""
    p, q = tl.full((), 1.0, tl.float64), tl.full((), 0.0, tl.float64)
    r, s = tl.full((), 0.0, tl.float64), tl.full((), 1.0, tl.float64)
    while exponent > 0:
        odd = (exponent & 1) == 1
        pa, pb, ra, rb = p * a + q * c, p * b + q * d, r * a + s * c, r * b + s * d
        p, q = tl.where(odd, pa, p), tl.where(odd, pb, q)
        r, s = tl.where(odd, ra, r), tl.where(odd, rb, s)
        aa, ab, ca, cb = a * a + b * c, a * b + b * d, c * a + d * c, c * b + d * d
        a, b, c, d = aa, ab, ca, cb
        exponent = exponent >> 1
    return p, q, r, s


@triton.jit
def _row_key(base, row):
    """Return a row's key, as `reference.row_keys`."""
    z = (base.to(tl.int64) ^ row).to(tl.uint64, bitcast=True)
    z += tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    z = (z ^ (z >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    z = (z ^ (z >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    return z ^ (z >> 31)


@triton.jit
def _store(state, at, mask, value, key_base, row, column, FORMAT: tl.constexpr):
    """Store float32 (FORMAT 0), or bfloat16, rounded to nearest (1) or as reference.py does (2)."""
    if FORMAT == 0:
        tl.store(state + at, value, mask=mask)
    else:
        bits = value.to(tl.uint32, bitcast=True)
        if FORMAT == 1:
            rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        else:
            key = _row_key(key_base, row)
            low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
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


@triton.jit(do_not_specialize=_CHANGING)
def _sgd_kernel(
    weight, gradient, ids, buffer, last_step, columns, s_weight, s_gradient, s_buffer,
    until, key0, key1, lr, momentum, decay, take,
    a0, a1, a2, b0, b1, b2, c0, c1, c2, d0, d1, d2,
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
        missed = until.to(tl.int64) - tl.load(last_step + row).to(tl.int64)
        w_w, w_b, b_w, b_b = _matrix_power(
            _float64(a0, a1, a2), _float64(b0, b1, b2), _float64(c0, c1, c2), _float64(d0, d1, d2),
            missed,
        )  # fmt: skip
        old = w
        w = w_w.to(tl.float32) * old + w_b.to(tl.float32) * b
        b = b_w.to(tl.float32) * old + b_b.to(tl.float32) * b
    if GRADIENT:
        g = _load(gradient, i * s_gradient + column, mask) + decay * w
        if MOMENTUM:
            b = momentum * b + take * g
            w = w - lr * (g + momentum * b if NESTEROV else b)
        else:
            w = w - lr * g
    _store(weight, at_w, mask, w, key0, row, column, W_FORMAT)
    if MOMENTUM:
        _store(buffer, at_b, mask, b, key1, row, column, B_FORMAT)


@triton.jit(do_not_specialize=[*_CHANGING, "key2", "terms"])
def _adamw_kernel(
    weight, gradient, ids, mean, square, last_step, columns,
    s_weight, s_gradient, s_mean, s_square, until, key0, key1, key2, terms,
    keep, beta1, take1, beta2, take2, size, root, eps,
    lr0, lr1, lr2, keep0, keep1, keep2, first0, first1, first2, second0, second1, second2,
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
        last = tl.load(last_step + row).to(tl.int64)
        missed = until.to(tl.int64) - last
        if missed > 0:
            rate, b1, b2 = (
                _float64(lr0, lr1, lr2),
                _float64(first0, first1, first2),
                _float64(second0, second1, second2),
            )
            kept = _float64(keep0, keep1, keep2)  # 1 − lr·weight_decay
            grow = 1.0 / kept
            # Powers of the terms are running products.
            power1, power2 = _power(b1, last), _power(b2, last)
            later = _power(kept, missed)
            moment1, moment2 = tl.full((), 1.0, tl.float64), tl.full((), 1.0, tl.float64)
            total, start = tl.zeros_like(w), tl.sqrt_rn(v)
            decayed = later
            left = tl.minimum(missed, terms.to(tl.int64))
            while left > 0:  # not range(), which no tensor bounds in Triton 3.6's interpreter
                power1 *= b1
                power2 *= b2
                moment1 *= b1
                moment2 *= b2
                decayed *= grow
                step_size = rate * moment1 / (1.0 - power1) * decayed
                factor = tl.sqrt(moment2 / (1.0 - power2))
                denominator = start * factor.to(tl.float32) + eps
                total += tl.div_rn(tl.zeros_like(w) + step_size.to(tl.float32), denominator)
                left -= 1
            total = tl.where(m == 0, 0.0, total)
            w = later.to(tl.float32) * w - m * total
            m = m * _power(b1, missed).to(tl.float32)
            v = v * _power(b2, missed).to(tl.float32)
    if GRADIENT:
        g = _load(gradient, i * s_gradient + column, mask)
        m = beta1 * m + take1 * g
        v = beta2 * v + take2 * g * g
        w = keep * w - size * tl.div_rn(m, tl.sqrt_rn(v) * root + eps)
    _store(weight, at_w, mask, w, key0, row, column, W_FORMAT)
    _store(mean, at_m, mask, m, key1, row, column, M_FORMAT)
    _store(square, at_v, mask, v, key2, row, column, V_FORMAT)


def _format(state: Tensor, seed: int | None) -> int:
    return 0 if state.dtype == torch.float32 else 1 if seed is None else 2


def _keys(update: Update, streams: int) -> list[int]:
    """Return the numbers that the rows' keys are derived from, one for each state."""
    if update.seed is None:
        return [0] * streams
    return [key_base(update.seed, update.step, stream) for stream in range(streams)]


def _parts(value: float) -> tuple[float, float, float]:
    """Split a number into three of float32 whose sum it is: Triton passes floats as float32."""
    high = ctypes.c_float(value).value
    middle = ctypes.c_float(value - high).value
    return high, middle, value - high - middle


def _launch(kernel: Any, update: Update, *args: Any, **config: Any) -> None:
    count, columns = update.class_ids.numel(), update.weight.shape[1]
    if count and columns:
        # Fused multiply-adds would give other bits than the definition.
        launch(
            kernel, (count, triton.cdiv(columns, BLOCK)), *args, **config, BLOCK=BLOCK,
            enable_fp_fusion=False,
        )  # fmt: skip
    if update.last_step is not None:
        update.last_step.index_fill_(0, update.class_ids, update.step)


def _contiguous(update: Update) -> tuple[Update, Tensor, Tensor]:
    """Return the update with contiguous ids; a gradient of contiguous rows; the last steps.

    Where there are none, placeholders take the place of the last two.
    """
    gradient = update.weight if update.row_grad is None else update.row_grad
    if gradient.stride(1) != 1:
        gradient = gradient.contiguous()
    ids = update.class_ids.contiguous()
    last = ids if update.last_step is None else update.last_step
    return update._replace(class_ids=ids), gradient, last


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
    update, gradient, last = _contiguous(update)
    weight, row_grad, ids, last_step, _, seed = update
    buffer = weight if momentum_buffer is None else momentum_buffer
    into = (1 - dampening) * weight_decay
    fast = lr * (weight_decay + momentum * into) if nesterov else lr * into
    coast = lr * momentum * (momentum if nesterov else 1)
    if momentum_buffer is None:
        fast, into, coast = lr * weight_decay, 0.0, 0.0
    idle = (1 - fast, -coast, into, momentum)  # a step without gradient, as a 2 × 2 matrix
    _launch(
        _sgd_kernel, update,
        weight, gradient, ids, buffer, last, weight.shape[1],
        weight.stride(0), gradient.stride(0), buffer.stride(0),
        update.until, *_keys(update, 2), lr, momentum, weight_decay, 1 - dampening,
        *(part for number in idle for part in _parts(number)),
        GRADIENT=row_grad is not None, MOMENTUM=momentum_buffer is not None, NESTEROV=nesterov,
        LAZY=last_step is not None, W_FORMAT=_format(weight, seed), B_FORMAT=_format(buffer, seed),
    )  # fmt: skip


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
    update, gradient, last = _contiguous(update)
    weight, row_grad, ids, last_step, step, seed = update
    keep = 1 - lr * weight_decay
    terms = 0
    if last_step is not None:
        if keep <= 0:
            raise NotImplementedError(
                f"last_step with impl='triton' needs lr·weight_decay < 1, got {lr * weight_decay}"
            )
        terms = series_terms(lr, beta1, beta2, weight_decay, NEGLIGIBLE[0])
    size, root = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    _launch(
        _adamw_kernel, update,
        weight, gradient, ids, exp_avg, exp_avg_sq, last, weight.shape[1], weight.stride(0),
        gradient.stride(0), exp_avg.stride(0), exp_avg_sq.stride(0), update.until,
        *_keys(update, 3), terms,
        keep, beta1, 1 - beta1, beta2, 1 - beta2, size, root, eps,
        *(part for number in (lr, keep, beta1, beta2) for part in _parts(number)),
        GRADIENT=row_grad is not None, LAZY=last_step is not None,
        W_FORMAT=_format(weight, seed), M_FORMAT=_format(exp_avg, seed),
        V_FORMAT=_format(exp_avg_sq, seed),
    )  # fmt: skip
