"""Parquet files, and folders of Hugging Face datasets, read and written by pyarrow.

A row is an image and its label. The image column is binary, or a struct of ``bytes`` and ``path``
(datasets' Image). Without bytes, the path names a file in the table's folder; the image column may
also be one of such paths. The label column has integers (named by datasets' ClassLabel) or strings,
which are numbered in natural order; either may be categorical.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from hashlib import sha256
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...common.extras import extra
from ...common.textfiles import read_json
from . import decode
from .decode import DataError
from .images import MAX_BYTES, PackedPaths, Sample, ScanResult, Store, natural_files, read_at_most

if TYPE_CHECKING:
    import pyarrow

LABELS = ("label", "labels", "identity", "identity_id", "class", "target", "y")
IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp")
PATHS = ("path", "file_name", "filename", "file", "image_path", "img_path")
CACHED = 4  # row groups, and open files, per process
ROWS = 16  # images per read of a Parquet file
GROUP_BYTES = 1 << 30  # limit of a row group's images
AT_ONCE = 1 << 16  # labels per read
PER_GROUP = 256  # rows per written row group
SPLIT = re.compile(
    r"(?:.*-)?(train|test|validation|valid|val|dev)(?:-\d+-of-\d+)?\.(?:parquet|arrow)"
)


def _arrow() -> Any:
    with extra("parquet", "reading and writing Parquet and Arrow files"):
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    return pyarrow


class Tables(Store):
    """Images in row groups of files; groups are read as a whole, and the last few are cached.

    Attributes:
        files: paths of the files. column: name of the image column.
        file, group: (G,) int32, each group's file, and its index in that file.
        starts: (G + 1,) int64, first row of each group, and the total. rows: (N,) int64, images.
    """

    def __init__(
        self,
        files: PackedPaths,
        column: str,
        file: NDArray[np.int32],
        group: NDArray[np.int32],
        starts: NDArray[np.int64],
        rows: NDArray[np.int64],
    ) -> None:
        self.files, self.column = files, column
        self.file, self.group, self.starts, self.rows = file, group, starts, rows
        self._lock = Lock()
        opened = lru_cache(CACHED)(lambda number: _open_table(files[number]))

        def read(index: int) -> tuple[pyarrow.ChunkedArray | None, ...]:
            count = int(starts[index + 1] - starts[index])
            return _read_group(opened(int(file[index])), int(group[index]), column, count)

        self._group = lru_cache(CACHED)(read)

    def __reduce__(self) -> tuple[Any, ...]:
        return Tables, (self.files, self.column, self.file, self.group, self.starts, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: NDArray[np.int64]) -> Tables:
        return Tables(self.files, self.column, self.file, self.group, self.starts, self.rows[rows])

    def _index(self, row: int) -> tuple[int, int]:
        """Return an image's row group, and its row in that group."""
        group = int(np.searchsorted(self.starts, self.rows[row], "right")) - 1
        return group, int(self.rows[row] - self.starts[group])

    def name(self, row: int) -> str:
        file = int(self.file[self._index(row)[0]])
        first = int(np.searchsorted(self.file, file))  # first group of the file
        return f"{self.files[file]}, row {self.rows[row] - self.starts[first]}"

    def fingerprint(self) -> bytes:
        files = [self.files[i] for i in range(len(self.files))]
        digest = sha256(repr([(file.name, file.stat().st_size) for file in files]).encode())
        digest.update(self.rows.tobytes())
        return digest.digest()

    def read(self, row: int) -> bytes:
        group, within = self._index(row)
        with self._lock:
            contents, paths = self._group(group)
            image = None if contents is None else contents[within].as_buffer()
        if image is None:
            path = None if paths is None else paths[within].as_py()
            return _read_beside(self.files[int(self.file[group])], path)
        if len(image) > MAX_BYTES:
            raise OSError(f"an image of {len(image):,} bytes, over the limit of {MAX_BYTES:,}")
        return image.to_pybytes()


def _read_group(
    table: _ParquetFile | _ArrowFile, group: int, column: str, count: int
) -> tuple[pyarrow.ChunkedArray | None, ...]:
    """Return the images of a row group, and their paths; None for a missing column."""
    parts: list[tuple[pyarrow.Array | None, ...]] = []
    total = rows = 0
    for array in table.column(group, column, ROWS):
        parts.append(_contents(array))
        rows += len(array)
        total += sum(part.nbytes for part in parts[-1] if part is not None)
        if total > GROUP_BYTES:
            raise OSError(f"a group of rows over the limit of {GROUP_BYTES:,} bytes")
    if rows != count:
        raise OSError(f"a group of {rows} rows, expected {count}")
    chunked = _arrow().chunked_array
    return tuple(None if part[0] is None else chunked(part) for part in zip(*parts, strict=True))


