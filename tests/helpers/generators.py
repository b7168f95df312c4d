"""Arguments for face generators, generators in files, random faces, and the files of a folder."""

from pathlib import Path

import torch
import torch.nn.functional as F
from synface.data import Faces


def unit(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Return random unit rows."""
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)))


def arguments(
    count: int, dim: int, style: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return embeddings, styles and seeds for `FaceGenerator.generate`."""
    g = torch.Generator().manual_seed(seed + 1)
    return unit(count, dim, seed), torch.randn(count, style, generator=g), torch.arange(count)


def people(count: int, images: int, size: int = 16) -> Faces:
    """Return random images of so many people."""
    pixels = torch.randint(256, (count * images, size, size, 1), dtype=torch.uint8)
    labels = torch.arange(count).repeat_interleave(images)
    return Faces(pixels, labels, [f"p{i}" for i in range(count)], "random pixels")


def tree(root: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder."""
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


class Noisy(torch.nn.Module):
    """Draws from the global generator, returns bytes, and shows the seed in the first pixel."""

    def forward(
        self, embedding: torch.Tensor, style: torch.Tensor, seed: torch.Tensor
    ) -> torch.Tensor:
        images = torch.randint(0, 256, [len(seed), 4, 4, 1]).to(torch.uint8)
        images[:, 0, 0, 0] = seed.to(torch.uint8)
        return images


def scripted(module: torch.nn.Module, path: Path) -> Path:
    """Save a module as a TorchScript file."""
    torch.jit.script(module.eval()).save(str(path))
    return path
