"""insightface's RecordIO, read and written: train.rec, train.idx and property, framed as by MXNet.

A record is a magic number, a word that holds its kind (3 bits) and length (29 bits), that many
bytes and a padding to 4. Where the magic number occurs in the bytes at a multiple of 4, the writer
left it out and began another part. The bytes are a header (flag, float32 label, two 64-bit
numbers), `flag` float32 labels, and the image. insightface's record 0 has no image, and two labels:
one more than the number of images, and one more than the last key of the records that follow them,
of which each gives the range of images of an identity.

Source: dmlc-core, `include/dmlc/recordio.h`; MXNet, `python/mxnet/recordio.py`; insightface,
`recognition/arcface_torch/dataset.py`.
"""

from __future__ import annotations

import json
import os
import struct
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from . import decode
from .decode import DataError
from .images import (
    IDENTITIES,
    MAX_BYTES,
    FileRanges,
    PackedPaths,
    Sample,
    ScanResult,
    natural_files,
    read_at_most,
    read_names,
    read_range,
)

MAGIC = struct.pack("<I", 0xCED7230A)
WHOLE, FIRST, MIDDLE, LAST = range(4)  # kinds of parts
FRAME, HEADER = struct.Struct("<II"), struct.Struct("<IfQQ")
MAX_PART = (1 << 29) - 1
EXACT = 1 << 24  # float32 holds the integers up to here
BOM = b"\xef\xbb\xbf"  # byte order mark, which some editors add
AT_ONCE = 1 << 12  # headers per batch


class Records(FileRanges):
    """The images of a .rec file; `size` is -1 for records of several parts, read from `begin`."""

    def read(self, row: int) -> bytes:
        if self.size[row] >= 0:
            return super().read(row)
        with self.files[0].open("rb") as file:
            return _unpack(_record(file, int(self.begin[row])))[1]


def _record(file: BinaryIO, begin: int) -> bytes:
    """Return a record's payload, joined from its parts.

    Raises:
        OSError: for wrong framing, a record cut short, and one over MAX_BYTES.
    """
    file.seek(begin)
    parts: list[bytes] = []
    total = 0
    while True:
        at = file.tell()
        kind, size = _part(file.read(FRAME.size), at, bool(parts))
        total += size + 4
        if total > MAX_BYTES:
            raise OSError(f"a record over the limit of {MAX_BYTES:,} bytes")
        parts.append(read_range(file, file.tell(), size))
        file.seek(-size % 4, os.SEEK_CUR)
        if kind in (WHOLE, LAST):
            return MAGIC.join(parts)


def _part(frame: bytes, at: int, inside: bool) -> tuple[int, int]:
    """Return a part's kind and length; `inside` tells whether it continues a record.

    Raises:
        OSError: for wrong framing.
    """
    if len(frame) < FRAME.size or frame[:4] != MAGIC:
        raise OSError(f"no record begins at offset {at}")
    word = FRAME.unpack_from(frame)[1]
    kind, size = word >> 29, word & MAX_PART
    if kind not in ((MIDDLE, LAST) if inside else (WHOLE, FIRST)):
        raise OSError(f"the part at offset {at} is of kind {kind}, out of order")
    return kind, size


def _unpack(record: bytes) -> tuple[NDArray[np.float32], bytes]:
    """Return a record's labels and image.

    Raises:
        OSError: for a record that is too short.
    """
    if len(record) < HEADER.size:
        raise OSError(f"a record of {len(record)} bytes, expected at least {HEADER.size}")
    flag, single, _, _ = HEADER.unpack_from(record)
    end = HEADER.size + 4 * flag
    if len(record) < end:
        raise OSError(f"a record of {len(record)} bytes that announces {flag} labels")
    if not flag:
        return np.array([single], np.float32), record[end:]
    return np.frombuffer(record, "<f4", flag, HEADER.size), record[end:]