def _contents(column: pyarrow.Array) -> tuple[pyarrow.Array | None, pyarrow.Array | None]:
    """Return the bytes of an image column, and its paths; None for a missing part."""
    column.validate(full=True)  # offsets outside of the data would be followed
    parts = [column]
    if _arrow().types.is_struct(column.type):
        at = [column.type.get_field_index(name) for name in ("bytes", "path")]
        children = column.flatten()
        parts = [children[i] for i in at if i >= 0]
    content = [part for part in parts if _is_binary(part.type)]
    paths = [part for part in parts if _is_text(part.type)]
    return next(iter(content), None), next(iter(paths), None)


def _is_binary(kind: pyarrow.DataType) -> bool:
    types = _arrow().types
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _is_text(kind: pyarrow.DataType) -> bool:
    types = _arrow().types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _read_beside(table: Path, name: str | None) -> bytes:
    """Return the content of the image file that a row refers to.

    Raises:
        OSError: for a missing name, one outside the table's folder (tables are untrusted), and a
            file that cannot be read.
    """
    if name is None:
        raise OSError("the row has neither the bytes of an image nor a path")
    folder = os.path.abspath(table.parent)
    path = os.path.abspath(os.path.join(folder, name))
    if os.path.commonpath([folder, path]) != folder:
        raise OSError(f"the row's path {name!r:.200} leads out of {folder}, the table's folder")
    if "\0" in name or not os.path.isfile(path):  # opening a pipe would block
        raise OSError(f"the row has no bytes, and its path {name!r:.200} is not a file in {folder}")
    with open(path, "rb") as file:
        return read_at_most(file, MAX_BYTES)


class _ParquetFile:
    """A Parquet file, whose groups are its row groups."""

    def __init__(self, path: Path) -> None:
        pa = _arrow()
        # Not mapped: a damaged page then raises an error instead of a signal.
        self.file = pa.parquet.ParquetFile(path, page_checksum_verification=True)
        self.schema = self.file.schema_arrow
        meta = self.file.metadata
        # Checksums take most of a read's time, so each group's are verified once.
        self.unchecked = pa.parquet.ParquetFile(path, metadata=meta)
        self.checked: set[tuple[int, str]] = set()
        self.rows = [meta.row_group(i).num_rows for i in range(meta.num_row_groups)]

    def column(self, group: int, name: str, rows: int) -> Iterator[pyarrow.Array]:
        file = self.unchecked if (group, name) in self.checked else self.file
        for batch in file.iter_batches(rows, [group], columns=[name], use_threads=False):
            yield batch.column(0)
        self.checked.add((group, name))


class _ArrowFile:
    """An Arrow file or stream, whose groups are its record batches."""

    def __init__(self, path: Path) -> None:
        pa = _arrow()
        mapped = pa.memory_map(str(path))
        if mapped.size() >= 6 and mapped.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(mapped)
            self.batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        else:
            mapped.seek(0)
            reader = pa.ipc.open_stream(mapped)
            self.batches = list(reader)
        self.schema = reader.schema
        self.rows = [batch.num_rows for batch in self.batches]

    def column(self, group: int, name: str, rows: int) -> Iterator[pyarrow.Array]:
        del rows  # mapped, so all at once
        yield self.batches[group].column(self.schema.get_field_index(name))


def _open_table(path: Path) -> _ParquetFile | _ArrowFile:
    return _ArrowFile(path) if path.suffix == ".arrow" else _ParquetFile(path)


def list_images(path: Path) -> ScanResult:
    """List the rows of Parquet files, or of a folder that ``save_to_disk`` wrote.

    Of several splits, "train" is read; to read another, give its folder or file.

    Raises:
        DataError: for files that are damaged, whose columns differ or are not as expected.
        ImportError: without pyarrow.

    Memory: 16 bytes per image, and up to four row groups once images are read.
    """
    _arrow()
    files = [path] if path.is_file() else _files(path)
    column = ""
    wanted: Any = None
    names: list[str] | None = None
    parts: list[Any] = []
    groups: list[tuple[int, int, int]] = []
    for number, file in enumerate(files):
        try:
            table = _open_table(file)
            found, labels, classes = _columns(table.schema, file)
            if wanted is None:
                wanted, column, names = (found, labels, classes), found, classes
            elif wanted != (found, labels, classes):
                raise DataError(f"{file}: its columns differ from those of {files[0]}")
            size = file.stat().st_size
            if not all(rows >= 0 for rows in table.rows) or sum(table.rows) > size:
                raise DataError(f"{file}: {sum(table.rows):,} rows in {size:,} bytes")
            for group, rows in enumerate(table.rows):
                groups.append((number, group, rows))
                left = rows
                for chunk in table.column(group, labels, AT_ONCE):
                    left -= len(chunk)
                    if left < 0:
                        break
                    parts.append(_checked(chunk, file))
                if left:
                    raise DataError(
                        f"{file}: group {group} has {rows} rows, and not as many labels"
                    )
        except DataError:
            raise
        except Exception as error:  # pyarrow raises errors of its own, and MemoryError
            raise DataError(f"{file} cannot be read: {error or type(error).__name__}") from error
    if len({type(part) for part in parts}) > 1:
        raise DataError(f"{path}: the labels of some files are integers, of others strings")
    if parts and isinstance(parts[0], list):
        strings = [text for part in parts for text in part]
        names = sorted(set(strings), key=decode.natural)
        index = {text: i for i, text in enumerate(names)}
        parts = [np.array([index[text] for text in strings], np.int64)]
    labels_of = np.concatenate([np.empty(0, np.int64), *parts])
    file_of, group_of, counts = np.array(groups, np.int64).reshape(-1, 3).T
    store = Tables(
        PackedPaths.of(files),
        column,
        file_of.astype(np.int32),
        group_of.astype(np.int32),
        np.append(0, np.cumsum(counts)),
        np.arange(len(labels_of)),
    )
    return ScanResult(store, labels_of, names)


