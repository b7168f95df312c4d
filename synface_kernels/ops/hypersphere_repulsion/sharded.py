"""Energies of points that are sharded over the ranks of a process group.

Blocks of points are exchanged around a ring. In step s rank r receives the points of rank r + s,
and returns its results about them: their gradient, or their neighbors. By symmetry ⌊P/2⌋ steps
cover all pairs of P ranks. For an even P, both ranks of a pair take part in the last step: each
computes one half of their pairs, or the neighbors of its own points.

Every rank holds the whole gallery, so pairs with it need no ring.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..._distributed import Gather, connected
from ..._precision import may_split_bf16
from .energies import R_MIN, Potential
from .reference import Neighbors


def checksum(rows: Tensor) -> Tensor:
    """Return a sum of the rows' bits, which is the same on every machine."""
    return rows.detach().contiguous().view(torch.int16).sum(dtype=torch.int64)


def turned(rows: Tensor, shift: int, flip: bool, *, back: bool = False) -> Tensor:
    """Roll and flip the coordinates of rows so that a pair of blocks can use block-local indices.

    Identical points i and j are pushed along the axis (i + j) mod D, see `energies`, the one with
    the lower index in its direction. In the rolled coordinates the block-local indices, whose sum
    is less by ``shift``, give the same axis.

    Args:
        shift: the sum of the blocks' first indices.
        flip: whether the second block has the lower indices.
        back: undo it, for a gradient by the result.
    """
    rows = rows.roll(shift if back else -shift, 1)
    return -rows if flip else rows


class Nearest(torch.autograd.Function):
    """The k nearest neighbors of this rank's points among all ranks', or in a gallery."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, counts: list[int], k: int, group: Any, impl: str
    ) -> tuple[Tensor, Tensor]:
        """Return the `Neighbors`, whose indices count all ranks' points."""
        rank, starts = dist.get_rank(group), starts_of(counts)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        ctx.counts, ctx.group, ctx.impl = counts, group, impl
        x = x.detach().contiguous()

        def search(a: Tensor, b: Tensor | None, start: int) -> Neighbors:
            most = min(k, len(a) - 1 if b is None else len(b))
            if len(a) == 0 or most < 1:
                square = a.new_empty((len(a), max(most, 0)), dtype=torch.float64)
                return Neighbors(square, square.long())
            square, index = torch.ops.synface_kernels.hypersphere_repulsion_nearest(
                a, b, most, impl
            )
            return Neighbors(square, index + start)

        def best(*found: Neighbors) -> Neighbors:
            """Merge neighbors by rounded cosine, then by index, as a single process orders them."""
            square, index = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
            order = index.argsort(1)
            square, index = square.gather(1, order), index.gather(1, order)
            cosine = (1 - square / 2).to(dtype)
            order = cosine.argsort(stable=True, dim=1, descending=True)[:, :k]
            return Neighbors(square.gather(1, order), index.gather(1, order))

        if y is not None:
            found = search(x, y.detach(), 0)
        else:
            found = search(x, None, starts[rank])
            for ahead, behind, others in ring(x, counts, len(counts) // 2, group):
                found = best(found, search(x, others, starts[ahead]))
                if ahead != behind:
                    shape = len(x), min(k, counts[behind])
                    returned = (
                        exchange(field, field.new_empty(shape), ahead, behind, group)
                        for field in search(others, x, starts[rank])
                    )
                    found = best(found, Neighbors(*returned))
        ctx.mark_non_differentiable(found.indices)
        ctx.save_for_backward(x, y, found.indices)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_square: Tensor, _: Any) -> tuple[Any, ...]:
        x, y, index = ctx.saved_tensors
        counts, group = ctx.counts, ctx.group
        rank, starts = dist.get_rank(group), starts_of(counts)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        needs_x_grad, needs_y_grad, *_ = ctx.needs_input_grad

        def meet(b: Tensor | None, start: int, count: int) -> tuple[Tensor, Tensor]:
            """Compute the gradients by x and b of x's neighbors in b."""
            here = (index >= start) & (index < start + count)
            turn = starts[rank] + start, y is None and start < starts[rank]
            if not (len(x) and count):
                x_like, b_like = (
                    torch.zeros_like(t, dtype=dtype) for t in (x, x if b is None else b)
                )
                return x_like, b_like
            grads = torch.ops.synface_kernels.hypersphere_repulsion_nearest_backward(
                turned(x.to(dtype), *turn),
                None if b is None else turned(b.to(dtype), *turn),
                torch.where(here, index - start, 0),
                torch.where(here, grad_square, 0),
                R_MIN,
                b is None or y is None or needs_x_grad,
                b is not None and (y is None or needs_y_grad),
                ctx.impl,
            )
            by_x, by_b = (turned(g, *turn, back=True) if g.numel() else g for g in grads)
            return by_x, by_b

        if y is not None:
            by_x, by_y = meet(y, 0, len(y))
            return (
                by_x.to(x.dtype) if needs_x_grad else None,
                by_y.to(y.dtype) if needs_y_grad else None,
                *[None] * 4,
            )
        gradient, _ = meet(None, starts[rank], counts[rank])
        # The neighbor relation is not symmetric: every rank visits all blocks.
        for ahead, behind, others in ring(x, counts, len(counts) - 1, group):
            own, back = meet(others, starts[ahead], counts[ahead])
            gradient += own
            gradient += exchange(back, torch.empty_like(gradient), ahead, behind, group)
        return gradient.to(x.dtype), *[None] * 5


