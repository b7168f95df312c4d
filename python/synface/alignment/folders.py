"""Folders of photos, aligned to folders of faces of the same structure."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..common.extras import extra
from ..common.files import replacing, write_text
from ..common.textfiles import parse_json, read_text
from ..data.formats.decode import EXTENSIONS, DataError, attempt, scan
from ..data.formats.images import open_regular
from .aligner import AlignedFace, Aligner
from .photos import read_photo
from .transform import template

RECORD, NOT_PLACED = "faces.jsonl", "not_placed.csv"
MAX_RECORD = 1 << 32  # bytes
MAX_LINE = 1 << 20  # bytes of the settings
FORMATS = {"png": "PNG", "jpg": "JPEG"}
NO_LANDMARKS = "no landmarks given"


class Photo(NamedTuple):
    """A photo to align.

    Attributes:
        path: of its file. name: its path relative to the input folder, or the input file's name.
        stem: the path of its faces without suffix, relative to the output folder.
    """

    path: Path
    name: str
    stem: str


@dataclass
class Outcome:
    """The result of `align_photos`.

    Attributes:
        faces: number of faces written. earlier: number of photos whose faces existed.
        not_placed: the reason, by photo, of those without a face.
    """

    faces: int = 0
    earlier: int = 0
    not_placed: dict[str, str] = field(default_factory=dict)


def find_photos(inputs: Sequence[Path], output: Path) -> tuple[list[Photo], Counter[str]]:
    """List photos in files and in folders, recursively, in natural order.

    Hidden files, folders behind symbolic links, and the output folder are left out.

    Args:
        inputs: files and folders. output: folder of the faces.

    Returns:
        The photos, and the number of other files by suffix.

    Raises:
        DataError: for an input that does not exist or is the output, inputs without a photo, and
            two photos of one name.
    """
    skipped: Counter[str] = Counter()
    found: list[tuple[Path, str]] = []
    for each in inputs:
        if each.is_dir():
            if os.path.realpath(each) == os.path.realpath(output):
                raise DataError(f"the output folder {output} must not be an input")
            found += [(p, p.relative_to(each).as_posix()) for p in _walk(each, output, skipped)]
        elif each.is_file():
            found.append((each, each.name))
        else:
            what = "is neither a file nor a folder" if each.exists() else "does not exist"
            raise DataError(f"{each} {what} or is not accessible; expected photos")
    if not found:
        raise DataError(
            f"no photo in {', '.join(map(str, inputs))}; expected files that end in "
            f"{', '.join(sorted(EXTENSIONS))}"
        )
    stems = Counter(str(PurePosixPath(name).with_suffix("")) for _, name in found)
    photos: dict[str, Photo] = {}
    for path, name in found:
        stem = str(PurePosixPath(name).with_suffix(""))
        if name in photos:
            raise DataError(
                f"{photos[name].path} and {path} would both be aligned as {name}; give them in "
                "separate calls, with another output"
            )
        # a.heic beside a.jpg: both keep their suffix
        photos[name] = Photo(path, name, stem if stems[stem] == 1 else name)
    return list(photos.values()), skipped


def _walk(folder: Path, output: Path, skipped: Counter[str]) -> Iterator[Path]:
    """Yield the photos of a folder, and count its other files."""
    for entry in scan(folder):
        if entry.is_dir(follow_symlinks=False):
            if os.path.realpath(entry.path) != os.path.realpath(output):
                yield from _walk(Path(entry.path), output, skipped)
        elif entry.is_file():
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix in EXTENSIONS:
                yield Path(entry.path)
            else:
                skipped[suffix or "without suffix"] += 1


def align_photos(
    photos: Sequence[Photo],
    output: Path,
    aligner: Aligner,
    *,
    landmarks: Mapping[str, NDArray[np.float64]] | None = None,
    format: str = "png",
    quality: int = 95,
    overwrite: bool = False,
    threads: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Write the faces of photos to a folder, and a record of them.

    The folder gets a picture per face at the photo's relative path (with _0, _1 … if the aligner
    chooses all), faces.jsonl, a line for the settings and one per face, and, if photos are left
    out, not_placed.csv with their names and the reasons. A call that was interrupted continues:
    photos whose faces exist are left as they are.

    Args:
        photos: of `find_photos`. output: the folder, which need not exist.
        aligner: finds and crops the faces.
        landmarks: (5, 2) by photo's name, in place of the detector; a photo without is left out.
        format: "png" or "jpg". quality: of JPEG, 1 to 100.
        overwrite: write faces anew that exist.
        threads: photos that are decoded and aligned at a time.
        progress: called as progress(done, total) after each photo.

    Raises:
        DataError: for a folder that was written with other settings, and a picture in it that would
            be replaced and is not of an earlier call.
        OSError: if a file cannot be written.
        ValueError, TypeError, ImportError: as `Aligner`.

    Memory: a decoded photo per thread, at most 2**26 pixels each.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    settings = {
        "size": list(aligner.size),
        "margin": aligner.margin,
        "grayscale": aligner.grayscale,
        "faces": aligner.choose if landmarks is None else "given",
        "format": format,
    }
    several = landmarks is None and aligner.choose == "all"
    ours = overwrite or (output / RECORD).exists()
    for photo in photos:
        file = output / f"{photo.stem}{'_0' * several}.{format}"
        if file.exists() and (not ours or file.samefile(photo.path)):
            raise DataError(
                f"{file} exists, and is no face of an earlier call; choose another output"
            )
    output.mkdir(parents=True, exist_ok=True)
    record = _Record(output, settings, {photo.name for photo in photos} if overwrite else set())
    outcome = Outcome()

    def place(photo: Photo) -> tuple[list[dict[str, Any]], str | None] | None:
        if photo.name in record.placed:
            return None
        if landmarks is not None and photo.name not in landmarks:
            return [], NO_LANDMARKS
        image, problem = attempt(read_photo)(photo.path)
        if problem:
            return [], problem
        try:
            faces = [aligner.at(image, landmarks[photo.name])] if landmarks else aligner(image)
        except DataError as error:
            return [], str(error)
        rows = []
        for i, face in enumerate(faces):
            name = f"{photo.stem}_{i}.{format}" if several else f"{photo.stem}.{format}"
            _write(output / name, face, format, quality)
            rows.append(_row(photo, name, face))
        return rows, None if rows else aligner.no_face

    pool = ThreadPoolExecutor(threads)
    try:
        for done, (photo, placed) in enumerate(zip(photos, pool.map(place, photos), strict=True)):
            if placed is None:
                outcome.earlier += 1
            else:
                rows, problem = placed
                record.append(rows)
                outcome.faces += len(rows)
                if problem:
                    outcome.not_placed[str(photo.path)] = problem
            if progress is not None:
                progress(done + 1, len(photos))
    finally:
        pool.shutdown(cancel_futures=True)
        _write_reasons(output / NOT_PLACED, outcome.not_placed)
    return outcome


def settings_of(folder: Path) -> dict[str, Any] | None:
    """Return the settings that the faces of a folder were aligned with.

    Args:
        folder: an output of `align_photos`.

    Returns:
        The settings by name, among them "size" (H, W), "margin" and "grayscale", as `Aligner` takes
        them; None for a folder without a record of aligned faces.

    Raises:
        DataError: for a record that cannot be read, or is damaged.
    """
    file = folder / RECORD
    if not os.path.lexists(file):
        return None
    try:
        with open_regular(file) as opened:
            settings = _settings(opened.readline(MAX_LINE))
        size, margin, gray = (settings[name] for name in ("size", "margin", "grayscale"))
        template(size, margin)
        if not isinstance(gray, bool):
            raise TypeError(f"grayscale must be true or false, got {gray!r}")
        return settings | {"size": tuple(size)}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(file, error) from error


def _settings(line: str | bytes) -> dict[str, Any]:
    """Return the settings in the first line of a record; raise as parsers do."""
    settings = parse_json(line)["settings"]
    if not isinstance(settings, dict):
        raise TypeError(f"settings must be an object, got {type(settings).__name__}")
    return settings


def _damaged(file: Path, error: Exception) -> DataError:
    return DataError(
        f"{file} is not a record of aligned faces: {error}; expected what synface align writes"
    )


def _row(photo: Photo, output: str, face: AlignedFace) -> dict[str, Any]:
    """Return a face's line of the record."""
    box = None if face.box is None else [round(x, 2) for x in face.box.tolist()]
    return {
        "input": photo.name,
        "output": output,
        "score": None if face.score is None else round(face.score, 4),
        "box": box,
        "landmarks": [[round(x, 2), round(y, 2)] for x, y in face.landmarks.tolist()],
    }