def _checked(chunk: pyarrow.Array, file: Path) -> NDArray[np.int64] | list[str]:
    """Return the labels of a chunk, integers or strings; raise DataError if any is missing."""
    pa = _arrow()
    chunk.validate(full=True)
    categorical = pa.types.is_dictionary(chunk.type)
    if integers := pa.types.is_integer(_category(chunk.type)):
        chunk = chunk.dictionary_decode() if categorical else chunk
        missing = chunk.null_count
    else:
        texts = (chunk.dictionary if categorical else chunk).to_pylist()
        if categorical:  # rows of one category share its text
            texts = [None if i is None else texts[i] for i in chunk.indices.to_pylist()]
        missing = texts.count(None)
    if missing:
        raise DataError(f"{file}: {missing} rows have no label")
    return chunk.cast(pa.int64()).to_numpy(zero_copy_only=False) if integers else texts


def _category(kind: pyarrow.DataType) -> pyarrow.DataType:
    """Return the type of a column's values; a categorical column is a dictionary of these."""
    return kind.value_type if _arrow().types.is_dictionary(kind) else kind


def _files(path: Path) -> list[Path]:
    """Return the files of a folder; of several splits, those of "train"."""
    if (path / "dataset_dict.json").is_file():
        splits = read_json(path / "dataset_dict.json", DataError, MAX_BYTES)
        splits = splits.get("splits") if isinstance(splits, dict) else None
        if not isinstance(splits, list) or not all(isinstance(s, str) for s in splits):
            raise DataError(f"{path / 'dataset_dict.json'} must have a list of splits")
        split = "train" if "train" in splits or len(splits) != 1 else splits[0]
        if split not in splits or not _plain(split):
            raise DataError(f"{path} has the splits {splits}; name the folder of one")
        return _files(path / split)
    if (path / "state.json").is_file():
        state = read_json(path / "state.json", DataError, MAX_BYTES)
        try:
            files = [entry["filename"] for entry in state["_data_files"]]
            if not files or not all(isinstance(name, str) and _plain(name) for name in files):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{path / 'state.json'} must name the files of its folder") from None
        return [path / name for name in files]
    files = natural_files(path, [".arrow"]) or natural_files(path, [".parquet"])
    if not files and (path / "data").is_dir():
        files = natural_files(path / "data", [".parquet"])
    if not files:
        raise DataError(f"{path} holds no Parquet or Arrow file")
    found = [SPLIT.fullmatch(file.name) for file in files]
    splits = {match and match[1] for match in found}
    if len(splits) == 1:
        return files
    if "train" not in splits:
        raise DataError(f"{path} has the splits {sorted(map(str, splits))}; name a file of one")
    return [file for file, match in zip(files, found, strict=True) if match and match[1] == "train"]


def _plain(name: str) -> bool:
    """Return whether a name is a plain file name, not a path."""
    return name not in ("", ".", "..") and not any(c in name for c in "/\\\0")