def _read(rec: Path, begin: int, which: str = "") -> tuple[NDArray[np.float32], bytes]:
    """Return the labels and the image of the record at an offset.

    Raises:
        DataError: for a damaged record.
    """
    with rec.open("rb") as file:
        unpacked, problem = decode.attempt(lambda: _unpack(_record(file, begin)))()
    if problem:
        raise DataError(f"{rec}, {which}offset {begin}: {problem}")
    return unpacked


def _pack(labels: list[int], key: int, content: bytes) -> bytes:
    """Return a record's bytes; one label is in the header, more follow it."""
    if len(labels) == 1:
        return HEADER.pack(0, labels[0], key, 0) + content
    return HEADER.pack(len(labels), 0, key, 0) + struct.pack(f"<{len(labels)}f", *labels) + content


def _frame(record: bytes) -> bytes:
    """Return a record with its framing."""
    parts = []
    begin = at = 0
    while (at := record.find(MAGIC, at)) >= 0:
        if at % 4:
            at += 1
        else:
            parts.append(record[begin:at])
            begin = at = at + 4
    parts.append(record[begin:])
    kinds = [WHOLE] if len(parts) == 1 else [FIRST, *[MIDDLE] * (len(parts) - 2), LAST]
    framed = []
    for kind, part in zip(kinds, parts, strict=True):
        if len(part) > MAX_PART:
            raise DataError(f"a record of {len(part):,} bytes, over the limit of {MAX_PART:,}")
        framed += [MAGIC, struct.pack("<I", kind << 29 | len(part)), part, bytes(-len(part) % 4)]
    return b"".join(framed)


def list_images(path: Path) -> ScanResult:
    """List the images of a folder with one .rec file, or of a .rec file.

    The .idx beside it holds the records' offsets; without one, the whole .rec is scanned record by
    record, and the images are in its order. Labels are read from the records, not from a .lst file.
    ``property`` (the number of classes, and the images' height and width) and names of the classes
    are read where they exist.

    Raises:
        DataError: for files that are missing, damaged or cut short, naming the file and offset.

    Memory: 28 bytes per image, and three times that while it is read.
    """
    rec = path.with_suffix(".rec") if path.is_file() else None
    if rec is None:
        found = natural_files(path, [".rec"])
        if len(found) != 1:
            raise DataError(
                f"{path} holds {len(found)} .rec files, expected one; name the one to read"
            )
        rec = found[0]
    try:
        size = rec.stat().st_size
        rec.open("rb").close()
    except OSError as error:
        raise DataError(f"{rec} cannot be read: {error.strerror or error}") from error
    offsets = _indexed(rec, size) if rec.with_suffix(".idx").exists() else _scanned(rec, size)
    labels, begin, sizes = _headers(rec, size, offsets)
    classes, image_size = _read_property(rec.with_name("property"))
    store = Records(PackedPaths.of([rec]), np.zeros(len(begin), np.int32), begin, sizes)
    store.image_size = image_size
    return ScanResult(store, labels, read_names(rec.parent), classes)


def _indexed(rec: Path, size: int) -> NDArray[np.int64]:
    """Return the offsets of the image records, from the .idx."""
    keys, offsets = _read_index(rec.with_suffix(".idx"))
    if len(offsets) and not (offsets.min() >= 0 and offsets.max() <= size - 32):
        wrong = int(np.flatnonzero((offsets < 0) | (offsets > size - 32))[0])
        raise DataError(
            f"{rec} is of {size:,} bytes, too short for the record {keys[wrong]} that "
            f"{rec.with_suffix('.idx').name} has at offset {offsets[wrong]}"
        )
    return _without_ranges(rec, keys, offsets)


