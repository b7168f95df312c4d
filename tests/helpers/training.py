"""Small training runs: configuration, images, and comparisons of their results."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from synface.training.config import TrainConfig

SMALL = TrainConfig(
    epochs=2,
    batch_size=11,  # 24 images: batches of 11, 11 and 2
    widths=(4, 8),
    depths=(1, 1),
    embedding_size=16,
    checkpoint_every=1,
)
# Settings of a step, by name.
STEPS: dict[str, dict[str, Any]] = {
    "dense": {},
    "clipped": {"clip_norm": 1.0, "accumulate": 2},
    "sampled": {"sample_rate": 0.9, "optimizer": "adamw"},
    "fused": {"fused_update": True},
    "sampled and fused": {"sample_rate": 0.9, "fused_update": True},
}
# The same backbone on the command line, without the widths.
TINY = ["--epochs", "1", "--batch-size", "8", "--size", "16x16", "--embedding-size", "8"]


def folder(root: Path, people: int = 5, images: int = 4, seed: int = 0) -> Path:
    """Write so many images of each of some people, one sub-folder a person."""
    random = np.random.default_rng(seed)
    for person in range(people):
        face = random.integers(0, 200, (20, 18))
        (root / f"p{person}").mkdir(parents=True)
        for i in range(images):
            pixels = (face + random.integers(0, 40, face.shape)).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"p{person}" / f"{i}.png")
    return root


def state(result) -> dict[str, torch.Tensor]:
    """Return all parameters and statistics of a trained model, as a checkpoint names them."""
    parts = {"backbone": result.backbone, "head": result.head}
    return {f"{name}.{k}": v for name, m in parts.items() for k, v in m.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Return whether two states have the same names and bits."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def largest_difference(a, b) -> float:
    """Return the largest difference of two trained models' parameters."""
    a, b = state(a), state(b)
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def score(shown: str) -> str:
    """Return the line of a command's output that has the verification's result."""
    return next(line for line in shown.splitlines() if line.startswith("ROC-AUC"))