def _columns(schema: pyarrow.Schema, file: Path) -> tuple[str, str, list[str] | None]:
    """Return the image column, the label column, and the classes' names if they are stored."""
    pa = _arrow()
    types = pa.types
    features: dict[str, Any] = {}
    try:
        stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = stored.get("info", {}).get("features", {})
        kinds = {name: str(each.get("_type")) for name, each in features.items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: the Hugging Face metadata is damaged: {error}") from None

    def is_image(field: Any) -> bool:
        if types.is_struct(field.type):
            at, path = (field.type.get_field_index(name) for name in ("bytes", "path"))
            if at >= 0 and types.is_null(field.type.field(at).type):  # paths alone
                return path >= 0 and _is_text(field.type.field(path).type)
            return at >= 0 and _is_binary(field.type.field(at).type)
        return _is_binary(field.type)

    def is_path(field: Any) -> bool:
        return _is_text(field.type) and field.name in (*IMAGES, *PATHS)

    def is_label(field: Any) -> bool:
        kind = _category(field.type)
        return field.name != image and (types.is_integer(kind) or _is_text(kind))

    def one(what: str, wanted: str, usual: tuple[str, ...], fits: Any) -> str:
        fields = [field for field in schema if fits(field)]
        for chosen in (
            [f.name for f in fields if kinds.get(f.name) == wanted],
            [name for name in usual if name in [f.name for f in fields]][:1],
            [f.name for f in fields],
        ):
            if len(chosen) == 1:
                return chosen[0]
        shown = ", ".join(f"{field.name} ({field.type})" for field in list(schema)[:20])
        raise DataError(f"{file}: which column holds the {what}? There are: {shown}")

    if len(set(schema.names)) < len(schema.names):
        raise DataError(f"{file} has two columns of the same name")
    image = one(
        "images", "Image", (*IMAGES, *PATHS), is_image if any(map(is_image, schema)) else is_path
    )
    label = one("labels", "ClassLabel", LABELS, is_label)
    names = features[label].get("names") if kinds.get(label) == "ClassLabel" else None
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise DataError(f"{file}: the class names of {label!r} must be a list of strings")
    return image, label, names


# -- writing


def _schema(identities: list[str]) -> tuple[pyarrow.Schema, dict[str, Any]]:
    pa = _arrow()
    features = {
        "image": {"_type": "Image"},
        "label": {"names": identities, "_type": "ClassLabel"},
    }
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())])
    text = json.dumps({"info": {"features": features}})
    return schema.with_metadata({"huggingface": text}), features


def _batches(
    schema: pyarrow.Schema, samples: Iterable[Sample], shard_bytes: int
) -> Iterator[tuple[pyarrow.RecordBatch, int]]:
    """Yield batches of rows, each with its shard number."""
    pa = _arrow()
    rows: list[dict[str, Any]] = []
    shard = size = held = 0

    def batch() -> pyarrow.RecordBatch:
        return pa.RecordBatch.from_pylist(rows, schema)

    for number, sample in enumerate(samples):
        image = {"bytes": sample.content, "path": f"{number:08d}.{sample.extension}"}
        rows.append({"image": image, "label": sample.label})
        size += len(sample.content)
        held += len(sample.content)
        if len(rows) == PER_GROUP or held >= GROUP_BYTES // 8 or size >= shard_bytes:
            yield batch(), shard
            rows, held = [], 0
            if size >= shard_bytes:
                shard, size = shard + 1, 0
    if rows:
        yield batch(), shard


def _write(
    folder: Path,
    samples: Iterable[Sample],
    identities: list[str],
    shard_bytes: int,
    name: str,
    writer: Callable[[str, pyarrow.Schema], Any],
) -> tuple[list[Path], dict[str, Any]]:
    """Write shards, and rename them once their number is known."""
    schema, features = _schema(identities)
    written: list[Path] = []
    for shard, batches in groupby(_batches(schema, samples, shard_bytes), itemgetter(1)):
        written.append(folder / f"{shard}.partial")
        with writer(str(written[-1]), schema) as table:
            for batch, _ in batches:
                table.write_batch(batch)
    named = [folder / name.format(i, len(written)) for i in range(len(written))]
    for old, new in zip(written, named, strict=True):
        old.rename(new)
    return named, features


def write_parquet(
    folder: Path, samples: Iterable[Sample], identities: list[str], shard_bytes: int
) -> None:
    """Write ``data/train-00000-of-00001.parquet``, …, for datasets' ``load_dataset``."""
    (folder / "data").mkdir()
    name = "train-{:05d}-of-{:05d}.parquet"
    writer = partial(  # images are compressed already
        _arrow().parquet.ParquetWriter, compression="none", write_page_checksum=True
    )
    _write(folder / "data", samples, identities, shard_bytes, name, writer)


def write_arrow(
    folder: Path, samples: Iterable[Sample], identities: list[str], shard_bytes: int
) -> None:
    """Write a folder for datasets' ``load_from_disk``."""
    name, writer = "data-{:05d}-of-{:05d}.arrow", _arrow().ipc.new_stream
    files, features = _write(folder, samples, identities, shard_bytes, name, writer)
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    state: dict[str, Any] = {
        "_data_files": [{"filename": file.name} for file in files],
        "_fingerprint": sha256(json.dumps(features).encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    (folder / "state.json").write_text(json.dumps(state))
