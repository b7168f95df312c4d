"""A reader that loads an image set of any format into memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ...common.renamed import old_keywords
from . import decode
from .decode import DataError
from .image_set import Faces, LabeledImages, check_size
from .images import open_images


@old_keywords(grey="grayscale")  # codespell:ignore grey
def read_folder(
    path: str | Path | LabeledImages,
    size: tuple[int, int] | None = None,
    grayscale: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
    memory_limit: int = 8 << 30,
) -> Faces:
    """Read a folder that holds one sub-folder of images per identity, or any other set of images.

    A folder's identities and files are read in natural order (s1, s2, ..., s10); files of other
    extensions are skipped with a warning, hidden ones without. Every image is decoded in full
    before this returns, turned by its EXIF orientation, stripped of alpha, converted, and resized
    (antialiased, the aspect ratio changes).

    Args:
        path: the folder, another path that `open_images` accepts, or an image set.
        size: (H, W) in pixels; None takes the first image's.
        grayscale: True for one channel, False for RGB; None: grayscale if every image is.
        progress: called as progress(done, total) after each decoded image.
        memory_limit: maximum size of all decoded images, in bytes.

    Returns:
        The `Faces`, (N, H, W, 1 or 3) uint8.

    Raises:
        DataError: for a missing or empty folder, fewer than 2 identities, an identity without
            images or with folders inside, anything else that `open_images` rejects, more than
            `memory_limit` bytes, and images that are unreadable, truncated, over 2**26 pixels, not
            of 8 bits per channel, or not of the size that the format declares: all are checked, and
            the first five bad ones are named.
        ValueError: for an invalid size or memory_limit.

    Memory: N*H*W*C bytes, and one decoded file per thread (at most four).
    """
    check_size(size)
    if memory_limit < 1:
        raise ValueError(f"memory_limit must be a positive number of bytes, got {memory_limit}")
    listed = path if isinstance(path, LabeledImages) else open_images(path)
    store, count = listed.store, len(listed)
    pool = ThreadPoolExecutor(1 if store.streams else min(4, os.cpu_count() or 1))
    try:
        modes: list[str | None] = []
        wrong: dict[int, str] = {}
        for index, (found, problem) in enumerate(
            pool.map(decode.attempt(store.mode), range(count))
        ):
            modes.append(found)
            if problem:
                wrong[index] = problem
        if grayscale is None:
            grayscale = all(found in decode.GRAYSCALE for found in modes if found)
        if size is None:
            # Only an image that decodes has a size; one that does not is an error below.
            sizes = map(decode.attempt(store.size_of), (i for i in range(count) if i not in wrong))
            size = next((found for found, _ in sizes if found is not None), (1, 1))

        shape = (count, *size, 1 if grayscale else 3)
        if (total := int(np.prod(shape, dtype=object))) > memory_limit:
            raise DataError(
                f"{listed.source}: {shape[0]} images of {shape[1]}x{shape[2]} pixels and "
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
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for pending images
    named = {listed.name(index): wrong[index] for index in sorted(wrong)}
    what = f"of {count} images in {listed.source}"
    decode.raise_if(named, what, "readable, complete images")
    labels = torch.as_tensor(listed.labels, device="cpu")
    return Faces(torch.from_numpy(images), labels, listed.identities, listed.source)
