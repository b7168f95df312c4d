"""Faces in memory, and the reader of image folders: one sub-folder per identity."""

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
from .decode import DataError, ImageFolder


@dataclass(frozen=True, eq=False)
class Faces:
    """A set of face images with their identities.

    Attributes:
        images: (N, H, W, C) uint8, C = 1 (grey) or 3 (RGB).
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
    path: str | Path | ImageFolder,
    size: tuple[int, int] | None = None,
    grey: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    memory_limit: int = 8 << 30,
) -> Faces:
    """Reads a folder that holds one sub-folder of images per identity.

    Identities and files come in natural order (s1, s2, ..., s10). Every image is decoded in full
    before this returns, turned by its EXIF orientation, stripped of alpha, converted, and resized
    (antialiased, the aspect ratio is not kept). Files of other extensions and hidden ones are
    ignored.

    Args:
        path: the folder, or what is left of one that was listed and split.
        size: (H, W) in pixels; None takes the first image's.
        grey: True for one channel, False for RGB; None is grey when every file is.
        progress: called as progress(done, total) after each decoded image.
        memory_limit: the most bytes that the decoded images may take together.

    Returns:
        The `Faces`, (N, H, W, 1 or 3) uint8.

    Raises:
        DataError: for a missing or empty folder, fewer than 2 identities, an identity without
            images or with folders inside, more than `memory_limit` bytes, and files that are
            unreadable, no image, truncated, over 2**26 pixels, or not of 8 bits per channel: every
            file is looked at, the first five bad ones are named.
        ValueError: if size or memory_limit makes no sense.

    Memory: N*H*W*C bytes, and one decoded file per thread (at most four).
    """
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size must be (height, width) in pixels, both at least 1, got {size}")
    if memory_limit < 1:
        raise ValueError(f"memory_limit must be a positive number of bytes, got {memory_limit}")
    folder = path if isinstance(path, ImageFolder) else decode.list_folder(path)
    files = folder.files

    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
    try:
        modes: list[str | None] = []
        wrong: dict[Path, str] = {}
        mode_of = decode.attempt(decode.mode)
        for file, (mode, problem) in zip(files, pool.map(mode_of, files), strict=True):
            modes.append(mode)
            if problem:
                wrong[file] = problem
        if grey is None:
            grey = all(mode in decode.GREY for mode in modes if mode)
        if size is None:
            # Only a file that decodes has a size; one that does not is an error below.
            whole = decode.attempt(decode.decode)
            decoded = (whole(file)[0] for file in files if file not in wrong)
            first = next((image for image in decoded if image is not None), None)
            size = (first.height, first.width) if first else (1, 1)

        shape = (len(files), *size, 1 if grey else 3)
        if (total := int(np.prod(shape, dtype=object))) > memory_limit:
            raise DataError(
                f"{folder.source}: {shape[0]} images of {shape[1]}x{shape[2]} pixels and "
                f"{shape[3]} channels take {total:,} bytes, over the memory limit of "
                f"{memory_limit:,}; ask for a smaller size"
            )
        images = np.empty(shape, np.uint8)

        def read(index: int) -> None:
            decode.read_into(images[index], files[index])

        good = [index for index, file in enumerate(files) if file not in wrong]
        for done, (_, problem) in enumerate(pool.map(decode.attempt(read), good)):
            if problem:
                wrong[files[good[done]]] = problem
            if progress is not None:
                progress(done + 1, len(good))
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the rest
    wrong = {file: wrong[file] for file in files if file in wrong}  # in the folder's order
    what = f"of {len(files)} images in {folder.source}"
    decode.raise_if(wrong, what, "readable, complete images")
    return Faces(
        torch.from_numpy(images), torch.from_numpy(folder.labels), folder.identities, folder.source
    )


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
