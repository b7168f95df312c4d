"""Folders of small images, and damage to them."""

from pathlib import Path

import numpy as np
from PIL import Image


def folder(root: Path, people: int, each: int, seed: int, mode: str = "L") -> Path:
    """Write PNG files of differing sizes, `each` for every person."""
    random = np.random.default_rng(seed)
    for person in range(people):
        (root / f"p{person}").mkdir(parents=True)
        for i in range(each):
            shape = (20 + i, 18 + person) if mode == "L" else (20 + i, 18 + person, 3)
            pixels = random.integers(0, 256, shape, np.uint8)
            Image.fromarray(pixels).save(root / f"p{person}" / f"{i}.png")
    return root


def truncate(file: Path) -> None:
    """Cut the last bytes off a file."""
    file.write_bytes(file.read_bytes()[:-60])
