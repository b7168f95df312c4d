"""A margin head whose classes are sharded over the ranks of a process group."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

import synface_kernels as sk

from ..common.check import check_integer, describe
from ..common.labels import labels_of
from ..common.rng import generator, normals
from .fused import FusedHead

INIT_ROWS = 4096  # centers of one random stream


def split(num_classes: int, ranks: int) -> list[int]:
    """Return each rank's number of classes, as equal as possible, larger on the first ranks."""
    return [num_classes // ranks + (rank < num_classes % ranks) for rank in range(ranks)]


def scale_grad(embeddings: Any, factor: int) -> Any:
    """Return the same embeddings, whose gradient is multiplied by ``factor``."""
    if not (isinstance(embeddings, Tensor) and embeddings.requires_grad):
        return embeddings
    view = embeddings.view_as(embeddings)
    if view.requires_grad:  # not under no_grad
        view.register_hook(lambda grad: grad * factor)
    return view


class ShardedMarginHead(FusedHead):
    """Margin softmax over class centers that are sharded over the ranks.

    Each rank holds some of the centers; `synface_kernels.margin_cross_entropy` computes the loss
    over those of all ranks.

    Args:
        embedding_size: D. num_classes: C, over all ranks.
        margin: an `ArcFace` (the default), `CosFace`, `SphereFace` or `CombinedMargin`.
        group: a `torch.distributed` process group. Default: all ranks.
        classes: number of classes on each rank, at least 1, with sum C. Default: as equal as
            possible.
        averaged: whether the backbone's gradients are averaged over the ranks, as
            `DistributedDataParallel` does. The gradients of the embeddings are then multiplied by
            the number of ranks, so that the average is the gradient of the loss. The head itself
            must not be wrapped: its gradients are complete on each rank.
        seed: seed of the centers' initial values, which do not depend on the number of ranks.
        init_std, workspace, sparse, impl, device, dtype: as `MarginHead`.

    State dict: ``weight`` (C_r, D), this rank's. `synface.checkpoint.save_model` writes checkpoints
    that any number of ranks can resume from.

    Memory: C_r·D values, as much for their gradient, and ``workspace``, if it is a number. See
    docs/sharding.md.

    Raises:
        ValueError, TypeError: for arguments that do not fit.
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        margin: sk.CombinedMargin | None = None,
        *,
        group: Any = None,
        classes: list[int] | None = None,
        averaged: bool = True,
        seed: int = 0,
        init_std: float = 0.01,
        workspace: int | Literal["auto"] = "auto",
        sparse: bool = True,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_integer("embedding_size", embedding_size, 1)
        check_integer("num_classes", num_classes, 1)
        check_integer("seed", seed, 0)
        group = dist.group.WORLD if group is None else group
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                "group must be a torch.distributed process group, or one must be initialized, "
                f"got {describe(group)}"
            )
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        classes = split(num_classes, ranks) if classes is None else classes
        if len(classes) != ranks or min(classes) < 1 or sum(classes) != num_classes:
            raise ValueError(
                f"classes must be {ranks} numbers, one for each rank, at least 1, "
                f"{num_classes} together (num_classes), got {classes}"
            )
        super().__init__(
            (classes[rank], embedding_size),
            margin,
            init_std,
            workspace,
            sparse,
            impl,
            device,
            dtype,
        )
        self.group, self.ranks, self.averaged, self.seed = group, ranks, averaged, seed
        self.num_classes, self.class_start = num_classes, sum(classes[:rank])
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the centers to the initial values of their seed."""
        if self.weight.is_meta:
            return
        end, size = self.class_start + self.weight.shape[0], self.weight.shape[1]
        for block in range(self.class_start // INIT_ROWS, (end - 1) // INIT_ROWS + 1):
            first = block * INIT_ROWS
            low, high = max(first, self.class_start), min(first + INIT_ROWS, end)
            # the name of a random stream, which another spelling would change
            stream = generator(self.seed, "centres", block)  # codespell:ignore centres
            drawn = normals((INIT_ROWS, size), stream) * self.init_std
            rows = slice(low - self.class_start, high - self.class_start)
            self.weight[rows] = drawn[low - first : high - first].to(self.weight)

    def forward(
        self,
        embeddings: Tensor,
        target: Tensor,
        target_weight: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """Return the loss of this rank's (N_r, D) embeddings and (N_r,) or (N_r, K) labels.

        Labels are in [0, C), of any integer dtype, and may be (N_r, 1) where they have no
        ``target_weight``.

        Args and errors: as `synface_kernels.margin_cross_entropy`, whose options (``mix``,
        ``reduction``, ``return_stats``, ``class_ids``, a per-batch ``margin``, …) may follow.
        """
        target = labels_of(target, target_weight is not None)
        if self.averaged:
            embeddings = scale_grad(embeddings, self.ranks)
        shard = {"group": self.group, "class_start": self.class_start}
        options = dict(**options, **shard, target_weight=target_weight)
        return self._loss(embeddings, target, options)

    def extra_repr(self) -> str:
        classes, size = self.weight.shape
        end = self.class_start + classes
        return (
            f"embedding_size={size}, num_classes={self.num_classes}, "
            f"classes=[{self.class_start}, {end}), margin={self.margin}"
        )
