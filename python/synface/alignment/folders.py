"""Folders of photos, aligned to folders of faces of the same structure."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..common.extras import extra
from ..common.files import replacing, write_csv, write_text
from ..common.textfiles import parse_json, read_text
from ..data.formats.decode import EXTENSIONS, DataError, attempt, walk
from ..data.formats.images import open_regular
from .aligner import AlignedFace, Aligner
from .detector import describe
from .photos import read_open_photo
from .transform import template

if TYPE_CHECKING:
    from PIL import Image

RECORD, NOT_PLACED = "faces.jsonl", "not_placed.csv"
MAX_RECORD = 1 << 32  # bytes
MAX_LINE = 1 << 20  # bytes of the settings
REASONS = ["input", "reason"]  # the header of NOT_PLACED
FORMATS = {"png": "PNG", "jpg": "JPEG"}
CUT = re.compile(r'\{"input": "(?:[^"\\]|\\.)*", "output": "(?:[^"\\]|\\.)*"')  # of a row, cut off
ENDINGS = tuple(f".{format}" for format in FORMATS)
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

    Hidden files and the output folder are left out, and so is a link to a folder above it.

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
    real = os.path.realpath(output)
    for each in inputs:
        if each.is_dir():
            if os.path.realpath(each) == real:
                raise DataError(f"the output folder {output} must not be an input")
            for file, _ in walk(each, frozenset([real])):
                suffix = os.path.splitext(file)[1].lower()
                if suffix not in EXTENSIONS:
                    skipped[suffix or "without suffix"] += 1
                elif not os.path.isfile(file):
                    skipped["broken links or devices"] += 1
                else:
                    found.append((Path(file), Path(file).relative_to(each).as_posix()))
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
    names = {name for _, name in found}
    photos: dict[str, Photo] = {}
    for path, name in found:
        stem = str(PurePosixPath(name).with_suffix(""))
        if name in photos:
            raise DataError(
                f"{photos[name].path} and {path} would both be aligned as {name}; give them in "
                "separate calls, with another output"
            )
        # a.heic beside a.jpg keep their suffixes, and beside them a.jpg.png, whose stem is a.jpg.
        alone = stems[stem] == 1 and stem not in names
        photos[name] = Photo(path, name, stem if alone else name)
    return list(photos.values()), skipped


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
    out, not_placed.csv with their paths and the reasons. A call that was interrupted continues:
    photos whose faces exist are left as they are.

    Args:
        photos: of `find_photos`. output: the folder, which need not exist.
        aligner: finds and crops the faces.
        landmarks: (5, 2) by photo's name, in place of the detector; a photo without is left out.
        format: "png" or "jpg". quality: of JPEG, 1 to 100.
        overwrite: first remove the faces of these photos that exist.
        threads: photos that are decoded and aligned at a time.
        progress: called as progress(done, total) after each photo.

    Raises:
        DataError: for a folder with faces of other settings or landmarks that would remain, a
            picture in it that would be replaced and is not recorded, and a damaged record.
        OSError: if a file cannot be written.
        ValueError, TypeError, ImportError: as `Aligner`.

    Memory: per thread, 11 bytes for each pixel of a photo, at most 2**26 pixels, and the
        detector's; and 2 KB for each face of the record.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    several = landmarks is None and aligner.choose == "all"
    record = _Record(output, _settings_now(aligner, landmarks, format, quality), photos, overwrite)
    record.check_landmarks(landmarks or {})
    record.check_free(photos, format, several)
    reasons = _read_reasons(output / NOT_PLACED)
    output.mkdir(parents=True, exist_ok=True)
    record.start()
    outcome = Outcome()

    def place(photo: Photo) -> tuple[int, str | None] | None:
        if photo.name in record.placed:
            return None
        if landmarks is not None and photo.name not in landmarks:
            return 0, NO_LANDMARKS
        image, problem = attempt(_read)(photo.path)
        if problem:
            return 0, problem
        try:
            faces = [aligner.at(image, landmarks[photo.name])] if landmarks else aligner(image)
        except DataError as error:
            return 0, str(error)
        rows = []
        for i, face in enumerate(faces):
            name = f"{photo.stem}_{i}.{format}" if several else f"{photo.stem}.{format}"
            rows.append(_row(photo, name, face))
        record.append(photo.name, rows)
        for face, row in zip(faces, rows, strict=True):
            _write(output / row["output"], face, format, quality)
        return len(rows), None if rows else aligner.no_face

    pool = ThreadPoolExecutor(threads)
    try:
        for done, (photo, placed) in enumerate(zip(photos, pool.map(place, photos), strict=True)):
            count, problem = placed or (0, None)
            outcome.earlier += placed is None
            outcome.faces += count
            reasons.pop(path := os.path.abspath(photo.path), None)
            if problem:
                outcome.not_placed[str(photo.path)] = reasons[path] = problem
            if progress is not None:
                progress(done + 1, len(photos))
    finally:
        pool.shutdown(cancel_futures=True)
        record.write()
        if reasons:
            write_csv(output / NOT_PLACED, REASONS, reasons.items())
        else:
            (output / NOT_PLACED).unlink(missing_ok=True)
    return outcome


def _read(path: Path) -> Image.Image:
    with open_regular(path) as file:
        return read_open_photo(file)


def _settings_now(aligner: Aligner, landmarks: object, format: str, quality: int) -> dict[str, Any]:
    """Return all that decides on the faces of a photo but its landmarks, which rows have."""
    settings: dict[str, Any] = {
        "size": list(aligner.size),
        "margin": aligner.margin,
        "grayscale": aligner.grayscale,
        "faces": "given" if landmarks is not None else aligner.choose,
        "format": format,
    }
    if format == "jpg":
        settings["quality"] = quality
    if landmarks is None:
        settings["threshold"], settings["min_face"] = aligner.threshold, aligner.min_face
        settings["detector"] = describe(aligner.detector)
    return settings


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
        "landmarks": _rounded(face.landmarks),
    }


def _rounded(landmarks: NDArray[np.float64]) -> list[list[float]]:
    """Return landmarks as the record has them."""
    return [[round(x, 2), round(y, 2)] for x, y in landmarks.tolist()]


def _write(path: Path, face: AlignedFace, format: str, quality: int) -> None:
    """Write a face as a picture, atomically."""
    with extra("train", "writing faces"):
        from PIL import Image

    pixels = face.pixels[..., 0] if face.pixels.shape[2] == 1 else face.pixels
    options = {"quality": quality} if format == "jpg" else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        Image.fromarray(pixels).save(part, FORMATS[format], **options)


def _read_reasons(file: Path) -> dict[str, str]:
    """Return an earlier call's photos without a face that still exist, and the reasons."""
    if not file.exists():
        return {}
    try:
        with open_regular(file) as opened:
            text = io.TextIOWrapper(opened, "utf-8", "surrogateescape", newline="")
            header, *rows = csv.reader(text)
        if header != REASONS:
            raise ValueError(f"its header is {','.join(header)[:80]!r}")
        return {path: reason for path, reason in rows if os.path.exists(path)}
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(
            f"{file} is no list of photos without a face: {error}; choose another output"
        ) from error


