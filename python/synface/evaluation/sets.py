"""Readers of verification sets: insightface's .bin, LFW's pairs.txt, IJB's templates.

They need no torch, and execute nothing that a file holds.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..common.textfiles import read_text
from ..data.formats import decode
from ..data.formats.decode import DataError
from ..data.formats.images import MAX_BYTES, Files, PackedPaths, Store, natural_files
from . import safe_pickle

FOLDS = 10


class MemoryImages(Store):
    """Encoded images in memory, with their offsets in a file (-1: unknown)."""

    def __init__(self, source: str, images: list[bytes], offsets: NDArray[np.int64]) -> None:
        self.source, self.images, self.offsets = source, images, offsets

    def __len__(self) -> int:
        return len(self.images)

    def read(self, row: int) -> bytes:
        return self.images[row]

    def name(self, row: int) -> str:
        where = f", offset {self.offsets[row]}" if self.offsets[row] >= 0 else ""
        return f"{self.source}, image {row}{where}"

    def take(self, rows: NDArray[np.int64]) -> MemoryImages:
        return MemoryImages(self.source, [self.images[row] for row in rows], self.offsets[rows])

    def fingerprint(self) -> bytes:
        digest = sha256()
        for image in self.images:
            digest.update(sha256(image).digest())
        return digest.digest()


@dataclass(frozen=True, eq=False)
class PairSet:
    """Pairs of images, of the same or of different people.

    Attributes:
        name, source: for reports.
        store: of the encoded images.
        first, second: (P,) int64, indices of each pair's images.
        same: (P,) bool. fold: (P,) int64 in [0, F), the protocol's.
        people: (N,) int64, the person in each image; None if the set does not identify people.
    """

    name: str
    source: str
    store: Store
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    same: NDArray[np.bool_]
    fold: NDArray[np.int64]
    people: NDArray[np.int64] | None


@dataclass(frozen=True, eq=False)
class TemplateSet:
    """Templates, each a person's images from several media, and pairs of templates.

    Attributes:
        name, source: for reports.
        store: of the encoded images.
        template, media: (N,) int64, each image's: templates are numbered in [0, T), media as in the
            file.
        first, second: (P,) int64, the templates of each pair. same: (P,) bool.
        gallery, probe: (G, 2) and (Q, 2) int64, template and person, each template once; None
            without such lists.
    """

    name: str
    source: str
    store: Store
    template: NDArray[np.int64]
    media: NDArray[np.int64]
    first: NDArray[np.int64]
    second: NDArray[np.int64]
    same: NDArray[np.bool_]
    gallery: NDArray[np.int64] | None
    probe: NDArray[np.int64] | None


def open_set(path: str | Path, images: str | Path | None = None) -> PairSet | TemplateSet:
    """Open a verification set by its path.

    Args:
        path: insightface's ``.bin``; a list of pairs such as LFW's, or of lines "path path
            0-or-1" (``.txt``); or a folder with ``*tid_mid.txt`` and ``*template_pair_label.txt``,
            as of IJB-B and IJB-C.
        images: the folder of the images in a list; by default the list's own.

    Returns:
        The pairs, or templates and pairs of them; images are decoded when they are embedded.

    Raises:
        DataError: for an unreadable set, naming the file and the line or offset.
        ValueError: for ``images`` with a .bin, which holds its own.

    Memory: the lists; of a .bin, the file's size.
    """
    path = Path(path)
    if os.path.isdir(path):
        return read_templates(path, images)
    if not os.path.isfile(path):
        raise DataError(f"{path} does not exist; expected a .bin, a .txt of pairs or a folder")
    if path.suffix == ".bin":
        if images is not None:
            raise ValueError(f"{path} holds its images, got images={str(images)!r} too")
        return read_bin(path)
    if path.suffix == ".txt":
        return read_pairs(path, path.parent if images is None else images)
    raise DataError(f"{path} is not a verification set: expected .bin, .txt or a folder")


def read_bin(path: str | Path) -> PairSet:
    """Read insightface's verification set: a pickle of encoded images, two a pair, and booleans.

    The pickle is read as data (`safe_pickle.load`); pickles of Python 2 and NumPy arrays of images
    or booleans are read, too. The folds are ten consecutive runs of pairs.

    Raises:
        DataError: for a pickle of anything else, naming the file and offset.

    Memory: the file's size.
    """
    path = Path(path)
    value = safe_pickle.load(path)
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise DataError(f"{path} must hold two lists, of images and of booleans")
    parts: list[list[Any]] = []
    for content, of_what, what in zip(
        value, (_image, _boolean), ("images", "booleans"), strict=True
    ):
        try:
            parts.append(safe_pickle.items(content, of_what))
        except DataError as error:
            raise DataError(f"{path}, the list of {what}: {error}") from None
    images, same = parts
    if len(images) != 2 * len(same):
        raise DataError(
            f"{path} holds {len(images)} images for {len(same)} pairs, expected two each"
        )
    if not same:
        raise DataError(f"{path} holds no pair")
    first = np.arange(0, len(images), 2)
    offsets = np.array([getattr(image, "at", -1) for image in images], np.int64)
    store = MemoryImages(str(path), images, offsets)
    fold = _runs(len(same))
    return PairSet(path.stem, str(path), store, first, first + 1, np.array(same), fold, None)


def _image(value: Any) -> bytes:
    if isinstance(value, safe_pickle.Array) and value.dtype == safe_pickle.Dtype("u1"):
        value = value.items
    if not isinstance(value, bytes):
        raise DataError(f"expected the bytes of an image, got {type(value).__name__}")
    return value


def _boolean(value: Any) -> bool:
    array = value if isinstance(value, safe_pickle.Array) else None
    if array and array.shape == () and isinstance(array.items, bytes):
        value = int.from_bytes(array.items, "little")
    if not isinstance(value, int) or value not in (0, 1):
        raise DataError(f"expected a boolean, got {value!r:.50}")
    return bool(value)


def _runs(count: int) -> NDArray[np.int64]:
    """Return ten contiguous folds whose sizes differ by one at most, the larger ones first."""
    lengths = [len(part) for part in np.array_split(np.empty(count), FOLDS)]
    return np.repeat(np.arange(FOLDS), lengths)


def read_pairs(path: str | Path, images: str | Path) -> PairSet:
    """Read a list of pairs: LFW's, over a folder with a sub-folder per person, or of paths.

    LFW's first line gives the number of folds (1 if omitted) and of pairs of each kind in a fold.
    For each fold follow lines "name number number" of the same person and "name number name
    number" of two. Image 3 of Ann is ``Ann/Ann_0003.*``, ``Ann/3.*``, or the one face that an
    aligner cut from it, ``Ann/Ann_0003_0.*``.

    A list of paths has only lines "path path 1" of the same person and "path path 0" of two
    (separated by tabs, commas or spaces), relative to ``images``. It does not identify people. A
    list of one fold, or of paths, is divided into ten folds, each kind of pair separately.

    Raises:
        DataError: for a line of another form, too few lines, and missing images.
    """
    path, root = Path(path), Path(images)
    lines = read_text(path, DataError, MAX_BYTES).splitlines()
    head = lines[0].split() if lines else []
    if lines and _words(lines[0])[2:] in (["0"], ["1"]):
        return _read_paths(path, root, lines)
    if len(head) not in (1, 2) or not all(word.isdecimal() and len(word) < 9 for word in head):
        raise DataError(
            f"{path}, line 1: expected the numbers of folds and of pairs, or 'path path 0-or-1', "
            f"got {head}"
        )
    folds, each = (int(head[0]), int(head[1])) if len(head) == 2 else (1, int(head[0]))
    rows = [line.split("\t") if "\t" in line else line.split() for line in lines[1:]]
    while rows and not rows[-1]:
        rows.pop()
    if folds * each < 1 or len(rows) != 2 * folds * each:
        raise DataError(
            f"{path} has {len(rows)} pairs, its first line announces {folds} x 2 x {each}"
        )
    known: dict[str, dict[str, list[Path]]] = {}
    index: dict[Path, int] = {}
    people: dict[str, int] = {}
    owners: list[int] = []
    pairs = np.empty((len(rows), 2), np.int64)
    same = np.arange(len(rows)) % (2 * each) < each

    def image(name: str, number: str, line: int) -> int:
        if name not in known:
            known[name] = _stems(root, name)
        stems = (f"{name}_{number.zfill(4)}", number)
        files = next((known[name][stem] for stem in stems if stem in known[name]), [])
        if len(files) != 1:
            what = f"{len(files)} faces of" if files else "no"
            raise DataError(f"{path}, line {line}: {root / name} has {what} image {number}")
        file = files[0]
        if file not in index:
            index[file] = len(index)
            owners.append(people.setdefault(name, len(people)))
        return index[file]

    for i, row in enumerate(rows):
        line = i + 2
        if len(row) != (3 if same[i] else 4):
            form = "name number number" if same[i] else "name number name number"
            raise DataError(f"{path}, line {line}: expected {form!r}, got {' '.join(row)!r:.80}")
        first, second = (row[0], row[1]), (row[0], row[2]) if same[i] else (row[2], row[3])
        if not same[i] and first[0] == second[0]:
            raise DataError(f"{path}, line {line}: {row[0]!r:.80} twice, where people differ")
        for side, (name, number) in enumerate((first, second)):
            if not number.strip().isdecimal():
                raise DataError(f"{path}, line {line}: {number!r:.80} is not an image number")
            pairs[i, side] = image(name, number.strip(), line)
    fold = np.repeat(np.arange(folds), 2 * each)
    if folds == 1:
        fold = np.concatenate([_runs(each), _runs(each)])
    store = Files(PackedPaths.of(list(index)))
    owner = np.array(owners, np.int64)
    return PairSet(path.stem, str(path), store, pairs[:, 0], pairs[:, 1], same, fold, owner)


def _words(text: str) -> list[str]:
    """Return a line's paths and label; in lines with tabs or commas, spaces belong to a path."""
    separator = "\t" if "\t" in text else "," if text.count(",") == 2 else None
    return [word.strip() for word in text.split(separator)]


