"""Optimizer steps on some rows of a matrix, in place: checks, registrations, public functions."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..._check import capturing, describe, is_dense, require, require_apart
from ..._derivatives import under_vmap
from ..._load import library
from ..._select import always, needs_cpu_extension, needs_triton, register, resolve
from . import reference
from .reference import Update
from .updates import NUMBERS, AdamWUpdate, RowUpdate, SGDUpdate, most_missed

OP = "row_update"
register(
    OP,
    {"cpu": needs_cpu_extension, "triton": needs_triton, "reference": always},
    functions=("row_sgd_", "row_adamw_"),
)

_SCHEMAS = {
    "sgd": "(Tensor(a!) weight, Tensor? row_grad, Tensor class_ids, Tensor(b!)? momentum_buffer, "
    "Tensor(c!)? last_step, float lr, float momentum, float weight_decay, float dampening, "
    "bool nesterov, SymInt step, int? seed{impl}) -> ()",
    "adamw": "(Tensor(a!) weight, Tensor? row_grad, Tensor class_ids, Tensor(b!) exp_avg, "
    "Tensor(c!) exp_avg_sq, Tensor(d!)? last_step, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, SymInt step, int? seed{impl}) -> ()",
}
for _name, _schema in _SCHEMAS.items():
    library.define(f"{OP}_{_name}" + _schema.format(impl=", str impl"))
    # the CPU implementations are in csrc/
    library.define(f"{OP}_{_name}_cpu" + _schema.replace("SymInt", "int").format(impl=""))


def row_sgd_(
    weight: Tensor,
    row_grad: Tensor | None,
    class_ids: Tensor,
    *,
    lr: float,
    momentum_buffer: Tensor | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    step: int | None = None,
    last_step: Tensor | None = None,
    seed: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Take a step of SGD on some rows of a matrix, in place; the other rows are not read.

    With g = row_grad + weight_decay·w, as `torch.optim.SGD`: b ← momentum·b + (1 − dampening)·g,
    w ← w − lr·b; with ``nesterov`` w ← w − lr·(g + momentum·b); without momentum w ← w − lr·g.

    Without ``last_step``, the weight and momentum of rows not in ``class_ids`` are unchanged, as
    with `torch.optim.SparseAdam`: they get neither weight decay nor momentum steps.

    With ``last_step``, a row in ``class_ids`` first takes the steps that it missed: those that
    `torch.optim.SGD` would take with a gradient of zero. They are linear in (w, b), so all of them
    are one power of a 2 × 2 matrix: exact up to rounding. The missed steps use the arguments of
    this call: where ``lr`` changes, bring all rows up to date first (``row_grad=None``), or accept
    that the missed steps use the new rate.

    Args:
        weight: (C, D), its rows contiguous: float32, bfloat16 (arithmetic in float32), or float64.
        row_grad: (S, D) gradients of the rows: float32, bfloat16, float16, or float64 for a float64
            weight. None: the rows only take the steps that they missed, up to and including
            ``step``.
        class_ids: (S,) int64 row indices of the weight, strictly increasing.
        lr, weight_decay, dampening: ≥ 0, finite.
        momentum: ≥ 0. momentum_buffer: (C, D) float32 or bfloat16 (float64 for float64), initially
            zero; required if and only if momentum > 0. (torch's first step adds all of g to the
            buffer whatever the dampening; this one 1 − dampening of it.)
        nesterov: needs momentum and no dampening.
        step: the number of this step, ≥ 1, increasing from call to call; required with
            ``last_step`` or ``seed``.
        last_step: (C,) int64 or int32: the last step that each row has taken; initially zero.
            Written.
        seed: enables stochastic rounding, which is unbiased, of weights and states in bfloat16. The
            random bits are a hash of (seed, step, state, row, column), the same for any number of
            threads and any device. In [0, 2^63). Default: round to nearest, which loses updates
            below 2^-9 of a weight.
        impl: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"`` (plain torch: ``index_select``
            and ``index_copy_``, and missed steps one by one); see `explain`.

    Returns:
        ``weight``. Takes no part in autograd.

    Memory above the inputs: a few numbers per element of ``class_ids``, and on the CPU a few rows
    per thread; with ``"reference"`` a few times (S, D).

    Raises:
        ValueError: for a wrong dtype, shape, device or value, before anything is written. On a GPU
            ``class_ids`` and ``last_step`` are checked by an asynchronous assertion. Also where a
            tensor that is written overlaps itself or another argument in memory.
        TypeError: for an argument of a wrong Python type.
        RuntimeError: for an ``impl`` that cannot run here, naming the reason.
        NotImplementedError: under `torch.vmap`.

    Source: Sutskever et al., ICML 2013; the missed steps: docs/kernels/row_update.md.
    """
    update = SGDUpdate(
        lr=lr,
        momentum_buffer=momentum_buffer,
        momentum=momentum,
        weight_decay=weight_decay,
        dampening=dampening,
        nesterov=nesterov,
        step=step,
        last_step=last_step,
        seed=seed,
    )
    return take_step(update, weight, row_grad, class_ids, impl)


