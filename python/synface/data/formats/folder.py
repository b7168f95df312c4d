"""Faces in memory, and the reader of sets of images into it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import decode
from .decode import DataError
from .images import ImageSet, open_images


@dataclass(frozen=True, eq=False)
class Faces:
    """A set of face images with their identities.

    Attributes:
        images: (N, H, W, C) uint8, C = 1 (grayscale) or 3 (RGB).
        labels: (N,) int64 in [0, len(identities)).
        identities: the name of each label.
        source: where the images come from, for reports.

    Raises:
        ValueError: for another dtype or shape, or a label out of range.
    """

    images: Tensor
    labels: Tensor
    identities: list[str]
    source: str

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise ValueError(
                "images must be uint8 of shape (N, H, W, 1) or (N, H, W, 3), "
                f"got {_kind(images)} {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels must be int64 of shape ({len(images)},), "
                f"got {_kind(labels)} {tuple(labels.shape)}"
            )
        if len(labels) and (labels.min() < 0 or labels.max() >= len(self.identities)):
            raise ValueError(
                f"labels must lie in [0, {len(self.identities)}), "
                f"got {int(labels.min())} to {int(labels.max())}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def split(self, holdout: int) -> tuple[Faces, Faces]:
        """Splits by identity: all but the last `holdout`, and the last `holdout`.

        Labels of both sets start at 0; with holdout 0 the second set is empty.

        Raises:
            ValueError: if holdout is negative, or leaves fewer than 2 identities in the first set.
        """
        kept = decode.keep(len(self.identities), holdout)
        first, second = self.labels < kept, self.labels >= kept
        return (
            Faces(self.images[first], self.labels[first], self.identities[:kept], self.source),
            Faces(
                self.images[second],
                self.labels[second] - kept,
                self.identities[kept:],
                self.source,
            ),
        )


def read_folder(
    path: str | Path | ImageSet,
    size: tuple[int, int] | None = None,
    grayscale: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    memory_limit: int = 8 << 30,
) -> Faces:
    """Reads a folder that holds one sub-folder of images per identity, or any other set of images.

    Of a folder, identities and files come in natural order (s1, s2, ..., s10), and files of other
    extensions are skipped with a warning, hidden ones without. Every image is decoded in full
    before this returns, turned by its EXIF orientation, stripped of alpha, converted, and resized
    (antialiased, the aspect ratio is not kept).

    Args:
        path: the folder, or what else `open_images` takes or gave, also after a split.
        size: (H, W) in pixels; None takes the first image's.
        grayscale: True for one channel, False for RGB; None is grayscale when every image is.
        progress: called as progress(done, total) after each decoded image.
        memory_limit: the most bytes that the decoded images may take together.

    Returns:
        The `Faces`, (N, H, W, 1 or 3) uint8.

    Raises:
        DataError: for a missing or empty folder, fewer than 2 identities, an identity without
            images or with folders inside, whatever else `open_images` refuses, more than
            `memory_limit` bytes, and images that are unreadable, truncated, over 2**26 pixels, not
            of 8 bits per channel, or of another size than their format says: every one is looked
            at, the first five bad ones are named.
        ValueError: if size or memory_limit makes no sense.

    Memory: N*H*W*C bytes, and one decoded file per thread (at most four).
    """
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size must be (height, width) in pixels, both at least 1, got {size}")
    if memory_limit < 1:
        raise ValueError(f"memory_limit must be a positive number of bytes, got {memory_limit}")
    images_of = path if isinstance(path, ImageSet) else open_images(path)
    store, count = images_of.store, len(images_of)

    def mode(index: int) -> str:
        with store.open(index) as file:
            return decode.mode(file)

    pool = ThreadPoolExecutor(1 if store.streams else min(4, os.cpu_count() or 1))
    try:
        modes: list[str | None] = []
        wrong: dict[int, str] = {}
        for index, (found, problem) in enumerate(pool.map(decode.attempt(mode), range(count))):
            modes.append(found)
            if problem:
                wrong[index] = problem
        if grayscale is None:
            grayscale = all(found in decode.GRAYSCALE for found in modes if found)
        if size is None:
            # Only an image that decodes has a size; one that does not is an error below.
            whole = decode.attempt(store.size_of)
            sizes = (whole(index)[0] for index in range(count) if index not in wrong)
            size = next((found for found in sizes if found is not None), (1, 1))

        shape = (count, *size, 1 if grayscale else 3)
        if (total := int(np.prod(shape, dtype=object))) > memory_limit:
            raise DataError(
                f"{images_of.source}: {shape[0]} images of {shape[1]}x{shape[2]} pixels and "
                f"{shape[3]} channels take {total:,} bytes, over the memory limit of "
                f"{memory_limit:,}; ask for a smaller size"
            )
        images = np.empty(shape, np.uint8)

        def read(index: int) -> None:
            store.read_into(images[index], index)

        good = [index for index in range(count) if index not in wrong]
        for done, (_, problem) in enumerate(pool.map(decode.attempt(read), good)):
            if problem:
                wrong[good[done]] = problem
            if progress is not None:
                progress(done + 1, len(good))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the rest
    named = {images_of.name(index): wrong[index] for index in sorted(wrong)}
    what = f"of {count} images in {images_of.source}"
    decode.raise_if(named, what, "readable, complete images")
    return Faces(
        torch.from_numpy(images),
        torch.from_numpy(images_of.labels),
        images_of.identities,
        images_of.source,
    )


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