def _read_paths(path: Path, root: Path, lines: list[str]) -> PairSet:
    """Read a list of lines "path path 0-or-1"."""
    index: dict[Path, int] = {}
    rows: list[list[int]] = []
    for line, text in enumerate(lines, 1):
        words = _words(text)
        if words in ([], [""]):
            continue
        if len(words) != 3 or words[2] not in ("0", "1"):
            raise DataError(f"{path}, line {line}: expected 'path path 0-or-1', got {text!r:.80}")
        files = [_inside(root, name, f"{path}, line {line}") for name in words[:2]]
        for file in files:
            if file not in index and not os.path.isfile(file):
                raise DataError(
                    f"{path}, line {line}: {file} is not a file; are the images under another "
                    "folder (--images)?"
                )
            index.setdefault(file, len(index))
        rows.append([*(index[file] for file in files), int(words[2])])
    first, second, label = np.array(rows, np.int64).T.copy()
    same = label == 1
    fold = np.empty(len(rows), np.int64)
    for kind in (same, ~same):
        fold[kind] = _runs(int(kind.sum()))
    store = Files(PackedPaths.of(list(index)))
    return PairSet(path.stem, str(path), store, first, second, same, fold, None)


def _inside(root: Path, name: str, where: str) -> Path:
    """Return a path from an untrusted list; raise DataError unless it is inside of ``root``."""
    inside = Path(name)
    if inside.is_absolute() or ".." in inside.parts or "\0" in name:
        raise DataError(f"{where}: {name!r:.80} is not inside of {root}")
    return root / inside


