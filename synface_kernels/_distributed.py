"""Collectives and checks for ops whose data is sharded over a `torch.distributed` group."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._check import describe


def check_group(group: Any) -> None:
    """Raise TypeError unless the group is a process group."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed process group, got {describe(group)}")


@contextmanager
def connected(group: Any) -> Iterator[None]:
    """Turn a collective's failure into an error that names this rank and the likely causes."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank(group)} of {dist.get_world_size(group)} lost the others: one of "
            "them has died, has raised an error of its own, or did not come within the group's "
            f"timeout: {error}"
        ) from error


def validate_on_all_ranks(
    prepare: Callable[[], tuple[list[int], dict[str, Any]]], count: int, group: Any
) -> list[list[int]]:
    """Run a check on every rank and return each rank's numbers; if one fails, all raise its error.

    Args:
        prepare: checks this rank's arguments; returns ``count`` numbers of this rank, and a dict
            ``must_match`` of values that have to be the same on all ranks.
        count: how many numbers a rank has.

    Raises:
        The error that prepare() raised on the first rank where it did, on all ranks; ValueError
            where a value of ``must_match`` differs.

    One all-gather of count + 2 numbers; objects are gathered only to report an error.
    """
    numbers = [0] * count
    must_match: dict[str, Any] = {}
    failure = None
    try:
        numbers, must_match = prepare()
    except Exception as error:
        failure = type(error), str(error)
    digest = hashlib.blake2b(repr(must_match).encode(), digest_size=8).digest()
    mine = [failure is not None, int.from_bytes(digest, "little", signed=True), *numbers]
    # The group's CPU backend, if it has one, does not make this wait for a GPU.
    has_cpu = "cpu:" in dist.get_backend_config(group)
    device = torch.device("cpu") if has_cpu else torch.device("cuda", torch.cuda.current_device())
    with connected(group):
        ranks = gathered(torch.tensor(mine, dtype=torch.int64, device=device), group).tolist()
    if any(rank[0] for rank in ranks):
        for at, failed in enumerate(_gathered_objects(failure, group)):
            if failed:
                kind, message = failed
                raise kind(f"rank {at}: {message}")
    if any(rank[1] != ranks[0][1] for rank in ranks):
        every = _gathered_objects(must_match, group)
        for name in must_match:
            values = [other[name] for other in every]
            if any(repr(value) != repr(values[0]) for value in values):
                raise ValueError(
                    f"{name} must be the same on all ranks, got {values} on ranks 0, 1, …"
                )
    return [rank[2:] for rank in ranks]


def _gathered_objects(value: Any, group: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    with connected(group):
        dist.all_gather_object(values, value, group=group)
    return values


def gathered(value: Tensor, group: Any) -> Tensor:
    """Return the ranks' tensors of one shape, stacked: (P, …)."""
    values = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    with connected(group):
        dist.all_gather(values, value, group=group)
    return torch.stack(values)


class Gather(torch.autograd.Function):
    """The ranks' tensors, stacked: (P, …), for a result that every rank computes alike.

    No collective in the backward pass: each rank takes its own slice of the gradient.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.rank = dist.get_rank(group)
        return gathered(value, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad[ctx.rank], None


class Replicated(torch.autograd.Function):
    """A tensor that is the same on all ranks; the backward pass sums its gradient over them."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        total = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True).contiguous()
        with connected(ctx.group):
            dist.all_reduce(total, group=ctx.group)
        return total.to(grad.dtype), None


# Below, rank r owns counts[r] rows, and (N, …), N = Σ counts, holds all ranks' rows, rank by rank.


def gather_rows(own: Tensor, counts: list[int], group: Any) -> Tensor:
    """Gather all ranks' rows: (N, …)."""
    every = own.new_empty((sum(counts), *own.shape[1:]))
    parts = list(every.split(counts))
    if len(every) == 0:
        return every
    with connected(group):
        if len(set(counts)) == 1:
            dist.all_gather(parts, own.contiguous(), group=group)
            return every
        parts[dist.get_rank(group)].copy_(own)
        requests = [
            dist.broadcast(part, group=group, group_src=rank, async_op=True)
            for rank, part in enumerate(parts)
            if len(part)
        ]
        for request in requests:
            request.wait()
    return every


def to_owners(rows: Tensor, counts: list[int], group: Any) -> Tensor:
    """Send each rank its rows of this rank's (N, …); return (P, counts[rank], …), by sender."""
    ranks, own = len(counts), counts[dist.get_rank(group)]
    out = rows.new_empty((ranks * own, *rows.shape[1:]))
    if sum(counts):
        with connected(group):
            sizes = [own] * ranks
            dist.all_to_all_single(out, rows.contiguous(), sizes, counts, group=group)
    return out.unflatten(0, (ranks, own))


def from_owners(parts: Tensor, counts: list[int], group: Any) -> Tensor:
    """Send every rank its part of (P, counts[rank], …); return (N, …). Inverse of `to_owners`."""
    ranks, own = parts.shape[:2]
    out = parts.new_empty((sum(counts), *parts.shape[2:]))
    if sum(counts):
        with connected(group):
            sizes = [own] * ranks
            parts = parts.contiguous().flatten(0, 1)
            dist.all_to_all_single(out, parts, counts, sizes, group=group)
    return out


class GatherRows(torch.autograd.Function):
    """Differentiable `gather_rows`; a row's gradient is summed over the ranks, in rank order."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: list[int], group: Any) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return gather_rows(own, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return to_owners(grad, ctx.counts, ctx.group).sum(0), None, None


class ToOwners(torch.autograd.Function):
    """Differentiable `to_owners`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: Any) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return to_owners(rows, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return from_owners(grad, ctx.counts, ctx.group), None, None
