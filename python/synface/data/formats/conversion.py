"""Conversion of image sets from one format to another, with the images' bytes unchanged."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from .decode import DataError
from .images import FORMATS, Sample, open_images

if TYPE_CHECKING:  # it imports torch, which --help must not wait for
    from .image_set import ImageSet, LabeledImages


def convert(
    source: str | Path | LabeledImages,
    destination: str | Path,
    to: str,
    *,
    relabel: bool = False,
    shard_bytes: int = 1 << 29,
    progress: Callable[[int, int], None] | None = None,
) -> ImageSet:
    """Write a set of images in another format, without decoding or encoding any image again.

    Labels, identities' names and the order are preserved; but an image folder sorts identities by
    name, so its labels change where that was not their order. Images in memory are encoded as PNG.

    Args:
        source: a path for `open_images`, or a set.
        destination: a folder that does not exist yet. It is written atomically: under a temporary
            name beside it, and renamed at the end.
        to: "folder", "recordio", "webdataset", "parquet" or "arrow".
        relabel: see `open_images`.
        shard_bytes: size at which a new shard begins, for formats with shards.
        progress: called as progress(done, total) after each image.

    Returns:
        The set that was written, opened.

    Raises:
        FileExistsError: if the destination exists.
        DataError: for a source that cannot be read, and for data that the format cannot represent.
        ValueError: for an unknown format or a shard_bytes under 1.
        OSError: when writing fails, such as on a full disk.

    Memory: one image, or a group of rows in Parquet and Arrow (at most about 128 MiB).
    """
    if to not in FORMATS:
        raise ValueError(f"to must be one of {', '.join(FORMATS)}, got {to!r}")
    if shard_bytes < 1:
        raise ValueError(f"shard_bytes must be positive, got {shard_bytes}")
    destination = Path(destination)
    if os.path.lexists(destination):
        raise FileExistsError(f"{destination} exists already; choose another destination")
    images = open_images(source, relabel) if isinstance(source, str | Path) else source
    if not len(images):
        raise DataError(f"{images.source} holds no image")

    def samples() -> Iterator[Sample]:
        for done, sample in enumerate(images.samples(), 1):
            yield sample
            if progress is not None:
                progress(done, len(images))

    form = FORMATS[to]
    write = getattr(import_module(f".{form.module}", __package__), form.writer)
    destination.parent.mkdir(parents=True, exist_ok=True)
    # `tempfile` is not used: only the owner can access its folders, whatever the umask.
    partial = destination.with_name(f".{destination.name}-{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        write(partial, samples(), images.identities, shard_bytes)
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return open_images(destination)