def row_adamw_(
    weight: Tensor,
    row_grad: Tensor | None,
    class_ids: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    last_step: Tensor | None = None,
    seed: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """Take a step of AdamW on some rows of a matrix, in place; the other rows are not read.

    As `torch.optim.AdamW`, with t = ``step``: m ← β₁·m + (1 − β₁)·g, v ← β₂·v + (1 − β₂)·g²,
    w ← (1 − lr·weight_decay)·w − lr·m/(1 − β₁^t) / (√(v/(1 − β₂^t)) + eps).

    Without ``last_step``, the weight and moments of rows not in ``class_ids`` are unchanged, as
    with `torch.optim.SparseAdam`; bias is corrected by the number of steps, not by how often a row
    was updated.

    With ``last_step``, a row in ``class_ids`` first takes the steps that it missed: those that
    `torch.optim.AdamW` would take with a gradient of zero. The decay of weight and moments has a
    closed form. The updates of the weight by the decaying moments have none, because of eps in the
    denominator: these terms are added one by one, until the rest of their geometric series is
    below 2^-26 (float64: 2^-55) of the first, some 200 at the default betas; all of them where the
    series does not converge, β₁ ≥ √β₂·(1 − lr·weight_decay). Where more than 2^17 terms may be
    needed, a row may miss 2^17 steps at most. The missed steps use the arguments of this call, see
    `row_sgd_`.

    Args:
        weight, row_grad, class_ids: see `row_sgd_`.
        exp_avg, exp_avg_sq: (C, D) moments, float32 or bfloat16 (float64 for a float64 weight),
            initially zero. In bfloat16 without ``seed``, exp_avg_sq cannot decay: rounding to
            nearest undoes each step by 1 − β₂ < 2^-9.
        step: the number of this step, ≥ 1, increasing from call to call.
        lr, eps, weight_decay: ≥ 0, finite. betas: in [0, 1).
        last_step, seed, impl: see `row_sgd_`.

    Returns:
        ``weight``. Takes no part in autograd.

    Memory above the inputs, and errors: see `row_sgd_`.

    Raises:
        ValueError, TypeError, RuntimeError, NotImplementedError: as `row_sgd_`.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019; the missed
    steps: docs/kernels/row_update.md.
    """
    update = AdamWUpdate(
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        step=step,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        last_step=last_step,
        seed=seed,
    )
    return take_step(update, weight, row_grad, class_ids, impl)


def take_step(
    update: RowUpdate, weight: Tensor, row_grad: Tensor | None, class_ids: Tensor, impl: str
) -> Tensor:
    """Take the step that an update describes: `row_sgd_` or `row_adamw_`."""
    if under_vmap():
        raise NotImplementedError(
            f"row_{update.rule}_ writes in place, which torch.vmap does not support for it: loop "
            "over the matrices"
        )
    _check(update, weight, row_grad, class_ids)
    op = getattr(torch.ops.synface_kernels, f"{OP}_{update.rule}")
    with torch.no_grad():
        op(
            weight=weight,
            row_grad=row_grad,
            class_ids=class_ids,
            **update.states,
            last_step=update.last_step,
            **update.numbers._asdict(),
            step=update.step or 0,
            seed=update.seed,
            impl=resolve(OP, impl, (weight,)),
        )
    return weight


# ---- checks --------------------------------------------------------------------------------------


def check_states(update: RowUpdate, weight: Tensor) -> None:
    """Raise TypeError or ValueError unless an update fits a weight (C, D).

    Raises:
        RuntimeError: while a CUDA graph is captured, for an update that depends on the step's
            number: each replay would take the same step.
    """
    states = {"weight": weight, **update.states}
    tensors = {**states, "last_step": update.last_step}
    for name, tensor in tensors.items():
        if tensor is not None and not is_dense(tensor):
            raise TypeError(f"{name} must be a tensor, got {describe(tensor)}")
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != weight.device:
            raise ValueError(
                f"{name} must be on weight's device {weight.device}, got {describe(tensor)}"
            )
    of_step = {"last_step": update.last_step, "seed": update.seed}
    names = [name for name, value in of_step.items() if value is not None]
    if capturing(weight) and (names or update.rule == "adamw"):
        raise RuntimeError(
            f"step must not change the result of a row update while a CUDA graph is captured, got "
            f"{' and '.join(names) or 'AdamW, whose bias correction it sets'}: each replay would "
            "take the captured step again; capture SGD without them, or leave the row update "
            "outside of the graph"
        )
    stored = _storage_dtypes(weight)
    for name, state in states.items():
        if state is None:
            continue
        if state.dim() != 2 or state.shape != weight.shape or state.dtype not in stored:
            expected = (
                "float64 like a float64 weight" if len(stored) == 1 and name != "weight"
                else "float32, bfloat16 or float64" if name == "weight"
                else "float32 or bfloat16"
            )  # fmt: skip
            shape = "(C, D)" if name == "weight" else f"{tuple(weight.shape)} like weight"
            raise ValueError(f"{name} must be {expected} of shape {shape}, got {describe(state)}")
        if state.shape[1] > 1 and state.stride(1) != 1:
            raise ValueError(
                f"{name} must have contiguous rows, got strides {tuple(state.stride())}"
            )
    last_step = update.last_step
    if last_step is not None and (
        last_step.dtype not in (torch.int64, torch.int32)
        or last_step.shape != weight.shape[:1]
        or not last_step.is_contiguous()
    ):
        raise ValueError(
            "last_step must be int64 or int32, contiguous, of shape (C,) with "
            f"C = {weight.shape[0]}, got {describe(last_step)}"
        )


def _storage_dtypes(weight: Tensor) -> tuple[torch.dtype, ...]:
    """Return the dtypes that weight and states may have."""
    if weight.dtype == torch.float64:
        return (torch.float64,)
    return (torch.float32, torch.bfloat16)


def _check(update: RowUpdate, weight: Tensor, row_grad: Tensor | None, class_ids: Tensor) -> None:
    if not is_dense(weight):
        raise TypeError(f"weight must be a tensor, got {describe(weight)}")
    check_states(update, weight)
    for name, tensor in (("class_ids", class_ids), ("row_grad", row_grad)):
        if tensor is None and name == "row_grad":
            continue
        if not is_dense(tensor):
            raise TypeError(f"{name} must be a tensor, got {describe(tensor)}")
        if tensor.device != weight.device:
            raise ValueError(
                f"{name} must be on weight's device {weight.device}, got {describe(tensor)}"
            )
    if class_ids.dtype != torch.int64 or class_ids.dim() != 1:
        raise ValueError(f"class_ids must be int64 of shape (S,), got {describe(class_ids)}")
    if row_grad is not None:
        double = weight.dtype == torch.float64
        allowed = _storage_dtypes(weight) + (() if double else (torch.float16,))
        needed = (class_ids.shape[0], weight.shape[1])
        if row_grad.shape != needed or row_grad.dtype not in allowed:
            kinds = "float64" if double else "float32, bfloat16 or float16"
            raise ValueError(
                f"row_grad must be {kinds} of shape (S, D) = {needed} as class_ids and "
                f"weight say, got {describe(row_grad)}"
            )
    elif update.last_step is None:
        raise ValueError("row_grad may be None only with last_step")


def _check_rows(update: Update, most: int | None) -> None:
    """Raise unless class_ids and last_step hold valid values; one pass over S elements."""
    weight, _, class_ids, last_step, step, _ = update
    if class_ids.numel() == 0:
        return
    rising = torch.ones_like(class_ids, dtype=torch.bool)
    torch.gt(class_ids[1:], class_ids[:-1], out=rising[1:])
    require(rising, "class_ids must rise strictly (be sorted, none repeated)", class_ids)
    # Increasing, so the first and the last are the extremes.
    ends = class_ids[:: max(class_ids.numel() - 1, 1)]
    inside = (ends >= 0) & (ends < weight.shape[0])
    require(inside, f"class_ids must be in [0, {weight.shape[0]})", ends)
    if last_step is not None:
        check_last_step(last_step.index_select(0, class_ids), update.until, step, most)


def check_last_step(last: Tensor, due: int, step: int, most: int | None) -> None:
    """Raise if a row's last step is after ``due``, or a row missed more than ``most`` steps."""
    message = f"last_step of the rows in class_ids must be in [0, {due}] at step {step}"
    require((last >= 0) & (last <= due), message, last)
    if most is not None:
        missed = due - last.long()
        message = (
            f"rows in class_ids must have missed at most {most} steps with betas whose series of "
            "missed steps falls slowly or not at all (β₁ near or above √β₂·(1 − lr·weight_decay)); "
            "catch up earlier, by row_grad=None with an earlier step"
        )
        require(missed <= most, message, missed)


# ---- the ops -------------------------------------------------------------------------------------


def _run(rule: str, *args: Any) -> None:
    """Check the rows of an op's arguments, and hand these to the implementation."""
    *given, impl = args
    named = dict(zip(_ARGUMENTS[rule], given, strict=True))
    written = {name: named[name] for name in _WRITTEN[rule]}
    require_apart(written, {name: named[name] for name in ("row_grad", "class_ids")})
    numbers = NUMBERS[rule](**{name: named[name] for name in NUMBERS[rule]._fields})
    update = Update(**{name: named.pop(name) for name in Update._fields})
    _check_rows(update, most_missed(rule, numbers, update.weight.dtype))
    if impl == "cpu":
        getattr(torch.ops.synface_kernels, f"{OP}_{rule}_cpu")(*given)
    elif impl == "triton":
        from . import kernel_triton

        getattr(kernel_triton, rule)(update, **named)
    else:
        getattr(reference, rule)(update, **named)


def mark_written(name: str, written: Iterable[Tensor | None], keys: Any, *args: Any) -> Any:
    """Run an op and bump the version counters of the tensors that it writes.

    So a graph that saved one of these tensors raises in its backward pass.
    """
    for tensor in written:
        if tensor is not None:
            torch.autograd.graph.increment_version(tensor)
    op = getattr(torch.ops.synface_kernels, name).default
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)


def _mark_written(rule: str, keys: Any, *args: Any) -> None:
    named = zip(_ARGUMENTS[rule], args, strict=False)  # without impl
    written = [tensor for name, tensor in named if name in _WRITTEN[rule]]
    mark_written(f"{OP}_{rule}", written, keys, *args)


# By rule, the names of the arguments before ``impl``, and of those that are written.
_ARGUMENTS: dict[str, list[str]] = {}
_WRITTEN: dict[str, list[str]] = {}
for _rule in _SCHEMAS:
    _name = f"{OP}_{_rule}"
    *_declared, _ = getattr(torch.ops.synface_kernels, _name).default._schema.arguments
    _ARGUMENTS[_rule] = [argument.name for argument in _declared]
    _WRITTEN[_rule] = [argument.name for argument in _declared if argument.is_write]
    for _key in ("CPU", "CUDA"):
        library.impl(_name, partial(_run, _rule), _key)
    library.impl(_name, partial(_mark_written, _rule), "ADInplaceOrView", with_keyset=True)
    torch.library.register_fake(f"synface_kernels::{_name}", lambda *args: None)