def _stems(root: Path, name: str) -> dict[str, list[Path]]:
    """Return a person's images by their file names' stems, with and without leading zeros.

    Aligners append the number of the face, as in Ann_0001_0.png: the key is the image's stem.
    """
    if not name or name in (".", "..") or "/" in name or "\0" in name or len(name) > 250:
        raise DataError(f"{name!r:.80} cannot be the name of a person's folder in {root}")
    folder = root / name
    if not os.path.isdir(folder):
        raise DataError(f"{folder} is not a person's image folder; is it under another (--images)?")
    files = [f for f in decode.entries(folder) if f.suffix.lower() in decode.EXTENSIONS]
    stems: dict[str, list[Path]] = {}
    for file in files:
        image, _, face = file.stem.rpartition("_")
        if image and image != name and face.isdecimal():
            for stem in {image, image.lstrip("0") or "0"}:
                stems.setdefault(stem, []).append(file)
    stems |= {file.stem.lstrip("0") or "0": [file] for file in files}
    return stems | {file.stem: [file] for file in files}


def read_templates(folder: str | Path, images: str | Path | None = None) -> TemplateSet:
    """Read the IJB-style lists of a folder.

    ``*tid_mid.txt``: lines "image template media"; ``*template_pair_label.txt``: lines "template
    template 0-or-1"; optionally ``*gallery*.csv`` (one or more, merged) and ``*probe*.csv``: after
    a heading, lines that begin "template,person", one for each image of a template. The images
    must be aligned.

    Args:
        folder: of the lists. images: the folder of the images; None: ``folder``.

    Returns:
        Templates, pairs and, if there are lists of people, gallery and probes.

    Memory: the images' paths; measured, some 600 bytes an image while the lists are read, and 130
    after that. Images are decoded when they are embedded.

    Source: Whitelam et al., "IARPA Janus Benchmark-B", CVPRW 2017; Maze et al., "IARPA Janus
    Benchmark-C", ICB 2018.

    Raises:
        DataError: for missing or malformed lists, templates without images or of two people, a
            template both in a gallery and among the probes, and probes of a person who is in no
            gallery.
    """
    folder = Path(folder)
    root = folder if images is None else Path(images)
    listed = _only(folder, "tid_mid.txt")
    names: list[Path] = []
    numbers: list[tuple[int, int]] = []
    for line, text in enumerate(read_text(listed, DataError, MAX_BYTES).splitlines(), 1):
        words = text.rsplit(maxsplit=2)
        if len(words) != 3 or not all(w.isdecimal() and len(w) < 18 for w in words[1:]):
            raise DataError(
                f"{listed}, line {line}: expected image, template and media, got {text!r:.80}"
            )
        names.append(_inside(root, words[0], f"{listed}, line {line}"))
        numbers.append((int(words[1]), int(words[2])))
    if not names:
        raise DataError(f"{listed} is empty")
    tid, media = np.array(numbers, np.int64).T
    templates, template = np.unique(tid, return_inverse=True)
    pairs = _read_table(_only(folder, "template_pair_label.txt"), None, 3)
    if not np.isin(pairs[:, 2], (0, 1)).all():
        raise DataError(f"{folder}: a pair's label must be 0 or 1, got {set(pairs[:, 2]) - {0, 1}}")

    def rows(ids: NDArray[np.int64], what: str) -> NDArray[np.int64]:
        if len(lacking := np.setdiff1d(ids, templates)):
            raise DataError(f"{folder}: template {lacking[0]} of the {what} has no image")
        return np.searchsorted(templates, ids)

    listed_people: dict[int, tuple[int, Path]] = {}  # by template, with the list's file

    def people(word: str) -> NDArray[np.int64] | None:
        """Return (T, 2) templates and people of the lists, each template once."""
        files = [f for f in natural_files(folder, [".csv"]) if word in f.name.lower()]
        if not files:
            return None
        found: dict[int, int] = {}
        for file in files:
            for number, person in np.unique(_read_table(file, ",", 2), axis=0).tolist():
                known, where = listed_people.setdefault(number, (person, file))
                if known != person:
                    raise DataError(
                        f"{file}: template {number} is of person {person}, and of {known} "
                        + ("too" if where == file else f"in {where}")
                        + "; a template shows one person"
                    )
                found[number] = person
        table = np.array(sorted(found.items()), np.int64)
        return np.stack([rows(table[:, 0], word), table[:, 1]], 1)

    gallery, probe = people("gallery"), people("probe")
    if (gallery is None) != (probe is None):
        raise DataError(f"{folder} needs both or neither of *gallery*.csv and *probe*.csv")
    if gallery is not None and probe is not None:
        if len(both := np.intersect1d(gallery[:, 0], probe[:, 0])):
            raise DataError(
                f"{folder}: template {templates[both[0]]} is in a gallery and among the probes"
            )
        if not (known := np.isin(probe[:, 1], gallery[:, 1])).all():
            stranger = probe[~known][0]
            raise DataError(
                f"{folder}: template {templates[stranger[0]]} of the probes is of person "
                f"{stranger[1]}, who is in no gallery; list all galleries, or leave such probes out"
            )
    return TemplateSet(
        folder.name,
        str(folder),
        Files(PackedPaths.of(names)),
        template.astype(np.int64),
        media,
        rows(pairs[:, 0], "pairs"),
        rows(pairs[:, 1], "pairs"),
        pairs[:, 2] == 1,
        gallery,
        probe,
    )


def _only(folder: Path, ending: str) -> Path:
    found = natural_files(folder, [ending])
    if len(found) != 1:
        raise DataError(f"{folder} holds {len(found)} files *{ending}, expected one")
    return found[0]


def _read_table(file: Path, separator: str | None, columns: int) -> NDArray[np.int64]:
    """Return the first columns of a file of integers; with a separator, skip its heading."""
    try:
        table = np.loadtxt(
            file,
            np.int64,
            comments=None,
            delimiter=separator,
            skiprows=int(separator is not None),
            usecols=range(columns),
            ndmin=2,
            encoding="utf-8-sig",
        )
    except (ValueError, OverflowError, UnicodeError) as error:
        raise DataError(f"{file}: expected {columns} integers a line: {error}") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    if not len(table):
        raise DataError(f"{file} is empty")
    return table