class _Record:
    """The record of a folder's faces: a line of settings, and one for each face.

    A face is recorded before it is written, so a picture that is not recorded is somebody else's.

    Attributes:
        placed: names of the photos whose faces all exist.

    Args:
        folder: the output folder.
        settings: of the faces to be written.
        photos: those of this call. overwrite: drop their faces.

    Raises:
        DataError: for a damaged record, faces of other settings that are not dropped, and dropped
            ones that are photos of this call.
    """

    def __init__(
        self, folder: Path, settings: dict[str, Any], photos: Sequence[Photo], overwrite: bool
    ) -> None:
        self.folder, self.file, self.settings = folder, folder / RECORD, settings
        self._lock = Lock()
        earlier, rows = self._read()
        self.rows: dict[str, list[dict[str, Any]]] = {row["input"]: [] for row in rows}
        for row in rows:
            self.rows[row["input"]].append(row)
        called = {photo.name for photo in photos}
        for name, faces in self.rows.items():
            whole = [row for row in faces if "landmarks" in row]
            there = [row for row in whole if (folder / row["output"]).is_file()]
            if name in called and (overwrite or len(there) < len(faces)):
                there = []  # they are written anew
            self.rows[name] = there
        self.placed = {name for name, faces in self.rows.items() if faces}
        self._owners = {row["output"]: name for name in self.placed for row in self.rows[name]}
        self._dropped = {row["output"] for row in rows} - self._owners.keys()
        if self.placed and earlier != settings:
            raise DataError(self._other_settings(earlier or {}, self.placed - called, overwrite))
        given = {os.path.realpath(photo.path) for photo in photos} if self._dropped else set()
        for name in self._dropped:
            if os.path.realpath(folder / name) in given:
                raise DataError(
                    f"{folder / name} is a face of an earlier call, which would be removed; "
                    "choose another output"
                )
        for photo in photos:
            self.rows.setdefault(photo.name, [])

    def _read(self) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
        """Return the settings and the rows; an interruption may have cut the last line short.

        Of a line that was cut, there are at most the input and the output.
        """
        if not self.file.exists():
            return None, []
        try:
            first, *rest, cut = read_text(self.file, DataError, MAX_RECORD).split("\n")
            if found := CUT.match(cut):  # its picture may exist all the same
                rest.append(f"{found[0]}}}")
            rows = [parse_json(line) for line in rest]
            for row in rows:
                output = PurePosixPath(row["output"])
                if not isinstance(row["input"], str):
                    raise TypeError("an input is not text")
                # Outputs may be removed, so they must be pictures in the folder.
                if output.is_absolute() or ".." in output.parts or output.suffix not in ENDINGS:
                    raise ValueError(f"{str(output)!r} is no picture in the folder")
            return _settings(first), rows
        except (ValueError, TypeError, KeyError) as error:
            raise _damaged(self.file, error) from error

    def _other_settings(self, earlier: dict[str, Any], left: set[str], overwrite: bool) -> str:
        """Return the message about faces of other settings, some perhaps of photos not given."""
        names = [*dict.fromkeys([*earlier, *self.settings])]
        changed = ", ".join(
            f"{name} {earlier.get(name)}, now {self.settings.get(name)}"
            for name in names
            if earlier.get(name) != self.settings.get(name)
        )
        hint = "or --overwrite"
        if left:
            among = "which is not among those given"
            hint += f" with all of its photos, such as {min(left)}, {among}" if overwrite else ""
        return (
            f"{self.folder} has faces of other settings ({changed}); choose another output, {hint}"
        )

    def check_landmarks(self, landmarks: Mapping[str, NDArray[np.float64]]) -> None:
        """Raise DataError if a face that is left as it is has other landmarks than those given."""
        for name in self.placed & landmarks.keys():
            came, now = self.rows[name][0]["landmarks"], _rounded(landmarks[name])
            if came != now:
                raise DataError(
                    f"{self.folder} has a face of {name} by other landmarks ({came}, now {now}); "
                    "choose another output, or --overwrite"
                )

    def check_free(self, photos: Sequence[Photo], format: str, several: bool) -> None:
        """Raise DataError if a picture that a face may replace is no dropped one."""
        photos = [photo for photo in photos if photo.name not in self.placed]
        names = {photo.stem: [f"{photo.stem}.{format}"] for photo in photos}
        if several:
            names = {stem: [] for stem in names}
            for folder in {PurePosixPath(stem).parent for stem in names}:
                there = self.folder / folder
                for file in sorted(os.listdir(there)) if there.is_dir() else ():
                    numbered = re.fullmatch(rf"(.+)_(?:0|[1-9][0-9]*)\.{format}", file, re.DOTALL)
                    if numbered and (stem := str(folder / numbered[1])) in names:
                        names[stem].append(str(folder / file))
        for name in chain.from_iterable(names.values()):
            if os.path.lexists(self.folder / name) and name not in self._dropped:
                owner = self._owners.get(name)
                what = "no face of an earlier call" if owner is None else f"the face of {owner}"
                raise DataError(
                    f"{self.folder / name} exists, and is {what}; choose another output"
                )

    def start(self) -> None:
        """Remove the pictures of dropped faces, and write the other lines."""
        for name in self._dropped:
            (self.folder / name).unlink(missing_ok=True)
        self.write()

    def write(self) -> None:
        """Write all lines, those of this call's photos in their order."""
        rows = chain.from_iterable(self.rows.values())
        lines = [json.dumps({"settings": self.settings}), *map(json.dumps, rows)]
        write_text(self.file, "".join(f"{line}\n" for line in lines))

    def append(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Add a photo's faces, whose pictures are written next."""
        with self._lock, self.file.open("a", encoding="utf-8") as lines:
            self.rows[name] = rows
            lines.write("".join(f"{json.dumps(row)}\n" for row in rows))
