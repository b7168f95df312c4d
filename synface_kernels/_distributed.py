"""What the ops share whose data is spread over the ranks of a `torch.distributed` process group."""

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
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed process group, got {describe(group)}")


@contextmanager
def connected(group: Any) -> Iterator[None]:
    """Says what it means when the ranks' connection breaks."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"rank {dist.get_rank(group)} of {dist.get_world_size(group)} lost the others: one of "
            "them has died, has raised an error of its own, or did not come within the group's "
            f"timeout: {error}"
        ) from error


def agree(
    prepare: Callable[[], tuple[list[int], dict[str, Any]]], count: int, group: Any
) -> list[list[int]]:
    """The numbers of each rank, once all ranks are known to be right.

    prepare() returns `count` numbers of this rank, and facts that must be the same on all ranks.
    If it raises on one of them, or a fact differs, all raise the same error.

    One exchange of count + 2 numbers; objects travel only where there is an error to tell of.
    """
    numbers = [0] * count
    facts: dict[str, Any] = {}
    failure = None
    try:
        numbers, facts = prepare()
    except Exception as error:
        failure = type(error), str(error)
    digest = hashlib.blake2b(repr(facts).encode(), digest_size=8).digest()
    mine = [failure is not None, int.from_bytes(digest, "little", signed=True), *numbers]
    # Through the group's CPU backend if it has one: then no GPU is waited for.
    has_cpu = "cpu:" in dist.get_backend_config(group)
    device = torch.device("cpu") if has_cpu else torch.device("cuda", torch.cuda.current_device())
    with connected(group):
        ranks = gathered(torch.tensor(mine, dtype=torch.int64, device=device), group).tolist()
    if any(rank[0] for rank in ranks):
        for at, told in enumerate(_objects(failure, group)):
            if told:
                kind, message = told
                raise kind(f"rank {at}: {message}")
    if any(rank[1] != ranks[0][1] for rank in ranks):
        every = _objects(facts, group)
        for name in facts:
            values = [other[name] for other in every]
            if any(repr(value) != repr(values[0]) for value in values):
                raise ValueError(
                    f"{name} must be the same on all ranks, got {values} on ranks 0, 1, …"
                )
    return [rank[2:] for rank in ranks]


def _objects(value: Any, group: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size(group)
    with connected(group):
        dist.all_gather_object(values, value, group=group)
    return values


def gathered(value: Tensor, group: Any) -> Tensor:
    """A tensor of each rank, of one shape: (P, …)."""
    values = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    with connected(group):
        dist.all_gather(values, value, group=group)
    return torch.stack(values)


class Gather(torch.autograd.Function):
    """Numbers of each rank: (P, …). A rank's gradient is that by its own numbers, in a result that
    is the same on all ranks.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: Any) -> Tensor:
        ctx.rank = dist.get_rank(group)
        return gathered(value, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return grad[ctx.rank], None


class Replicated(torch.autograd.Function):
    """What is the same on all ranks; its gradient is summed over them."""

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


# Rows: counts[r] of them are rank r's, and (N, …), N = Σ counts, holds those of all ranks in order.


def gather_rows(own: Tensor, counts: list[int], group: Any) -> Tensor:
    """(N, …) from each rank's own rows."""
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
    """(P, counts[rank], …): what each rank has for this rank's rows, from each rank's (N, …)."""
    ranks, own = len(counts), counts[dist.get_rank(group)]
    out = rows.new_empty((ranks * own, *rows.shape[1:]))
    if sum(counts):
        with connected(group):
            sizes = [own] * ranks
            dist.all_to_all_single(out, rows.contiguous(), sizes, counts, group=group)
    return out.unflatten(0, (ranks, own))


def from_owners(parts: Tensor, counts: list[int], group: Any) -> Tensor:
    """(N, …): what each row's owner has for this rank; undoes `to_owners`."""
    ranks, own = parts.shape[:2]
    out = parts.new_empty((sum(counts), *parts.shape[2:]))
    if sum(counts):
        with connected(group):
            sizes = [own] * ranks
            parts = parts.contiguous().flatten(0, 1)
            dist.all_to_all_single(out, parts, counts, sizes, group=group)
    return out


class GatherRows(torch.autograd.Function):
    """`gather_rows`; a row's gradient is the sum of what the ranks find, in the ranks' order."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: list[int], group: Any) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return gather_rows(own, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return to_owners(grad, ctx.counts, ctx.group).sum(0), None, None


class ToOwners(torch.autograd.Function):
    """`to_owners`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int], group: Any) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return to_owners(rows, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return from_owners(grad, ctx.counts, ctx.group), None, None
