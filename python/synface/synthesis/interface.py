"""The interface of face generators, and the check of their arguments."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..common.check import check_integer


class FaceGenerator(Protocol):
    """A face generator: the embedding sets the identity, the style everything else.

    Attributes:
        embedding_size: D.
        style_size: S.
        image_shape: (H, W, C), C = 1 (grayscale) or 3 (RGB).
        description: identifies the generator, for `json.dumps`.
        controls: optional; by name, the columns of the style that change one thing, such as "pose":
            a mapping to sequences of int. See `synface.synthesis.controls`.
        numbers: optional; by control, a name for each of its columns, for `preview`.
        neutral: optional; (S,) float32, the style in which nothing is varied; by default zeros.
    """

    embedding_size: int
    style_size: int
    image_shape: tuple[int, int, int]
    description: dict[str, Any]

    def generate(self, embedding: Tensor, style: Tensor, seed: Tensor) -> Tensor:
        """Return one image per row.

        Args:
            embedding: (B, D) float32, unit rows.
            style: (B, S) float32, to be drawn from a standard normal distribution.
            seed: (B,) int64, not negative: random seed of each image, beside its style.

        Returns:
            (B, H, W, C) uint8 on the CPU; the same arguments give the same bits.

        Raises:
            ValueError: for arguments of another shape or dtype.
        """
        ...


def check_arguments(
    generator: FaceGenerator, embedding: Tensor, style: Tensor, seed: Tensor
) -> None:
    """Raise ValueError unless these are arguments of `FaceGenerator.generate`, and finite."""
    batch = len(seed) if seed.ndim else 0
    for name, tensor, dtype, shape in (
        ("seed", seed, torch.int64, (batch,)),
        ("embedding", embedding, torch.float32, (batch, generator.embedding_size)),
        ("style", style, torch.float32, (batch, generator.style_size)),
    ):
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or not batch:
            raise ValueError(
                f"{name} must be {dtype_name(dtype)} of shape {shape} with at least one row, "
                f"got {dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
            )
        if not torch.isfinite(tensor).all():
            row = int((~torch.isfinite(tensor).all(1)).nonzero()[0, 0])
            raise ValueError(f"{name} must be finite, got nan or inf in row {row}")


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


def check_size(size: int) -> None:
    """Raise TypeError or ValueError unless an image's height and width is an integer ≥ 8."""
    if isinstance(size, int) and not isinstance(size, bool) and size < 8:
        raise ValueError(f"size must be at least 8 pixels, got {size}")
    check_integer("size", size, 8)
