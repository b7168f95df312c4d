"""The margin softmax over classes that are spread over the ranks of a process group.

Each rank meets the embeddings of all ranks with its own centers. What it finds out about a row goes
to the rank that has the row, which puts the parts together and computes the row's loss. The way
back is the same: the gradients of the parts go to the ranks that have the centers, and what these
find for an embedding is summed by the rank that has it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._check import require
from ..._distributed import (
    Gather,
    GatherRows,
    ToOwners,
    check_group,
    gather_rows,
    validate_on_all_ranks,
)
from .margins import CombinedMargin

ANY_CLASS = 2**63 - 1  # how many classes there are, before it is known


@dataclass(frozen=True)
class Shards:
    """How rows and classes are spread.

    Attributes:
        counts: each rank's number of rows. start, classes: this rank's classes, start … start +
            classes − 1, of which class_ids take part if not None. num_classes: all ranks'.
    """

    group: Any
    counts: list[int]
    start: int
    classes: int
    num_classes: int
    class_ids: Tensor | None

    def statistics(
        self, core: Callable[[Tensor, Tensor], tuple[Tensor, ...]], input: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """negative_lse (N,), negative_max (N,) and target_cosine (N, K) of this rank's rows, over
        all ranks' classes.

        core: computes them, of all ranks' rows over this rank's classes, from embeddings and
            labels.
        """
        every = gather_rows(labels, self.counts, self.group)
        here = (every >= self.start) & (every < self.start + self.classes)
        elsewhere = torch.where(every >= 0, -2, -1)  # what the core knows these labels as
        shifted = torch.where(here, self._places(every - self.start, here), elsewhere)
        embeddings = GatherRows.apply(input, self.counts, self.group)
        negative_lse, negative_max, cosine = core(embeddings, shifted)
        found = torch.cat([negative_lse[:, None], negative_max.double()[:, None], cosine], 1)
        parts = ToOwners.apply(found, self.counts, self.group)  # (P, N, 2 + K)
        return (
            _logsumexp(parts[:, :, 0]),
            parts[:, :, 1].detach().amax(0).to(negative_max.dtype),
            parts[:, :, 2:].sum(0),  # all but one of them are 0
        )

    def _places(self, classes: Tensor, here: Tensor) -> Tensor:
        """Where the classes that are here stand in class_ids, if there are any."""
        if self.class_ids is None:
            return classes
        places = torch.searchsorted(self.class_ids, classes)
        places = places.clamp_max(self.class_ids.shape[0] - 1)
        held = ~here | (self.class_ids[places] == classes)

        def check() -> tuple[list[int], dict[str, Any]]:
            message = "class_ids must hold every label that is among this rank's classes"
            require(held, message, classes + self.start)
            return [], {}

        if held.device.type == "cpu":
            validate_on_all_ranks(check, 0, self.group)
        else:
            check()
        return places

    def totals(self, *values: Tensor) -> Tensor:
        """Sums over the ranks, the same on all of them."""
        own = torch.stack([value.double() for value in values])
        return Gather.apply(own, self.group).sum(0)


def _logsumexp(parts: Tensor) -> Tensor:
    """Over the ranks, with a gradient of 0 where all are −∞."""
    nothing, broken = (parts == -torch.inf).all(0), parts.isnan().any(0)
    value = parts.masked_fill(nothing | broken, 0).logsumexp(0)
    value = torch.where(nothing, -torch.inf, value)
    return torch.where(broken, parts.sum(0), value)  # passes on no NaN · 0


def agreed(
    prepare: Callable[[], tuple[str, Tensor, Tensor]],
    input: Tensor,
    weight: Tensor,
    margin: CombinedMargin,
    class_ids: Tensor | None,
    class_start: int,
    ignore_index: int,
    group: Any,
    **same: Any,
) -> tuple[Shards, str, Tensor, Tensor]:
    """How rows and classes are spread, and what prepare() returns, once the ranks agree.

    prepare: checks this rank's arguments; the implementation, labels (N, K) below `ANY_CLASS`, and
        their weights.
    same: options that must be the same on all ranks.
    """
    check_group(group)
    prepared: Any = None

    def facts() -> tuple[list[int], dict[str, Any]]:
        nonlocal prepared
        prepared = chosen, labels, _ = prepare()
        if chosen == "reference":
            raise ValueError("impl must be 'cpu' or 'triton' with a group, got 'reference'")
        recorded = torch.is_grad_enabled()
        facts = {
            "D": input.shape[1],
            "K": labels.shape[1],
            "sub-centers (M,)": tuple(weight.shape[1:-1]),
            "dtype of input": input.dtype,
            "dtype of weight": weight.dtype,
            "requires_grad of input": recorded and input.requires_grad,
            "requires_grad of weight": recorded and weight.requires_grad,
            "whether there are class_ids": class_ids is not None,
            "margin": {  # except for what each row has of its own
                name: None if isinstance(value, Tensor) else value
                for name, value in vars(margin).items()
            },
        }
        # On a GPU labels are checked there, below.
        known = labels.device.type == "cpu" and labels.numel() > 0
        greatest = int(labels.max()) if known else -1
        return [labels.shape[0], weight.shape[0], class_start, greatest], facts | same

    ranks = validate_on_all_ranks(facts, 4, group)
    counts, classes, starts, greatest = (list(column) for column in zip(*ranks, strict=True))
    num_classes = 0
    for start, count in sorted(zip(starts, classes, strict=True)):
        if start != num_classes:
            ranges = [f"[{s}, {s + c})" for s, c in zip(starts, classes, strict=True)]
            raise ValueError(
                "class_start: the ranks' classes must follow each other from 0, without a hole or "
                f"an overlap, got {', '.join(ranges)} on ranks 0, 1, …"
            )
        num_classes += count
    wanted = f"target must be in [0, {num_classes}), or ignore_index ({ignore_index})"
    for rank, label in enumerate(greatest):
        if label >= num_classes:
            raise ValueError(f"rank {rank}: {wanted}, got {label}")
    chosen, labels, label_weight = prepared
    if labels.device.type != "cpu":
        require(labels < num_classes, wanted, labels)
    shards = Shards(group, counts, class_start, weight.shape[0], num_classes, class_ids)
    return shards, chosen, labels, label_weight