class PairSum(torch.autograd.Function):
    """Σ_pairs f, or log Σ_pairs exp, over all ranks' points, differentiable by this rank's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, counts: list[int], potential: Potential, group: Any, impl: str
    ) -> Tensor:
        rank, ranks, starts = dist.get_rank(group), len(counts), starts_of(counts)
        needs_grad, *_ = ctx.needs_input_grad
        exponential = potential.is_exponential
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x = x.detach().contiguous()
        none = -torch.inf if exponential else 0.0
        total = nothing = x.new_full((), none, dtype=torch.float64)
        # Each block's log-sum-exp has a gradient of its own scale; the sum is in units of e^−unit.
        gradient, unit = torch.zeros_like(x, dtype=dtype), nothing

        def pairs(
            a: Tensor, b: Tensor | None, first: int, second: int
        ) -> tuple[Tensor, Tensor, Tensor]:
            nonlocal total
            turn = first + second, second < first
            value, *grads = torch.ops.synface_kernels.hypersphere_repulsion_pairs(
                turned(a, *turn),
                None if b is None else turned(b, *turn),
                *potential,
                needs_grad,
                needs_grad and b is not None,
                impl,
                may_split_bf16(),
            )
            total = torch.logaddexp(total, value) if exponential else total + value
            own, other = (
                turned(grad, *turn, back=True) if grad.numel() else grad for grad in grads
            )
            return value, own, other

        def add(part: Tensor, value: Tensor, rows: slice = slice(None)) -> None:
            nonlocal unit
            if not needs_grad:
                return
            if exponential:
                most = torch.maximum(unit, value)
                gradient.mul_((unit - most).exp().nan_to_num(0).to(dtype))
                part = part * (value - most).exp().nan_to_num(0).to(dtype)
                unit = most
            gradient[rows] += part

        if len(x) > 1:
            value, own, _ = pairs(x, None, starts[rank], starts[rank])
            add(own, value)
        for ahead, behind, others in ring(x, counts, ranks // 2, group):
            mine, theirs = slice(0, None), slice(0, None)
            if ahead == behind:
                half = counts[min(rank, ahead)] // 2
                if rank < ahead:
                    mine = slice(0, half)
                else:
                    theirs = slice(half, None)
            back, value = torch.zeros_like(others, dtype=dtype), nothing
            if len(x[mine]) and len(others[theirs]):
                value, own, other = pairs(
                    x[mine],
                    others[theirs],
                    starts[rank] + mine.start,
                    starts[ahead] + theirs.start,
                )
                add(own, value, mine)
                if needs_grad:
                    back[theirs] = other
            if needs_grad:
                returned = torch.empty_like(gradient)
                exchange(back, returned, ahead, behind, group)
                its_unit = exchange(
                    value[None], torch.empty_like(value)[None], ahead, behind, group
                )
                add(returned, its_unit[0])

        totals = Gather.apply(total, group)
        total = totals.logsumexp(0) if exponential else totals.sum()
        if exponential:
            gradient *= (unit - total).exp().to(dtype)
        ctx.save_for_backward(gradient)
        ctx.dtype = x.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad.to(gradient.dtype)).to(ctx.dtype), None, None, None, None


def starts_of(counts: list[int]) -> list[int]:
    """Return the index of each rank's first point among all ranks' points."""
    return [0, *accumulate(counts)][:-1]


def ring(x: Tensor, counts: list[int], steps: int, group: Any) -> Iterator[tuple[int, int, Tensor]]:
    """Yield per step the rank ahead, the rank behind, and the points of the rank ahead.

    The rank behind receives this rank's points.
    """
    rank, ranks = dist.get_rank(group), len(counts)
    for step in range(1, steps + 1):
        ahead, behind = (rank + step) % ranks, (rank - step) % ranks
        others = x.new_empty(counts[ahead], x.shape[1])
        yield ahead, behind, exchange(x, others, behind, ahead, group)


def exchange(send: Tensor, receive: Tensor, to: int, source: int, group: Any) -> Tensor:
    """Send to one rank of the group while receiving from another; return the received tensor."""
    operations = [
        dist.P2POp(dist.isend, send.contiguous(), group=group, group_peer=to),
        dist.P2POp(dist.irecv, receive, group=group, group_peer=source),
    ]
    with connected(group):
        for request in dist.batch_isend_irecv(operations):
            request.wait()
    return receive
