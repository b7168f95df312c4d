"""A picture of what each control of a face generator does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.rng import generator as draws
from ..common.rng import normals
from ..reporting.plots import check_matplotlib, image_grid
from .controls import controls_of, neutral_of
from .dataset import checked, styles
from .interface import FaceGenerator

COLUMNS = 9
REACH = 2.3  # standard deviations either way
SWEPT = 8  # a control with more numbers is swept along random directions
DIRECTIONS = 3
MOST = 100
RANDOM_SIZE = 64  # dimension of random identities, where the generator leaves it open


def preview(
    generator: FaceGenerator, embeddings: Tensor, path: str | Path, *, seed: int = 0
) -> None:
    """Draw a grid of images: identities, one person in random styles, and a sweep per control.

    Each number of a control has a row, in which it goes from −2.3 to 2.3 standard deviations while
    all others are neutral; a control of more than eight numbers has three random unit directions.

    Args:
        embeddings: (N, D) floating, not zero; the first nine are shown.
        path: the PNG file.
        seed: random seed of the styles and directions.

    Raises:
        ValueError: for embeddings of another size, zero or not finite, a file that is not .png or
            whose folder does not exist, and more than 100 numbers to sweep.
        OSError: for a file that cannot be written.
        ImportError: without matplotlib.
    """
    check_matplotlib()
    path = Path(path)
    if path.suffix.lower() != ".png" or not path.absolute().parent.is_dir():
        raise ValueError(f"preview must be a .png file in a folder that exists, got {path}")
    unit = checked(embeddings, generator.embedding_size)[1]
    neutral, count = neutral_of(generator), COLUMNS
    few = unit[torch.arange(count, device="cpu") % len(unit)]
    noise = torch.zeros(count, dtype=torch.int64, device="cpu")
    rows = [generator.generate(few, neutral.expand(count, -1), noise)]
    names = ["identity"]
    drawn = np.arange(count)
    for i in range(min(2, len(unit))):
        style, seeds = styles(seed, np.full(count, i), drawn, generator.style_size)
        rows.append(generator.generate(unit[i].expand(count, -1), style, seeds))
        names.append(f"all controls, {i + 1}")
    swept = torch.linspace(-REACH, REACH, count, dtype=torch.float32, device="cpu")[:, None]
    directions = _directions(generator, seed)
    for row, (name, direction) in enumerate(directions.items()):
        style = neutral * (direction == 0) + swept * direction
        rows.append(generator.generate(unit[row % len(unit)].expand(count, -1), style, noise))
        names.append(name)
    headings = [f"{x:+.1f}" for x in swept[:, 0].tolist()] if directions else []
    kind = generator.description.get("kind", type(generator).__name__)
    title = f"{kind}: identities, random styles"
    if directions:
        title += ", and one number at a time in standard deviations"
    image_grid([x.numpy() for x in rows], names, title, path, headings)


def random_identities(seed: int, dim: int = RANDOM_SIZE) -> Tensor:
    """Return (9, D) random identities to show, unit rows."""
    return F.normalize(normals((COLUMNS, dim), draws(seed, "identities", 0)))


def _directions(generator: FaceGenerator, seed: int) -> dict[str, Tensor]:
    """Return directions (S,) in the style by label: one per number, or a few random ones."""
    labels = getattr(generator, "numbers", {})
    found: dict[str, Tensor] = {}
    for control, columns in controls_of(generator).items():
        if len(columns) <= SWEPT:
            given = labels.get(control, [str(i + 1) for i in range(len(columns))])
            for label, column in zip(given, columns, strict=True):
                direction = torch.zeros(generator.style_size, dtype=torch.float32, device="cpu")
                direction[column] = 1.0
                found[f"{control}: {label}"] = direction
            if len(found) > MOST:
                raise ValueError(f"preview shows {MOST} numbers at most: group them in controls")
            continue
        random, _ = styles(seed, np.arange(DIRECTIONS), np.zeros(DIRECTIONS, int), len(columns))
        for i, numbers in enumerate(random):
            direction = torch.zeros(generator.style_size, dtype=torch.float32, device="cpu")
            direction[list(columns)] = F.normalize(numbers, dim=0)
            found[f"{control}: direction {i + 1}"] = direction
    return found
