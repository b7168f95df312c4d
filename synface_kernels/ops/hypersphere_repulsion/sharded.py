"""Sums over all pairs of points that are spread over the ranks of a process group.

Blocks of points travel round the ring. Step s brings rank r the points of rank r + s, and takes
their gradient back; by symmetry half of the steps, ⌊P/2⌋, meet all P ranks. At the last step of an
even number two ranks meet twice: each takes one half of their pairs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def total_rows(x: Tensor, group: Any) -> list[int]:
    """How many points each rank holds."""
    own = torch.tensor([x.shape[0]], device=x.device)
    counts = [torch.zeros_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, own, group=group)
    return [int(count) for count in counts]


class PairSum(torch.autograd.Function):
    """Σ_pairs f, or log Σ_pairs exp, over all ranks' points; its gradient by this rank's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, counts: list[int], potential: tuple[Any, ...], group: Any, impl: str
    ) -> Tensor:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        exponential, needs_grad = potential[0] == "log_sum_exp", ctx.needs_input_grad[0]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        x = x.detach().contiguous()
        nothing = torch.full((), -torch.inf if exponential else 0.0, dtype=torch.float64)
        nothing = nothing.to(x.device)
        total = nothing
        # Under log_sum_exp a gradient is that of a logarithm of its own: in units of e^−unit.
        gradient, unit = torch.zeros_like(x, dtype=dtype), nothing

        def pairs(a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
            nonlocal total
            value, *grads = torch.ops.synface_kernels.hypersphere_repulsion_pairs(
                a, b, *potential, needs_grad, needs_grad and b is not None, impl
            )
            total = torch.logaddexp(total, value) if exponential else total + value
            return value, grads[0], grads[1]

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
            value, own, _ = pairs(x, None)
            add(own, value)
        for step in range(1, ranks // 2 + 1):
            ahead, behind = (rank + step) % ranks, (rank - step) % ranks
            others = exchange(x, x.new_empty(counts[ahead], x.shape[1]), behind, ahead, group)
            mine, theirs = slice(None), slice(None)
            if 2 * step == ranks:
                half = counts[min(rank, ahead)] // 2
                if rank < ahead:
                    mine = slice(half)
                else:
                    theirs = slice(half, None)
            back, value = torch.zeros_like(others, dtype=dtype), nothing
            if len(x[mine]) and len(others[theirs]):
                value, own, other = pairs(x[mine], others[theirs])
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

        totals = [torch.zeros_like(total) for _ in range(ranks)]
        dist.all_gather(totals, total, group=group)
        total = torch.stack(totals).logsumexp(0) if exponential else torch.stack(totals).sum()
        if exponential:
            gradient *= (unit - total).exp().to(dtype)
        ctx.save_for_backward(gradient)
        ctx.dtype = x.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * grad.to(gradient.dtype)).to(ctx.dtype), None, None, None, None


def exchange(send: Tensor, receive: Tensor, to: int, source: int, group: Any) -> Tensor:
    """Sends to one rank of the group while receiving from another."""
    operations = [
        dist.P2POp(dist.isend, send.contiguous(), group=group, group_peer=to),
        dist.P2POp(dist.irecv, receive, group=group, group_peer=source),
    ]
    for request in dist.batch_isend_irecv(operations):
        request.wait()
    return receive
