"""Classification heads: modules that hold the class centres and return the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import synface_kernels as sk


class MarginHead(nn.Module):
    """The class centres, and `synface_kernels.margin_cross_entropy` over them.

    Args:
        embedding_size: D. num_classes: C. Both at least 1.
        margin: an `ArcFace` (the default), `CosFace`, `SphereFace` or `CombinedMargin`.
        init_std: standard deviation of the centres' initial values; only their directions matter
            to the loss, but their lengths scale the step that a given learning rate takes.
        impl: which implementation of the op to take.
        device, dtype: of the centres.

    Memory: C·D values, and as much for their gradient.

    Source: Deng et al., "ArcFace", CVPR 2019.
    """

    def __init__(
        self,
        embedding_size: int,
        num_classes: int,
        margin: sk.CombinedMargin | None = None,
        *,
        init_std: float = 0.01,
        impl: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("embedding_size", embedding_size), ("num_classes", num_classes)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.margin = sk.ArcFace() if margin is None else margin
        self.impl = impl
        self.weight = nn.Parameter(
            torch.empty(num_classes, embedding_size, device=device, dtype=dtype)
        )
        nn.init.normal_(self.weight, std=init_std)

    def forward(
        self,
        embeddings: Tensor,
        target: Tensor,
        target_weight: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The loss of (N, D) embeddings and (N,) or (N, K) labels.

        Args and errors: as `synface_kernels.margin_cross_entropy`, whose options (``mix``,
        ``reduction``, ``return_stats``, a per-batch ``margin``, …) may follow.
        """
        settings: dict[str, Any] = {"margin": self.margin, "impl": self.impl} | options
        return sk.margin_cross_entropy(
            embeddings, self.weight, target, target_weight=target_weight, **settings
        )

    def extra_repr(self) -> str:
        classes, size = self.weight.shape
        return f"embedding_size={size}, num_classes={classes}, margin={self.margin}"
