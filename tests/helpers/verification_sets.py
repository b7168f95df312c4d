"""Encoded images for verification sets, and a network to embed them."""

from io import BytesIO

import numpy as np
import torch
from PIL import Image
from torch import nn

SAME = [True, False, True, False]  # of the pairs of eight images


def png(pixels: np.ndarray) -> bytes:
    """Return an image encoded as PNG."""
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def images(count: int = 8, size: int = 6) -> list[bytes]:
    """Return random encoded images, always the same."""
    random = np.random.default_rng(0)
    return [png(random.integers(0, 256, (size, size), np.uint8)) for _ in range(count)]


class Flat(nn.Module):
    """A network that has nothing to learn: a fixed projection of the pixels."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(pixels, 16, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1) @ self.weight
