"""Image folders, read and written: one sub-folder of image files per identity."""

from __future__ import annotations

import os
import warnings
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from . import decode
from .decode import EXTENSIONS, DataError
from .images import Files, PackedPaths, Sample, ScanResult


def list_images(root: Path) -> ScanResult:
    """List the images of a folder as `image_set.list_folder` does, without checking the labels."""
    # os.path returns False where Path raises, if permission is missing.
    if not os.path.isdir(root):
        what = "is not a folder" if os.path.exists(root) else "does not exist or is not accessible"
        raise DataError(
            f"{root} {what}; expected a folder with one sub-folder of images per person"
        )
    inside = decode.entries(root)
    folders = [entry for entry in inside if os.path.isdir(entry)]
    loose = sum(e.suffix.lower() in EXTENSIONS and os.path.isfile(e) for e in inside)
    if len(folders) < 2:
        raise DataError(
            f"{root} holds {len(folders)} identity folders and {loose} images of its own; "
            "expected at least 2 sub-folders, one per person, with that person's images"
        )
    labels = array("q")
    wrong: dict[str, str] = {}
    skipped = Counter({"in no sub-folder": loose} if loose else {})

    def files() -> Iterator[str]:
        for number, folder in enumerate(folders):
            inside = decode.scan(folder)
            endings = [os.path.splitext(entry.name)[1].lower() for entry in inside]
            images = [e.path for e, end in zip(inside, endings, strict=True) if end in EXTENSIONS]
            others = Counter(end or "without ending" for end in endings if end not in EXTENSIONS)
            if nested := next((entry.name for entry in inside if _is_folder(entry)), None):
                wrong[str(folder)] = f"has the folder {nested!r} inside"
            elif not images:
                some = f": {_counted(others)}" if others else ""
                wrong[str(folder)] = f"has no image ({len(inside)} other files{some})"
            skipped.update(others)
            labels.extend([number] * len(images))
            yield from images

    paths = PackedPaths.of(files())
    decode.raise_if(
        wrong,
        f"of {len(folders)} identity folders in {root}",
        f"each to hold images ({' '.join(sorted(EXTENSIONS))}) and no folders",
    )
    if total := skipped.total():
        warnings.warn(
            f"{root}: {total:,} files are skipped ({_counted(skipped)}); images are read from "
            f"sub-folders, and end in {' '.join(sorted(EXTENSIONS))}; convert others to these",
            stacklevel=3,
        )
    names = [folder.name for folder in folders]
    return ScanResult(Files(paths), np.frombuffer(labels, np.int64), names)


def _counted(endings: Counter[str]) -> str:
    """Return the number of files of each suffix, as text."""
    common = [f"{count:,} {end}" for end, count in endings.most_common(decode.NAMED)]
    return ", ".join(common) + (", …" if len(endings) > decode.NAMED else "")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder; only a symbolic link needs a system call."""
    return os.path.isdir(entry) if entry.is_symlink() else entry.is_dir()


def write(folder: Path, samples: Iterable[Sample], identities: list[str], shard_bytes: int) -> None:
    """Write a sub-folder for each identity; images are numbered across the whole set.

    Raises:
        DataError: for an identity's name that is not a valid folder name.
    """
    del shard_bytes  # one file per image, without shards
    for name in identities:
        unfit = not name or name[0] == "." or not name.isprintable() or len(os.fsencode(name)) > 200
        if unfit or any(character in name for character in '/\\:*?"<>|'):
            raise DataError(f"the identity {name!r} is not a valid folder name")
    if len({name.casefold() for name in identities}) < len(identities):
        raise DataError("some identities' names differ only in case, as not all file systems do")
    for number, sample in enumerate(samples):
        person = folder / identities[sample.label]
        person.mkdir(exist_ok=True)
        (person / f"{number:08d}.{sample.extension}").write_bytes(sample.content)
