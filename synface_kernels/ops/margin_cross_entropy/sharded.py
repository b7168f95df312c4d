"""The margin softmax over classes that are sharded over the ranks of a process group.

Each rank computes partial softmax statistics of all ranks' embeddings against its own centers. An
all-to-all returns them to each row's owner, which combines them and computes the row's loss. In the
backward pass their gradients go to the centers' ranks by the reverse all-to-all, and each
embedding's owner sums the gradients that the ranks found for it.
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
from .interface import Prepared, Statistics
from .margins import CombinedMargin


@dataclass(frozen=True)
class Shards:
    """A group's rows and classes, sharded over its ranks.

    Attributes:
        counts: each rank's number of rows.
        start, classes: this rank's classes are start … start + classes − 1.
        class_ids: those of them that are used, counted from start; None: all.
    """

    group: Any
    counts: list[int]
    start: int
    classes: int
    class_ids: Tensor | None

    def statistics(
        self, core: Callable[[Tensor, Tensor], Statistics], input: Tensor, labels: Tensor
    ) -> Statistics:
        """Return the statistics of this rank's rows over all ranks' classes.

        Args:
            core: computes those of all ranks' rows over this rank's classes, from embeddings and
                labels.
            input, labels: this rank's rows.
        """
        every = gather_rows(labels, self.counts, self.group)
        here = (every >= self.start) & (every < self.start + self.classes)
        elsewhere = torch.where(every >= 0, -2, -1)  # the core's numbers for such labels
        own = torch.where(here, self._indices(every - self.start, here), elsewhere)
        embeddings = GatherRows.apply(input, self.counts, self.group)
        return self._of_all_classes(core(embeddings, own))

    def _of_all_classes(self, partial: Statistics) -> Statistics:
        """Send each rank the partial statistics of its rows, and combine those of this rank's.

        They are sent as the columns of one float64 matrix, in the order of their names.
        """
        every = partial._replace(negative_max=partial.negative_max.double())
        columns = [v if v.dim() == 2 else v[:, None] for v in every if v is not None]
        parts = ToOwners.apply(torch.cat(columns, 1), self.counts, self.group)  # (P, N, …)
        lse, most, sums = parts[:, :, 0], parts[:, :, 1], parts[:, :, 2:].sum(0)
        totals = iter(sums.split([column.shape[1] for column in columns[2:]], 1))

        def total(value: Tensor | None) -> Tensor | None:
            return None if value is None else next(totals).squeeze(1)

        return Statistics(
            negative_lse=_logsumexp(lse),
            negative_max=most.detach().amax(0).to(partial.negative_max.dtype),
            target_cosine=next(totals),  # all but one rank's are 0
            filtered=total(partial.filtered),
            cosine_sum=total(partial.cosine_sum),
            num_classes=total(partial.num_classes),
        )

    def _indices(self, classes: Tensor, here: Tensor) -> Tensor:
        """Return the indices in class_ids, if given, of the classes that are here."""
        if self.class_ids is None:
            return classes
        indices = torch.searchsorted(self.class_ids, classes)
        indices = indices.clamp_max(self.class_ids.shape[0] - 1)
        held = ~here | (self.class_ids[indices] == classes)

        def check() -> tuple[list[int], dict[str, Any]]:
            message = "class_ids must hold every label that is among this rank's classes"
            require(held, message, classes + self.start)
            return [], {}

        if held.device.type == "cpu":
            validate_on_all_ranks(check, 0, self.group)
        else:
            check()
        return indices

    def totals(self, *values: Tensor) -> Tensor:
        """Return sums over the ranks, the same on all of them."""
        own = torch.stack([value.double() for value in values])
        return Gather.apply(own, self.group).sum(0)


def _logsumexp(parts: Tensor) -> Tensor:
    """Return the log-sum-exp over the ranks, with a gradient of 0 where all are −∞."""
    nothing, broken = (parts == -torch.inf).all(0), parts.isnan().any(0)
    value = parts.masked_fill(nothing | broken, 0).logsumexp(0)
    value = torch.where(nothing, -torch.inf, value)
    return torch.where(broken, parts.sum(0), value)  # passes on no NaN · 0


def prepare_on_all_ranks(
    prepare: Callable[[], Prepared],
    input: Tensor,
    weight: Tensor,
    margin: CombinedMargin,
    class_ids: Tensor | None,
    class_start: int,
    ignore_index: int,
    group: Any,
    **options: Any,
) -> tuple[Shards, Prepared]:
    """Return how rows and classes are sharded, and this rank's checked arguments.

    Args:
        prepare: checks this rank's arguments, except for labels' upper bound.
        options: what else must be the same on all ranks.

    Raises:
        The error of the first rank whose arguments are wrong, on all ranks; ValueError where they
        do not fit together.
    """
    check_group(group)
    prepared: Any = None

    def validate() -> tuple[list[int], dict[str, Any]]:
        nonlocal prepared
        prepared = prepare()
        labels = prepared.labels
        if prepared.impl == "reference":
            raise ValueError("impl must be 'cpu' or 'triton' with a group, got 'reference'")
        recorded = torch.is_grad_enabled()
        must_match = {
            "D": input.shape[1],
            "K": labels.shape[1],
            "sub-centers (M,)": tuple(weight.shape[1:-1]),
            "dtype of input": input.dtype,
            "dtype of weight": weight.dtype,
            "requires_grad of input": recorded and input.requires_grad,
            "requires_grad of weight": recorded and weight.requires_grad,
            "whether there are class_ids": class_ids is not None,
            "dtype of autocast": prepared.gemm_dtype,
            "margin": {  # except for margins per row
                name: None if isinstance(value, Tensor) else value
                for name, value in vars(margin).items()
            },
        }
        # On a GPU labels are checked there, below.
        known = labels.device.type == "cpu" and labels.numel() > 0
        greatest = int(labels.max()) if known else -1
        return [labels.shape[0], weight.shape[0], class_start, greatest], must_match | options

    ranks = validate_on_all_ranks(validate, 4, group)
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
    if prepared.labels.device.type != "cpu":
        require(prepared.labels < num_classes, wanted, prepared.labels)
    return Shards(group, counts, class_start, weight.shape[0], class_ids), prepared