def _scanned(rec: Path, size: int) -> NDArray[np.int64]:
    """Return the offsets of the image records, by a scan that skips range records.

    Raises:
        DataError: for bytes that are not a record, a truncated record, and a number of images that
            differs from record 0's.
    """
    offsets = array("q")
    announced: float | None = None
    least = FRAME.size + HEADER.size
    at, inside = 0, False
    with rec.open("rb") as file:
        while at < size:
            try:
                file.seek(at)
                head = file.read(least + 4)
                kind, length = _part(head, at, inside)
            except OSError as error:
                raise DataError(f"{rec}: {error.strerror or error}") from error
            whole = kind == WHOLE
            if at + FRAME.size + length > size or (whole and length < HEADER.size):
                raise DataError(f"{rec}: the record at offset {at} is cut short")
            inside = kind in (FIRST, MIDDLE)
            flag, _, key, _ = HEADER.unpack_from(head, FRAME.size) if whole else (0,) * 4
            if kind == FIRST or (whole and length != HEADER.size + 4 * flag):
                offsets.append(at)
            elif whole and flag >= 2 and key == 0:
                (announced,) = struct.unpack_from("<f", head, least)
            at += FRAME.size + length + -length % 4
    if inside or (len(offsets) and offsets[-1] > size - least):
        raise DataError(f"{rec}: the last record is cut short")
    if announced not in (None, len(offsets) + 1):
        raise DataError(
            f"{rec}: record 0 announces {announced - 1:.0f} images, the file has {len(offsets)}"
        )
    return np.frombuffer(offsets, np.int64)


