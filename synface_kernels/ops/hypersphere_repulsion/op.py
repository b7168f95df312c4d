"""Hypersphere repulsion: checks, the two ops that never hold N×N, and the public functions.

- *pairs*: a sum over all pairs, with its gradient in the same pass.
- *nearest*: each point's nearest neighbors; its backward pass runs on N·k pairs.

The energies are torch code on the results of these two, under ordinary autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..._check import describe, integer, is_dense
from ..._derivatives import (
    final,
    once,
    transforms_active,
    under_vmap,
)
from ..._derivatives import register as register_autograd
from ..._distributed import Gather, Replicated, check_group, gathered, validate_on_all_ranks
from ..._load import library
from ..._norms import length_unit
from ..._precision import may_split_bf16
from ..._select import always, needs_cpu_extension, needs_triton, register, resolve
from . import reference, sharded
from .energies import (
    NEIGHBOR_ENERGIES,
    PAIR_ENERGIES,
    R_MIN,
    Energy,
    LogSumExp,
    NeighborEnergy,
    PairEnergy,
    Potential,
)
from .reference import Neighbors

OP = "hypersphere_repulsion"
_DEFAULT = LogSumExp()
# A row whose norm is at most this is refused as zero.
NORM_MIN = 1e-12
register(
    OP,
    {"cpu": needs_cpu_extension, "triton": needs_triton, "reference": always},
    functions=("nearest_neighbors",),
)

library.define(f"{OP}_check(Tensor rows, str name) -> ()")
_SCHEMAS = {
    "pairs": "(Tensor x, Tensor? y, str kind, float a, int power, float r_min, bool needs_x_grad, "
    "bool needs_y_grad{impl}, bool split_bf16=False) -> "
    "(Tensor value, Tensor grad_x, Tensor grad_y)",
    "nearest": "(Tensor x, Tensor? y, int k{impl}) -> (Tensor square, Tensor index)",
    "nearest_backward": "(Tensor x, Tensor? y, Tensor index, Tensor grad_square, float r_min, "
    "bool needs_x_grad, bool needs_y_grad{impl}) -> (Tensor grad_x, Tensor grad_y)",
}
for _name, _schema in _SCHEMAS.items():
    library.define(f"{OP}_{_name}" + _schema.format(impl=", str impl"))
    # the CPU implementations are in csrc/
    library.define(f"{OP}_{_name}_cpu" + _schema.format(impl=""))


def hypersphere_repulsion(
    x: Tensor,
    y: Tensor | None = None,
    *,
    energy: Energy = _DEFAULT,
    reduction: Literal["none", "mean", "sum"] = "mean",
    group: Any = None,
    impl: str = "auto",
) -> Tensor:
    """Compute the energy of points on the unit sphere that repel each other or a gallery repels.

    Args:
        x: (N, D) points: float32, bfloat16 or float16 (computed in float32), or float64. They need
            not be normalized or contiguous. N ≥ 2, or N ≥ 1 with y.
        y: (M, D) gallery, likewise, M ≥ 1; both float64 or neither. Then the pairs are (x_i, y_j),
            and points of x do not repel each other.
        energy: `MaxCosine`, `ClosestPair`, `KoLeo` (of nearest neighbors), `LogSumExp`,
            `Gaussian`, `Riesz`, `Log` or `Hinge` (of all pairs). Their docstrings state formulas.
        reduction: ``"mean"`` or ``"sum"``, see the energy; ``"none"``, per point, for `MaxCosine`
            and `KoLeo`.
        group: a `torch.distributed` process group over whose ranks the points are sharded, in rank
            order; a rank may hold none. All ranks return the energy of all points, and its gradient
            by their own points (``"none"``: the energies of their own points, and the gradient of
            the sum of all ranks' losses). y must be the same on all ranks, which is checked, and
            every rank gets its whole gradient. With energies of nearest neighbors, or y, the
            backward pass communicates too: all ranks must run it, or none. See
            docs/kernels/hypersphere_repulsion.md for the communication. If one rank's argument is
            wrong, all raise its error. Not with ``impl="reference"``, nor inside `torch.compile`.
        impl: ``"auto"``, ``"cpu"``, ``"triton"`` or ``"reference"``; see `explain`.

    Returns:
        The energy, float32 (float64 for float64 inputs): a scalar, or (N,) for ``"none"``.

    Gradients of x and y have their dtypes; each row's gradient is orthogonal to the row. Identical
    points still repel each other, see `energies`. Energies of all pairs of bfloat16 points round
    the weights of the gradient's sums to bfloat16, each by 2⁻⁸ of itself at most, where GEMMs of
    bfloat16 are faster (on GPUs, and CPUs with AMX or AMD's AVX512_BF16); their values are as exact
    as in float32. Under ``torch.set_float32_matmul_precision("high")`` or ``"medium"`` a CPU with
    AMX multiplies float32 as sums of two bfloat16. Differentiable once, in reverse mode: by
    autograd, or by `torch.func`'s grad, vjp and vmap (a loop; not with ``impl="reference"``),
    without a group. Second derivatives and forward mode raise.

    Memory above inputs and gradients: O(N·k) and a workspace of at most 64 MiB; energies of all
    pairs also hold their gradient, float32 (N, D), from forward to backward; with a group, another
    rank's points and their gradient as well. Never N×N, except in ``impl="reference"``. CPU
    gradients come from a caching allocator: see `empty_cache`.

    Raises:
        ValueError: for a wrong dtype, shape, device or value; for a zero or non-finite row (on a
            GPU by an asynchronous assertion).
        TypeError: for an argument of a wrong Python type.
        RuntimeError: for an ``impl`` that cannot run here, naming the reason; where the gradient is
            differentiated.
        NotImplementedError: for forward-mode derivatives.

    Source: see each energy.
    """

    def check() -> None:
        if not isinstance(energy, (*NEIGHBOR_ENERGIES, *PAIR_ENERGIES)):
            raise TypeError(f"energy must be an energy such as LogSumExp(), got {describe(energy)}")
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
        if reduction == "none" and not energy.per_point:
            raise ValueError(
                f"reduction must be 'mean' or 'sum' for {type(energy).__name__}, which is one "
                "number for all points, got 'none'"
            )

    call = _prepare(x, y, group, impl, check, energy=energy, reduction=reduction)
    x, y = _differentiated_once(x, y, call)
    if isinstance(energy, PairEnergy):
        result = _pair_energy(x, y, energy, reduction, call)
    else:
        assert isinstance(energy, NeighborEnergy)
        result = _neighbor_energy(x, y, energy, reduction, call)
    return result.to(_statistics_dtype(x))


def nearest_neighbors(
    x: Tensor, y: Tensor | None = None, k: int = 1, *, group: Any = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Find the k rows of y with the greatest cosines to each row of x; of x itself if y is None.

    Exact: by the cosines in double precision, rounded to the result's dtype. Among equal cosines
    the lowest index comes first. Without y a row is not its own neighbor.

    Args:
        x: (N, D) float32, bfloat16, float16 or float64; rows need not be normalized.
        y: (M, D) likewise; both float64 or neither.
        k: number of neighbors, 1 ≤ k < N, or k ≤ M with y.
        group: as in `hypersphere_repulsion`. Each rank gets the neighbors of its own rows; their
            indices count the rows of all ranks.
        impl: as in `hypersphere_repulsion`.

    Returns:
        cosine (N, k), greatest first, float32 or, for float64 inputs, float64; and index (N, k),
        int64. The cosines are differentiable, by x and y; the choice of neighbors is piecewise
        constant and passes no gradient.

    Memory above the inputs: O(N·k) and a workspace of at most 64 MiB; never N×M, except in
    ``impl="reference"``.

    Raises:
        ValueError, TypeError, RuntimeError: as `hypersphere_repulsion`; for a k out of range.

    Source: the definition; the search in blocks: docs/kernels/hypersphere_repulsion.md.
    """

    def check() -> None:
        nonlocal k
        k = integer("k", k, -(2**63))  # _check_k checks the range

    call = _prepare(x, y, group, impl, check, k=k)
    _check_k(call, y, k, "k")
    x, y = _differentiated_once(x, y, call)
    found = _nearest(x, y, k, call)
    return (1 - found.square / 2).to(_statistics_dtype(x)), found.indices


# ---- energies from the two ops -------------------------------------------------------------------


class Call(NamedTuple):
    """A call whose arguments are checked: its implementation, and how x is sharded.

    Attributes:
        impl: the implementation.
        counts: each rank's number of rows of x; without a group, one number.
        group: the process group, or None.
    """

    impl: str
    counts: list[int]
    group: Any


def _pair_energy(
    x: Tensor, y: Tensor | None, energy: PairEnergy, reduction: str, call: Call
) -> Tensor:
    n = sum(call.counts)
    num_pairs = n * (n - 1) // 2 if y is None else n * y.shape[0]
    pair_sum = _pairs_on_all_ranks(x, y, energy.potential, call)
    return energy.total(pair_sum, num_pairs, reduction == "mean")


def _pairs_on_all_ranks(x: Tensor, y: Tensor | None, potential: Potential, call: Call) -> Tensor:
    group = call.group
    if group is None:
        return _pairs(x, y, potential, call.impl)
    if y is None:
        return sharded.PairSum.apply(x, call.counts, potential, group, call.impl)
    gallery = Replicated.apply(y, group)
    if x.shape[0] > 0:
        start = sum(call.counts[: torch.distributed.get_rank(group)])
        points = sharded.turned(x, start, False)
        value = _pairs(points, sharded.turned(gallery, start, False), potential, call.impl)
    else:  # no pairs; the sum still connects y's gradient, zero, to the all-reduce
        value = (x.sum() + gallery[:0].sum()).double()
        value = value - (torch.inf if potential.is_exponential else 0)
    values = Gather.apply(value, group)
    return values.logsumexp(0) if potential.is_exponential else values.sum()


def _neighbor_energy(
    x: Tensor, y: Tensor | None, energy: NeighborEnergy, reduction: str, call: Call
) -> Tensor:
    def stacked(value: Tensor) -> Tensor:
        return value[None] if call.group is None else Gather.apply(value, call.group)

    _check_k(call, y, energy.neighbors, "energy's topk")
    each = energy.of_points(_nearest(x, y, energy.neighbors, call).square)
    if reduction == "none":
        return each
    return energy.total(each, stacked, sum(call.counts), reduction == "mean")


def _pairs(x: Tensor, y: Tensor | None, potential: Potential, impl: str) -> Tensor:
    """Return Σ f over the pairs, or log Σ exp for an exponential potential."""
    if impl == "reference":
        x, y = _checked(x, y, _statistics_dtype(x))
        return reference.pair_energy(x, y, *potential)
    # Inside torch.func's transforms, requires_grad does not show what an outer one differentiates.
    recorded, transformed = torch.is_grad_enabled(), transforms_active()
    needs_x_grad = transformed or (recorded and x.requires_grad)
    needs_y_grad = y is not None and (transformed or (recorded and y.requires_grad))
    value, *_ = _pairs_op(x, y, *potential, needs_x_grad, needs_y_grad, impl, may_split_bf16())
    return value


def _nearest(x: Tensor, y: Tensor | None, k: int, call: Call) -> Neighbors:
    if call.group is not None:
        y = None if y is None else Replicated.apply(y, call.group)
        found = sharded.Nearest.apply(x, y, call.counts, k, call.group, call.impl)
    elif call.impl == "reference":
        found = reference.nearest(*_checked(x, y, torch.float64), k, _statistics_dtype(x))
    else:
        found = _nearest_op(x, y, k, call.impl)
    return Neighbors(*found)


def _differentiated_once(x: Tensor, y: Tensor | None, call: Call) -> tuple[Tensor, Tensor | None]:
    """Return x and y such that second derivatives raise where the ops alone do not."""
    if call.impl != "reference" and call.group is None:
        return x, y
    return once(OP, x), None if y is None else once(OP, y)


def _checked(x: Tensor, y: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    _check_values(x, y)
    return x.to(dtype), None if y is None else y.to(dtype)


# ---- checks --------------------------------------------------------------------------------------


def _statistics_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of energies, cosines and accumulated gradients."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _prepare(
    x: Tensor,
    y: Tensor | None,
    group: Any,
    impl: str,
    check: Callable[[], None],
    **options: Any,
) -> Call:
    """Check all arguments, on all ranks at once.

    Args:
        check: checks the options; they must be the same on all ranks.
    """

    def prepare() -> str:
        _check(x, y, group is not None)
        check()
        return resolve(OP, impl, (x,) if y is None else (x, y))

    if group is None:
        chosen = prepare()
        if chosen == "reference" and under_vmap():
            raise NotImplementedError(
                "impl='reference' reads values and does not work under torch.vmap: take impl='cpu' "
                "or 'triton', or a loop"
            )
        return Call(chosen, [x.shape[0]], None)
    if transforms_active():
        raise NotImplementedError(
            "group does not work under the transforms of torch.func: call torch.autograd.grad or "
            "loss.backward() outside of them"
        )
    check_group(group)
    chosen, checksum = "", None

    def prepare_shard() -> tuple[list[int], dict[str, Any]]:
        nonlocal chosen, checksum
        chosen = prepare()
        if chosen == "reference":
            raise ValueError("impl must be 'cpu' or 'triton' with a group, got 'reference'")
        _check_values(x, y)
        bits = None
        if y is not None:
            checksum = sharded.checksum(y)
            bits = checksum.item() if y.device.type == "cpu" else None  # a GPU compares below
        recorded = torch.is_grad_enabled()
        must_match = {
            "D": x.shape[1],
            "dtype of x": x.dtype,
            **options,
            "requires_grad of x": recorded and x.requires_grad,
            "y": None if y is None else (tuple(y.shape), y.dtype, bits),
            "requires_grad of y": recorded and y is not None and y.requires_grad,
        }
        return [x.shape[0]], must_match

    counts = [rows for (rows,) in validate_on_all_ranks(prepare_shard, 1, group)]
    least = 2 if y is None else 1
    if sum(counts) < least:
        raise ValueError(
            f"x must have at least {least} rows, on all ranks together, got {sum(counts)}"
        )
    if checksum is not None and checksum.device.type != "cpu":
        checksums = gathered(checksum, group)
        torch._assert_async((checksums == checksums[0]).all(), "y must be the same on all ranks")
    return Call(chosen, counts, group)


def _check(x: Tensor, y: Tensor | None, sharded: bool = False) -> None:
    for name, tensor, shape in (("x", x, "(N, D)"), ("y", y, "(M, D)")):
        if tensor is None and name == "y":
            continue
        if not is_dense(tensor):
            raise TypeError(f"{name} must be a tensor, got {describe(tensor)}")
        allowed = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
        if tensor.dtype not in allowed or tensor.dim() != 2 or tensor.shape[1] < 1:
            raise ValueError(
                f"{name} must be float32, bfloat16, float16 or float64 of shape {shape}, D ≥ 1, "
                f"got {describe(tensor)}"
            )
    if y is None:
        if x.shape[0] < 2 and not sharded:
            raise ValueError(f"x must have at least two rows without y, got {describe(x)}")
        return
    if (x.shape[0] < 1 and not sharded) or y.shape[0] < 1:
        raise ValueError(
            f"x and y must have at least one row each, got {describe(x)} and {describe(y)}"
        )
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"x (N, D) and y (M, D) must have the same D, got {describe(x)} and {describe(y)}"
        )
    if (x.dtype == torch.float64) != (y.dtype == torch.float64):
        raise ValueError(
            f"x and y must both be float64 or neither, got {describe(x)} and {describe(y)}"
        )
    if x.device != y.device:
        raise ValueError(f"y must be on x's device {x.device}, got {describe(y)}")


def _check_values(x: Tensor, y: Tensor | None) -> None:
    for name, rows in (("x", x), ("y", y)):
        if rows is not None:
            torch.ops.synface_kernels.hypersphere_repulsion_check(rows.detach(), name)


def _check_k(call: Call, y: Tensor | None, k: int, name: str) -> None:
    most = sum(call.counts) - 1 if y is None else y.shape[0]
    if not 1 <= k <= most:
        bound = "the number of other rows of x" if y is None else "the number of rows of y"
        raise ValueError(f"{name} must be at least 1 and at most {most}, {bound}, got {k}")


@torch.library.impl(library, f"{OP}_check", "CompositeExplicitAutograd")
def _check_rows(rows: Tensor, name: str) -> None:
    _norms(rows, name)


def _norms(rows: Tensor, name: str) -> Tensor:
    """Return norms (N,) in double; raise if one is zero or not finite.

    On a GPU an asynchronous assertion fails instead.
    """
    unit = torch.ones((), dtype=torch.float64, device=rows.device)
    if rows.dtype == torch.float64:  # squares of other dtypes do not overflow double
        unit = length_unit(rows).squeeze(1)
        rows = rows / unit[:, None]
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    valid = (norms > NORM_MIN) & norms.isfinite()
    norms = norms * unit
    message = f"{name} must have finite, non-zero rows (norms above {NORM_MIN:g})"
    if rows.device.type != "cpu":
        torch._assert_async(valid.all(), message)
    elif not bool(valid.all()):
        row = int((~valid).nonzero()[0])
        raise ValueError(f"{message}, got a norm of {norms[row].item():g} in row {row}")
    return norms


@torch.library.register_fake(f"synface_kernels::{OP}_check")
def _check_rows_fake(rows: Tensor, name: str) -> None:
    return None


# ---- the two ops: one implementation per device, fake, autograd ----------------------------------


def _run(name: str, x: Tensor, y: Tensor | None, *args: Any) -> Any:
    """Run an op on an implementation, with the arguments that its schema lists after x and y."""
    *rest, impl = args
    if impl == "triton":
        from . import launch_triton

        points = launch_triton.Points(x, _norms(x, "x"))
        gallery = None if y is None else launch_triton.Points(y, _norms(y, "y"))
        return getattr(launch_triton, name)(points, gallery, *rest)
    return getattr(torch.ops.synface_kernels, f"{OP}_{name}_cpu")(x, y, *rest)


def _run_pairs(x: Tensor, y: Tensor | None, *args: Any) -> Any:
    """Run `pairs`; the dispatcher leaves out split_bf16, the last argument, where it is False."""
    *options, impl, split_bf16 = args if isinstance(args[-1], bool) else (*args, False)
    if impl == "triton":  # splits no bf16
        return _run("pairs", x, y, *options, impl)
    return torch.ops.synface_kernels.hypersphere_repulsion_pairs_cpu(x, y, *options, split_bf16)


for _name in _SCHEMAS:
    for _key in ("CPU", "CUDA"):
        _implementation = _run_pairs if _name == "pairs" else partial(_run, _name)
        library.impl(f"{OP}_{_name}", _implementation, _key)


def _gradient_like(rows: Tensor | None, wanted: bool, x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(rows.shape if wanted and rows is not None else (0,), dtype=dtype)


@torch.library.register_fake(f"synface_kernels::{OP}_pairs")
def _pairs_fake(
    x: Tensor, y: Tensor | None, kind: str, a: float, power: int, r_min: float,
    needs_x_grad: bool, needs_y_grad: bool, impl: str, split_bf16: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dtype = _statistics_dtype(x)
    return (
        x.new_empty((), dtype=torch.float64),
        _gradient_like(x, needs_x_grad, x, dtype),
        _gradient_like(y, needs_y_grad, x, dtype),
    )


@torch.library.register_fake(f"synface_kernels::{OP}_nearest")
def _nearest_fake(x: Tensor, y: Tensor | None, k: int, impl: str) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=torch.float64), x.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake(f"synface_kernels::{OP}_nearest_backward")
def _nearest_backward_fake(
    x: Tensor, y: Tensor | None, index: Tensor, grad_square: Tensor, r_min: float,
    needs_x_grad: bool, needs_y_grad: bool, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return (
        _gradient_like(x, needs_x_grad, x, x.dtype),
        _gradient_like(y, needs_y_grad, x, x.dtype if y is None else y.dtype),
    )


def _pairs_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, *_ = inputs
    _, grad_x, grad_y = output
    ctx.dtypes = (x.dtype, None if y is None else y.dtype)
    ctx.mark_non_differentiable(grad_x, grad_y)
    ctx.set_materialize_grads(False)  # avoids zeros of the gradients' size
    ctx.save_for_backward(x, y, grad_x, grad_y)


def _pairs_backward(ctx: Any, grad_value: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_value is None:
        return (None,) * len(ctx.needs_input_grad)
    x, y, *saved = ctx.saved_tensors
    needs_x_grad, needs_y_grad, *others = ctx.needs_input_grad
    grads: Iterable[Tensor | None] = [
        (grad * grad_value.to(grad.dtype)).to(dtype) if needed else None
        for grad, dtype, needed in zip(saved, ctx.dtypes, (needs_x_grad, needs_y_grad), strict=True)
    ]
    if torch.is_grad_enabled():
        grads = final(OP, grads, (x, y))
    return (*grads, *[None] * len(others))


_pairs_op = register_autograd(f"{OP}_pairs", OP, _pairs_backward, _pairs_context)


def _nearest_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, _, ctx.impl = inputs
    _, index = output
    ctx.mark_non_differentiable(index)
    ctx.save_for_backward(x, y, index)


def _nearest_backward(ctx: Any, grad_square: Tensor, _: Any) -> tuple[Any, ...]:
    x, y, index = ctx.saved_tensors
    needs_x_grad, needs_y_grad, *others = ctx.needs_input_grad
    grad_x, grad_y = _nearest_backward_op(
        x, y, index, grad_square, R_MIN, needs_x_grad, needs_y_grad, ctx.impl
    )
    return (
        grad_x if needs_x_grad else None,
        grad_y if needs_y_grad else None,
        *[None] * len(others),
    )


_nearest_op = register_autograd(f"{OP}_nearest", OP, _nearest_backward, _nearest_context)
_nearest_backward_op = register_autograd(f"{OP}_nearest_backward", OP)
