"""Energies of points that are spread over the ranks of a process group.

Blocks of points travel round the ring. Step s brings rank r the points of rank r + s, and takes
back what r finds out about them: their gradient, or their neighbors. By symmetry half of the
steps, ⌊P/2⌋, meet all P ranks. At the last step of an even number two ranks meet twice: each takes
one half of their pairs, or the neighbors of its own points.

A gallery is whole on every rank, so its pairs need no ring.
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
from .energies import R_MIN


def checksum(rows: Tensor) -> int:
    """Of their bits, in any order: the same on any machine."""
    return int(rows.detach().contiguous().view(torch.int16).sum(dtype=torch.int64))


def turned(rows: Tensor, shift: int, flip: bool, *, back: bool = False) -> Tensor:
    """Rows, or back from them their gradient, in coordinates made for a meeting of two blocks.

    Identical points i and j are pushed along the axis that (i + j) mod D names, see `energies`, the
    one with the lower index along it. In these coordinates the blocks' own indices, whose sum is
    less by `shift`, name that same axis; flip: the block whose points come second is the lower one.
    """
    rows = rows.roll(shift if back else -shift, 1)
    return -rows if flip else rows


class Nearest(torch.autograd.Function):
    """The k nearest neighbors of this rank's points among all ranks', or in a gallery."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, counts: list[int], k: int, group: Any, impl: str
    ) -> tuple[Tensor, Tensor]:
        """Squared distances (n, k), in double, and indices (n, k), counted over all ranks."""
        rank, starts = dist.get_rank(group), starts_of(counts)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        ctx.counts, ctx.group, ctx.impl = counts, group, impl
        x = x.detach().contiguous()

        def search(a: Tensor, b: Tensor | None, start: int) -> tuple[Tensor, Tensor]:
            most = min(k, len(a) - 1 if b is None else len(b))
            if len(a) == 0 or most < 1:
                square = a.new_empty((len(a), max(most, 0)), dtype=torch.float64)
                return square, square.long()
            square, index = torch.ops.synface_kernels.hypersphere_repulsion_nearest(
                a, b, most, impl
            )
            return square, index + start

        def best(*found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            """By rounded cosine, then by index, as one process orders them."""
            square, index = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
            order = index.argsort(1)
            square, index = square.gather(1, order), index.gather(1, order)
            cosine = (1 - square / 2).to(dtype)
            order = cosine.argsort(stable=True, dim=1, descending=True)[:, :k]
            return square.gather(1, order), index.gather(1, order)

        if y is not None:
            square, index = search(x, y.detach(), 0)
        else:
            square, index = search(x, None, starts[rank])
            for ahead, behind, others in ring(x, counts, len(counts) // 2, group):
                square, index = best((square, index), search(x, others, starts[ahead]))
                if ahead != behind:
                    its_square, its_index = search(others, x, starts[rank])
                    shape = len(x), min(k, counts[behind])
                    returned = (
                        exchange(its_square, square.new_empty(shape), ahead, behind, group),
                        exchange(its_index, index.new_empty(shape), ahead, behind, group),
                    )
                    square, index = best((square, index), returned)
        ctx.mark_non_differentiable(index)
        ctx.save_for_backward(x, y, index)
        return square, index

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_square: Tensor, _: Any) -> tuple[Any, ...]:
        x, y, index = ctx.saved_tensors
        counts, group = ctx.counts, ctx.group
        rank, starts = dist.get_rank(group), starts_of(counts)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        needs = ctx.needs_input_grad[:2]

        def meet(b: Tensor | None, start: int, count: int) -> list[Tensor]:
            """The gradients by x and b of x's neighbors in b."""
            here = (index >= start) & (index < start + count)
            turn = starts[rank] + start, y is None and start < starts[rank]
            if not (len(x) and count):
                return [torch.zeros_like(t, dtype=dtype) for t in (x, x if b is None else b)]
            grads = torch.ops.synface_kernels.hypersphere_repulsion_nearest_backward(
                turned(x.to(dtype), *turn),
                None if b is None else turned(b.to(dtype), *turn),
                torch.where(here, index - start, 0),
                torch.where(here, grad_square, 0),
                R_MIN,
                b is None or y is None or needs[0],
                b is not None and (y is None or needs[1]),
                ctx.impl,
            )
            return [turned(g, *turn, back=True) if g.numel() else g for g in grads]

        if y is not None:
            grads = meet(y, 0, len(y))
            return (
                grads[0].to(x.dtype) if needs[0] else None,
                grads[1].to(y.dtype) if needs[1] else None,
                *[None] * 4,
            )
        gradient = meet(None, starts[rank], counts[rank])[0]
        # Whose neighbors these are is not symmetric: all blocks come by.
        for ahead, behind, others in ring(x, counts, len(counts) - 1, group):
            own, back = meet(others, starts[ahead], counts[ahead])
            gradient += own
            gradient += exchange(back, torch.empty_like(gradient), ahead, behind, group)
        return gradient.to(x.dtype), *[None] * 5


class PairSum(torch.autograd.Function):
    """Σ_pairs f, or log Σ_pairs exp, over all ranks' points; its gradient by this rank's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, counts: list[int], potential: tuple[Any, ...], group: Any, impl: str
    ) -> Tensor:
        rank, ranks, starts = dist.get_rank(group), len(counts), starts_of(counts)
        exponential, needs_grad = potential[0] == "log_sum_exp", ctx.needs_input_grad[0]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x = x.detach().contiguous()
        nothing = torch.full(
            (), -torch.inf if exponential else 0.0, dtype=torch.float64, device="cpu"
        )
        nothing = nothing.to(x.device)
        total = nothing
        # Under log_sum_exp a gradient is that of a logarithm of its own: in units of e^−unit.
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
    """Where each rank's points begin among all."""
    return [0, *accumulate(counts)][:-1]


def ring(x: Tensor, counts: list[int], steps: int, group: Any) -> Iterator[tuple[int, int, Tensor]]:
    """At each step the rank whose points come, the one that gets this rank's, and the points."""
    rank, ranks = dist.get_rank(group), len(counts)
    for step in range(1, steps + 1):
        ahead, behind = (rank + step) % ranks, (rank - step) % ranks
        others = x.new_empty(counts[ahead], x.shape[1])
        yield ahead, behind, exchange(x, others, behind, ahead, group)


def exchange(send: Tensor, receive: Tensor, to: int, source: int, group: Any) -> Tensor:
    """Sends to one rank of the group while receiving from another."""
    operations = [
        dist.P2POp(dist.isend, send.contiguous(), group=group, group_peer=to),
        dist.P2POp(dist.irecv, receive, group=group, group_peer=source),
    ]
    with connected(group):
        for request in dist.batch_isend_irecv(operations):
            request.wait()
    return receive