def _write(path: Path, face: AlignedFace, format: str, quality: int) -> None:
    """Write a face as a picture, atomically."""
    with extra("train", "writing faces"):
        from PIL import Image

    pixels = face.pixels[..., 0] if face.pixels.shape[2] == 1 else face.pixels
    options = {"quality": quality} if format == "jpg" else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        Image.fromarray(pixels).save(part, FORMATS[format], **options)


def _write_reasons(file: Path, not_placed: Mapping[str, str]) -> None:
    """Write the photos without a face, or remove the file of an earlier call."""
    if not not_placed:
        file.unlink(missing_ok=True)
        return
    with (
        replacing(file) as part,
        part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as f,
    ):
        rows = csv.writer(f)
        rows.writerow(["input", "reason"])
        rows.writerows(not_placed.items())


class _Record:
    """The record of a folder's faces: a line of settings, and one for each face.

    Attributes:
        placed: names of the photos whose faces all exist.

    Args:
        folder: the output folder.
        settings: must be those of the existing record, unless photos are redone.
        redone: names of photos whose lines are dropped.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], redone: set[str]) -> None:
        self.folder, self.file = folder, folder / RECORD
        earlier, rows = self._read()
        if earlier not in (None, settings) and not redone:
            raise DataError(
                f"{folder} has faces of other settings ({_listed(earlier)}), now "
                f"({_listed(settings)}); choose another output, or --overwrite"
            )
        redone |= {row["input"] for row in rows if not (folder / row["output"]).is_file()}
        rows = [row for row in rows if row["input"] not in redone]
        self.placed = {row["input"] for row in rows}
        lines = [json.dumps({"settings": settings}), *map(json.dumps, rows)]
        write_text(self.file, "".join(f"{line}\n" for line in lines))

    def _read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """Return the settings and the rows; an interruption may have cut the last line short."""
        if not self.file.exists():
            return None, []
        try:
            first, *rest = read_text(self.file, DataError, MAX_RECORD).split("\n")[:-1]
            rows = [parse_json(line) for line in rest]
            if not all(isinstance(row["input"] + row["output"], str) for row in rows):
                raise TypeError("an input or output is not text")
            return _settings(first), rows
        except (ValueError, TypeError, KeyError) as error:
            raise _damaged(self.file, error) from error

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a photo's faces, whose pictures are written."""
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write("".join(f"{json.dumps(row)}\n" for row in rows))


def _listed(settings: Any) -> str:
    with contextlib.suppress(AttributeError):
        return ", ".join(f"{name} {value}" for name, value in settings.items())
    return str(settings)
