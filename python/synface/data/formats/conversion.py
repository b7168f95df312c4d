"""From one format of image sets to another, the images' bytes as they are."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

from .decode import DataError
from .images import FORMATS, ImageSet, Sample, open_images


def convert(
    source: str | Path | ImageSet,
    destination: str | Path,
    to: str,
    *,
    relabel: bool = False,
    shard_bytes: int = 1 << 29,
    progress: Callable[[int, int], None] | None = None,
) -> ImageSet:
    """Writes a set of images in another format. No image is decoded or encoded again.

    Labels, their identities' names and the order stay; but an image folder orders identities by
    name, so its labels are others where that was not their order.

    Args:
        source: what `open_images` takes, or gave.
        destination: a folder that does not exist yet. It is written under another name beside this
            one and renamed at the end: it is there as a whole or not at all.
        to: "folder", "recordio", "webdataset", "parquet" or "arrow".
        relabel: see `open_images`.
        shard_bytes: after which another shard is begun, where the format has some.
        progress: called as progress(done, total) after each image.

    Returns:
        The set that was written, opened.

    Raises:
        FileExistsError: if the destination exists.
        DataError: for a source that cannot be read, and for what the format cannot hold.
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
    images = source if isinstance(source, ImageSet) else open_images(source, relabel)
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
    # Not by `tempfile`, whose folders are for their owner alone, whatever the umask.
    partial = destination.with_name(f".{destination.name}-{secrets.token_hex(4)}.partial")
    partial.mkdir()
    try:
        write(partial, samples(), images.identities, shard_bytes)
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return open_images(destination)