def _read_index(idx: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return keys and offsets, in the order of the keys."""
    numbers = array("q")
    try:
        with idx.open("rb") as file:
            for line in file:
                key, offset = (line if numbers else line.removeprefix(BOM)).split(b"\t")
                numbers.extend((int(key), int(offset)))
    except OSError as error:
        raise DataError(f"{idx} cannot be read: {error.strerror}") from error
    except (ValueError, OverflowError):
        raise DataError(
            f"{idx}, line {len(numbers) // 2 + 1}: expected a key, a tab and an offset, "
            f"got {line[:80]!r}"
        ) from None
    keys, offsets = np.frombuffer(numbers, np.int64).reshape(-1, 2).T.copy()
    if (keys[1:] < keys[:-1]).any():
        order = np.argsort(keys, kind="stable")
        keys, offsets = keys[order], offsets[order]
    if len(twice := np.flatnonzero(keys[1:] == keys[:-1])):
        raise DataError(f"{idx} has the key {keys[twice[0]]} twice")
    return keys, offsets


def _without_ranges(
    rec: Path, keys: NDArray[np.int64], offsets: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the offsets without those of range records, if record 0 gives the images' keys."""
    if not len(keys) or keys[0] != 0:
        return offsets
    announced, content = _read(rec, int(offsets[0]), "record 0 at ")
    if len(content) or len(announced) < 2:
        return offsets  # record 0 is an image
    images = (keys >= 1) & (keys < announced[0])
    if images.sum() != announced[0] - 1:
        raise DataError(
            f"{rec}: record 0 announces {announced[0] - 1:.0f} images, "
            f"{rec.with_suffix('.idx').name} has {images.sum()}"
        )
    return offsets[images]


def _headers(
    rec: Path, total: int, offsets: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return each record's label, and its image's offset and size in bytes (-1: several parts)."""
    labels = np.empty(len(offsets), np.float32)
    begin, sizes = np.empty_like(offsets), np.empty_like(offsets)
    for i in range(0, len(offsets), AT_ONCE):
        at = offsets[i : i + AT_ONCE]
        rows = slice(i, i + len(at))
        raw = np.memmap(rec, np.uint8, "r")  # remapped, so that the pages read before can be freed
        words = raw[at[:, None] + np.arange(20)].view("<u4").astype(np.int64)
        magic, word, flag = words[:, 0], words[:, 1], words[:, 2]
        skipped = HEADER.size + 4 * flag
        length = word & MAX_PART
        labels[rows] = words[:, 3].astype(np.uint32).view(np.float32)
        begin[rows], sizes[rows] = at + FRAME.size + skipped, length - skipped
        whole = (word >> 29) == WHOLE
        sound = (magic == 0xCED7230A) & whole & (length >= skipped)
        sound &= at + FRAME.size + length <= total
        for j in np.flatnonzero(~sound | (flag > 0)):
            # Records with several parts or labels, or damage, are rare: read one by one.
            labels[i + j] = _read(rec, int(at[j]))[0][0]
            if not whole[j]:
                begin[i + j], sizes[i + j] = at[j], -1
    with np.errstate(invalid="ignore"):
        integers = labels.astype(np.int64)
    fine = (labels >= 0) & (labels <= EXACT) & (integers == labels)
    if not fine.all():
        wrong = int(np.flatnonzero(~fine)[0])
        raise DataError(
            f"{rec}, offset {offsets[wrong]}: label {labels[wrong]}, expected an integer from 0 to "
            f"{EXACT:,}"
        )
    return integers, begin, sizes


def _read_property(file: Path) -> tuple[int | None, tuple[int, int] | None]:
    """Return the number of classes, and (H, W)."""
    if not file.exists():
        return None, None
    try:
        with file.open("rb") as opened:
            text = read_at_most(opened, 1000).removeprefix(BOM)
            numbers = [int(word) for word in text.split(b",")]
        if len(numbers) not in (1, 3) or min(numbers) < 1:
            raise ValueError
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError:
        raise DataError(
            f"{file} must be the number of classes, the height and the width, such as "
            "'10572,112,112'"
        ) from None
    return numbers[0], (numbers[1], numbers[2]) if len(numbers) == 3 else None


def write(folder: Path, samples: Iterable[Sample], identities: list[str], shard_bytes: int) -> None:
    """Write train.rec, train.idx, train.lst, property and the identities' names.

    insightface's range records are omitted if an identity's images are not contiguous; its trainers
    do not need them. ``property`` has a height and width if all images have the same.

    Raises:
        DataError: for more images or classes than float32 labels can represent, and a name that
            train.lst cannot hold.
    """
    del shard_bytes  # one file, without shards
    for name in identities:
        if any(character in "\t\r\n" or "\ud800" <= character <= "\udfff" for character in name):
            raise DataError(
                f"the identity {name!r} cannot be written to train.lst, where names are UTF-8 "
                "without tabs and line ends; rename its folder"
            )
    if len(identities) > EXACT:
        raise DataError(f"{len(identities):,} identities, over RecordIO's limit of {EXACT:,}")
    sizes: set[tuple[int, int]] = set()
    ranges: list[tuple[int, int, int]] = []  # label, first key, last key + 1
    with (
        (folder / "train.rec").open("wb") as rec,
        (folder / "train.idx").open("w") as idx,
        (folder / "train.lst").open("w", encoding="utf-8") as lst,
    ):

        def put(key: int, labels: list[int], content: bytes) -> None:
            idx.write(f"{key}\t{rec.tell()}\n")
            rec.write(_frame(_pack(labels, key, content)))

        key = 0
        for key, sample in enumerate(samples, 1):
            if key >= EXACT:
                raise DataError(f"more images than RecordIO's float32 can count ({EXACT - 1:,})")
            put(key, [sample.label], sample.content)
            lst.write(f"{key}\t{sample.label}\t{identities[sample.label]}/{key}\n")
            sizes.add(sample.image_size)
            if ranges and ranges[-1][0] == sample.label:
                ranges[-1] = (sample.label, ranges[-1][1], key + 1)
            else:
                ranges.append((sample.label, key, key + 1))
        if len(ranges) > len(identities):
            ranges = []
        for number, (_, first, last) in enumerate(ranges, key + 1):
            put(number, [first, last], b"")
        put(0, [key + 1, key + 1 + len(ranges)], b"")
    shape = f",{min(sizes)[0]},{min(sizes)[1]}" if len(sizes) == 1 else ""
    (folder / "property").write_text(f"{len(identities)}{shape}\n")
    (folder / IDENTITIES).write_text(json.dumps(identities))
