"""Arguments for face generators, generators in files, and the files of a folder."""

from pathlib import Path

import torch
import torch.nn.functional as F


def unit(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Return random unit rows."""
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)))


def arguments(
    count: int, dim: int, style: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return embeddings, styles and seeds for `FaceGenerator.generate`."""
    g = torch.Generator().manual_seed(seed + 1)
    return unit(count, dim, seed), torch.randn(count, style, generator=g), torch.arange(count)


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
