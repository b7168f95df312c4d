"""A margin head whose classes are spread over the ranks of a process group."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import synface_kernels as sk

from ..common.check import check_integer, describe
from ..common.labels import labels_of
from ..common.rng import generator, normals
from .fused import FusedHead
from .partial_fc import _times

INIT_ROWS = 4096  # centers that are drawn together


def split(num_classes: int, ranks: int) -> list[int]:
    """How many classes each rank holds, as equal as can be, the first ranks having one more."""
    return [num_classes // ranks + (rank < num_classes % ranks) for rank in range(ranks)]


class ShardedMarginHead(FusedHead):
    """Some of the class centers, those of this rank, and `synface_kernels.margin_cross_entropy`
    over those of all ranks.

    Args:
        embedding_size: D. num_classes: C, over all ranks.
        margin: an `ArcFace` (the default), `CosFace`, `SphereFace` or `CombinedMargin`.
        group: a `torch.distributed` process group. Default: the one of all ranks.
        classes: how many classes each rank holds, at least 1, C together. Default: equally many, as
            far as that goes.
        averaged: whether the backbone's gradients are averaged over the ranks, as
            `DistributedDataParallel` does: then those of the embeddings are multiplied by the
            number of ranks, so that the average is the gradient of the loss. The head itself must
            not be wrapped, its gradients are whole.
        seed: of the centers' initial values, which do not depend on the number of ranks.
        init_std: their standard deviation.
        workspace: bytes that a CPU's forward pass may keep, so that the backward pass is shorter.
        sparse: see `MarginHead`.
        impl: which implementation of the op to take. device, dtype: of the centers.

    State dict: ``weight`` (C_r, D), this rank's. `synface.checkpoint.save_model` writes
    checkpoints that any number of ranks can resume from.

    Memory: C_r·D values, as much for their gradient, and ``workspace``. See docs/sharding.md.

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
        workspace: int = 0,
        sparse: bool = True,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("embedding_size", embedding_size, 1)
        check_integer("num_classes", num_classes, 1)
        check_integer("seed", seed, 0)
        check_integer("workspace", workspace, 0)
        self.group = dist.group.WORLD if group is None else group
        if not isinstance(self.group, dist.ProcessGroup):
            raise TypeError(
                "group must be a torch.distributed process group, or one must be initialized, "
                f"got {describe(self.group)}"
            )
        self.ranks, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        classes = split(num_classes, self.ranks) if classes is None else classes
        if len(classes) != self.ranks or min(classes) < 1 or sum(classes) != num_classes:
            raise ValueError(
                f"classes must be {self.ranks} numbers, one for each rank, at least 1, "
                f"{num_classes} together (num_classes), got {classes}"
            )
        self.margin = sk.ArcFace() if margin is None else margin
        self.num_classes, self.class_start = num_classes, sum(classes[:rank])
        self.averaged, self.workspace, self.sparse, self.impl = averaged, workspace, sparse, impl
        self.seed, self.init_std = seed, init_std
        self.weight = nn.Parameter(
            torch.empty(classes[rank], embedding_size, device=device, dtype=dtype)
        )
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Give the centers the initial values of their seed again."""
        if self.weight.is_meta:
            return
        end, size = self.class_start + self.weight.shape[0], self.weight.shape[1]
        for block in range(self.class_start // INIT_ROWS, (end - 1) // INIT_ROWS + 1):
            first = block * INIT_ROWS
            low, high = max(first, self.class_start), min(first + INIT_ROWS, end)
            draws = generator(
                self.seed, "centres", block
            )  # codespell:ignore - names a random stream
            drawn = normals((INIT_ROWS, size), draws) * self.init_std
            rows = slice(low - self.class_start, high - self.class_start)
            self.weight[rows] = drawn[low - first : high - first].to(self.weight)

    def forward(
        self,
        embeddings: Tensor,
        target: Tensor,
        target_weight: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The loss of (N_r, D) embeddings and (N_r,) or (N_r, K) labels in [0, C), this rank's.

        Labels may be of any integer dtype, and (N_r, 1) where they have no ``target_weight``.

        Args and errors: as `synface_kernels.margin_cross_entropy`, whose options (``mix``,
        ``reduction``, ``return_stats``, ``class_ids``, a per-batch ``margin``, …) may follow.
        """
        target = labels_of(target, target_weight is not None)
        if self.averaged:
            embeddings = _times(embeddings, self.ranks)
        settings: dict[str, Any] = {
            "margin": self.margin,
            "workspace": self.workspace,
            "impl": self.impl,
        }
        settings = self._with_update(settings | options, embeddings, target)
        return sk.margin_cross_entropy(
            embeddings,
            self._centers(),
            target,
            target_weight=target_weight,
            group=self.group,
            class_start=self.class_start,
            **settings,
        )

    def extra_repr(self) -> str:
        classes, size = self.weight.shape
        end = self.class_start + classes
        return (
            f"embedding_size={size}, num_classes={self.num_classes}, "
            f"classes=[{self.class_start}, {end}), margin={self.margin}"
        )
