"""Image sets as other programs write them are read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import struct
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest
from PIL import Image
from synface.data import DataError, ImageLoader, convert, open_images, read_folder
from synface.data.formats.recordio import MAGIC, _frame
from synface.evaluation.sets import PairSet, open_set

BOM = b"\xef\xbb\xbf"


def picture(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def few(tmp_path) -> Path:
    """Write three people, two images each."""
    for i in range(6):
        (tmp_path / "faces" / f"p{i // 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / "faces" / f"p{i // 2}" / f"{i}.png").write_bytes(picture(i))
    return tmp_path / "faces"


def contents(path: Path) -> list[tuple[str, bytes]]:
    images = open_images(path)
    return [(images.identities[s.label], s.content) for s in images.samples()]


EXPECTED = [(f"p{i // 2}", picture(i)) for i in range(6)]


# -- text with a byte order mark


def test_a_byte_order_mark_is_no_part_of_a_text(few, tmp_path):
    convert(few, tmp_path / "rec", "recordio")
    for name in ("train.idx", "property", "identities.json"):
        file = tmp_path / "rec" / name
        file.write_bytes(BOM + file.read_bytes())
    assert contents(tmp_path / "rec") == EXPECTED
    assert open_images(tmp_path / "rec").store.image_size == (12, 10)
    lines = {"pairs.txt": "1\np0 0 1\np0 0 p1 2", "paths.txt": "p0/0.png p0/1.png 1"}
    for name, text in lines.items():
        (few / name).write_bytes(BOM + text.encode())
        found = open_set(few / name)
        assert found.store.read(0) == picture(0)
        assert found.same[0]
    templates = tmp_path / "templates"
    templates.mkdir()
    for name, text in (
        ("x_tid_mid.txt", "a.png 1 1\nb.png 2 1\n"),
        ("x_template_pair_label.txt", "1 2 1\n"),
        ("x_gallery.csv", "TEMPLATE_ID,SUBJECT_ID\n1,5\n"),
        ("x_probe.csv", "TEMPLATE_ID,SUBJECT_ID\n2,5\n"),
    ):
        (templates / name).write_bytes(BOM + text.encode())
    assert open_set(templates).store.name(0).endswith("/a.png")


# -- pairs


def test_pairs_of_paths(few):
    lines = []
    for i in range(40):
        same = i % 2 == 0
        lines.append(f"p0/0.png p{0 if same else 1}/{1 if same else 2}.png {int(same)}")
    (few / "spaces.txt").write_text("\n".join(lines) + "\n\n")
    (few / "tabs.txt").write_text("\r\n".join(lines).replace(" ", "\t"))
    (few / "commas.txt").write_text("\n".join(lines).replace(" ", ", "))
    for name in ("spaces", "tabs", "commas"):
        found = open_set(few / f"{name}.txt")
        assert isinstance(found, PairSet)
        assert found.same.tolist() == [True, False] * 20
        assert found.people is None
        assert [found.store.read(i) for i in range(3)] == [picture(0), picture(1), picture(2)]
        assert found.first.tolist() == [0] * 40
        assert found.second.tolist() == [1, 2] * 20
        assert found.fold.tolist() == sorted([*range(10)] * 4)
    (few / "p0" / "a b.png").write_bytes(picture(9))
    (few / "tabs.txt").write_text("p0/a b.png\tp0/1.png\t1\np0/a b.png\tp1/2.png\t0")
    assert open_set(few / "tabs.txt").store.read(0) == picture(9)
    (few / "lists").mkdir()
    (few / "spaces.txt").rename(few / "lists" / "spaces.txt")
    assert len(open_set(few / "lists" / "spaces.txt", few).same) == 40


def test_folds_of_a_list_that_is_sorted_by_kind_hold_both_kinds(few):
    lines = ["p0/0.png p0/1.png 1"] * 20 + ["p0/0.png p1/2.png 0"] * 20
    (few / "sorted.txt").write_text("\n".join(lines))
    found = open_set(few / "sorted.txt")
    for fold in range(10):
        assert found.same[found.fold == fold].tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("p0/0.png p0/1.png", "line 2: expected 'path path 0-or-1', got 'p0/0.png p0/1.png'"),
        ("p0/0.png p0/1.png 2", "line 2: expected 'path path 0-or-1'"),
        ("p0/0.png p0/7.png 1", r"line 2: .*p0/7.png is not a file; .*\(--images\)"),
        ("../faces/p0/0.png p0/1.png 1", "line 2: '../faces/p0/0.png' is not inside of"),
        ("/etc/passwd p0/1.png 0", "line 2: '/etc/passwd' is not inside of"),
    ],
)
def test_pairs_of_paths_that_are_not_as_expected(few, line, message):
    (few / "list.txt").write_text(f"p0/0.png p0/1.png 1\n{line}\n")
    with pytest.raises(DataError, match=message):
        open_set(few / "list.txt")


def test_crops_that_an_aligner_numbered(few):
    (few / "Ann_Lee").mkdir()
    for i, name in enumerate(("Ann_Lee_0001_0.png", "Ann_Lee_0002_1.png", "0003_0.png")):
        (few / "Ann_Lee" / name).write_bytes(picture(20 + i))
    (few / "pairs.txt").write_text("1\nAnn_Lee 1 2\nAnn_Lee 3 p0 1")
    found = open_set(few / "pairs.txt")
    assert found.store.read(0) == picture(20)
    assert found.store.read(1) == picture(21)
    assert found.store.read(2) == picture(22)
    (few / "Ann_Lee" / "Ann_Lee_0001_1.png").write_bytes(picture(30))
    with pytest.raises(DataError, match=r"line 2: .*Ann_Lee has 2 faces of image 1"):
        open_set(few / "pairs.txt")
    (few / "Ann_Lee" / "Ann_Lee_0001.png").write_bytes(picture(31))
    assert open_set(few / "pairs.txt").store.read(0) == picture(31)
    (few / "1").mkdir()
    (few / "1" / "1_0002.png").write_bytes(picture(40))
    (few / "pairs.txt").write_text("1\nAnn_Lee 1 2\nAnn_Lee 3 1 1")
    with pytest.raises(DataError, match=r"line 3: .* has no image 1"):  # 1_0002 is another
        open_set(few / "pairs.txt")


# -- RecordIO without an index


def test_records_without_an_index(few, tmp_path):
    convert(few, tmp_path / "rec", "recordio")
    indexed = open_images(tmp_path / "rec")
    (tmp_path / "rec" / "train.idx").unlink()
    for path in (tmp_path / "rec", tmp_path / "rec" / "train.rec"):
        scanned = open_images(path)
        assert contents(path) == EXPECTED
        assert scanned.labels.tolist() == indexed.labels.tolist()
        assert scanned.store.fingerprint() == indexed.store.fingerprint()


def test_records_of_other_writers_without_an_index(tmp_path):
    images = [picture(0), MAGIC * 3 + picture(1), picture(2)[:-1]]
    (tmp_path / "train.rec").write_bytes(
        b"".join(
            _frame(struct.pack("<IfQQ", *head) + more + image)
            for head, more, image in (
                ((0, 1, 7, 0), b"", images[0]),
                ((0, 0, 9, 0), b"", images[1]),  # of several parts
                ((3, 0, 3, 0), struct.pack("<3f", 1, 5, 6), images[2]),  # of several labels
            )
        )
    )
    found = open_images(tmp_path)
    assert found.labels.tolist() == [1, 0, 1]
    assert [found.read(i) for i in range(3)] == images


def test_damaged_records_without_an_index_are_named(few, tmp_path):
    convert(few, tmp_path / "rec", "recordio")
    rec, idx = tmp_path / "rec" / "train.rec", tmp_path / "rec" / "train.idx"
    sound = rec.read_bytes()
    offsets = dict(map(int, line.split("\t")) for line in idx.read_text().splitlines())
    idx.unlink()
    third, last = offsets[3], offsets[0]

    def patched(at: int, data: bytes) -> bytes:
        return sound[:at] + data + sound[at + len(data) :]

    for damaged, message in (
        (patched(third, b"x"), f"no record begins at offset {third}"),
        (patched(third + 4, b"\x05\0\0\0"), f"the record at offset {third} is cut short"),
        (patched(third + 7, b"\x40"), f"the part at offset {third} is of kind 2, out of order"),
        (patched(third + 4, b"\xff\xff\xff\x1f"), f"the record at offset {third} is cut short"),
        (sound[: third - 9], f"the record at offset {offsets[2]} is cut short"),
        (sound[: last + 5], f"no record begins at offset {last}"),
        (sound[:third] + sound[offsets[4] :], "record 0 announces 6 images, the file has 5"),
        (MAGIC + struct.pack("<I", 1 << 29) + bytes(0), "the last record is cut short"),
        (sound + b"junk", f"no record begins at offset {len(sound)}"),
        (b"", "holds no image"),
    ):
        rec.write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            open_images(tmp_path / "rec")


# -- tables


def table(file: Path, /, **columns) -> Path:
    pa.parquet.write_table(pa.table(columns), file)
    return file


@pytest.mark.parametrize("indices", [pa.int8(), pa.uint32()])
@pytest.mark.parametrize("values", [pa.string(), pa.large_string(), pa.string_view()])
@pytest.mark.parametrize("binary", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_tables_of_pandas_and_polars(tmp_path, indices, values, binary):
    images = [picture(i) for i in range(4)]
    categories = pa.array(["s10", "s2", "s1", "nobody"], values)
    labels = pa.DictionaryArray.from_arrays(pa.array([1, 0, 1, 2], indices), categories)
    frame = pa.table({"image": pa.array(images, binary), "label": labels})
    with pa.ipc.new_file(str(tmp_path / "x.arrow"), frame.schema) as writer:
        writer.write_table(frame)
    files = [tmp_path / "x.arrow"]
    if values != pa.string_view():  # pyarrow writes no Parquet of such
        pa.parquet.write_table(frame, tmp_path / "x.parquet")
        files.append(tmp_path / "x.parquet")
    plain = pa.table({"image": frame["image"], "label": labels.to_pylist()})
    plain = plain.set_column(1, "label", plain["label"].cast(values))
    pa.parquet.write_table(plain, tmp_path / "plain.parquet")
    for file in (*files, tmp_path / "plain.parquet"):
        found = open_images(file)
        assert found.identities == ["s1", "s2", "s10"]
        assert found.labels.tolist() == [1, 2, 1, 0]
        assert [found.read(i) for i in range(4)] == images


def test_categories_of_integers_and_missing_ones(tmp_path):
    images = [picture(i) for i in range(3)]
    labels = pa.DictionaryArray.from_arrays(pa.array([1, 0, 1]), pa.array([1, 0]))
    found = open_images(table(tmp_path / "a.parquet", image=images, label=labels))
    assert found.labels.tolist() == [0, 1, 0]
    for values, index in ((["a", "b"], [0, None, 1]), ([1, 0], [0, None, 1]), (["a"], [None] * 3)):
        labels = pa.DictionaryArray.from_arrays(pa.array(index, pa.int8()), pa.array(values))
        message = f"b.parquet: {index.count(None)} rows have no label"
        with pytest.raises(DataError, match=message):
            open_images(table(tmp_path / "b.parquet", image=images, label=labels))
    folder = tmp_path / "mixed"
    folder.mkdir()
    table(folder / "1.parquet", image=images, label=[0, 1, 0])
    table(folder / "2.parquet", image=images, label=["a", "b", "a"])
    with pytest.raises(DataError, match="labels of some files are integers, of others strings"):
        open_images(folder)


def test_a_negative_label_is_named(tmp_path):
    file = table(tmp_path / "a.parquet", image=[picture(0), picture(1)], label=[0, -1])
    with pytest.raises(DataError, match=r"row 1: label -1, expected integers from 0 on \(leave"):
        open_images(file)


def test_tables_of_paths(few, tmp_path):
    names = [f"p{i // 2}/{i}.png" for i in range(6)]
    people = [name[:2] for name in names]
    images = [picture(0), None, *[picture(i) for i in range(2, 6)]]
    both = [
        {"bytes": image, "path": name if image is None else "elsewhere.png"}
        for image, name in zip(images, names, strict=True)
    ]
    none = [{"bytes": None, "path": name} for name in names]
    absolute = [str(few / name) for name in names]
    for columns in (
        {"image": both, "label": people},
        {"image": none, "label": people},
        {"path": names, "person": people},
        {"file_name": pa.array(names, pa.string_view()), "label": people},
        {"image_path": absolute, "label": people},
    ):
        assert contents(table(few / "x.parquet", **columns)) == EXPECTED
    table(few / "x.parquet", path=names, label=people)
    convert(few / "x.parquet", tmp_path / "rec", "recordio")
    assert contents(tmp_path / "rec") == EXPECTED
    with ImageLoader(few / "x.parquet", 2, size=(12, 10), seed=0, last_step=3, workers=1) as loader:
        assert sum(len(labels) for _, (_, labels) in loader) == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.png", r"x.parquet, row 1: the row's path '../secret.png' leads out of"),
        ("p0/../../secret.png", "leads out of"),
        ("/etc/passwd", "leads out of"),
        ("", "is not a file in"),
        (".", "is not a file in"),
        ("p0", "is not a file in"),
        ("pipe.png", "is not a file in"),
        ("a\0b", "is not a file in"),
        ("x" * 5000, "is not a file in"),
        (None, "neither the bytes of an image nor a path"),
    ],
    ids=range(10),
)
def test_a_path_leads_to_no_other_folder(few, tmp_path, name, message):
    (tmp_path / "secret.png").write_bytes(picture(99))
    os.mkfifo(few / "pipe.png")
    found = open_images(table(few / "x.parquet", path=["p0/0.png", name], label=["a", "b"]))
    with pytest.raises(DataError, match=message):
        found.read(1)


# -- WebDataset


def archive(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return path


def test_members_of_a_sample_that_are_apart(tmp_path):
    apart = [("1.png", picture(0)), ("2.png", picture(1)), ("1.cls", b"0"), ("2.cls", b"1")]
    with pytest.raises(
        DataError, match=r"x.tar, offset \d+: '1.cls' does not follow .*--sort=name"
    ):
        open_images(archive(tmp_path / "x.tar", *apart))
    assert len(open_images(archive(tmp_path / "x.tar", *sorted(apart)))) == 2


def test_a_sample_whose_image_is_of_another_format(tmp_path):
    archive(tmp_path / "x.tar", ("1.gif", b"x"), ("1.cls", b"0"))
    with pytest.raises(DataError, match=r"no image of a known format \(it has .gif, .cls\)"):
        open_images(tmp_path / "x.tar")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, bytes])
@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tar.xz"])
def test_shards_are_what_their_bytes_say(tmp_path, pack, name):
    # A plain tar begins with a name, here with bzip2's letters.
    members = [
        ("BZh91/1.png", picture(0)),
        ("BZh91/1.cls", b"0"),
        ("__MACOSX/BZh91/2.png", b"of macOS"),
        ("BZh91/._2.png", b"of macOS"),
        ("BZh91/2.png", picture(1)),
        ("BZh91/2.cls", b"1"),
    ]
    raw = archive(tmp_path / "plain", *members).read_bytes()
    (tmp_path / name).write_bytes(pack(raw))
    found = open_images(tmp_path / name)
    assert found.store.streams == (pack is not bytes)
    assert [(s.label, s.content) for s in found.samples()] == [(0, picture(0)), (1, picture(1))]


# -- names of folders


def test_a_name_that_is_not_utf_8(few, tmp_path):
    latin = os.fsdecode(b"Andr\xe9")
    try:
        (few / "p1").rename(few / latin)
    except OSError:
        pytest.skip("the file system takes UTF-8 alone")
    assert read_folder(few).identities == [latin, "p0", "p2"]
    with ImageLoader(few, 2, size=(12, 10), seed=0, last_step=3, workers=1) as loader:
        assert sum(len(labels) for _, (_, labels) in loader) == 6
    for form in ("webdataset", "parquet", "arrow"):
        convert(few, tmp_path / form, form)
        assert sorted(contents(tmp_path / form)) == sorted(contents(few))
    with pytest.raises(
        DataError, match=r"the identity 'Andr\\udce9' cannot be written to train.lst"
    ):
        convert(few, tmp_path / "rec", "recordio")
    assert not (tmp_path / "rec").exists()


# -- what is written


@pytest.mark.parametrize("form", ["folder", "recordio", "webdataset", "parquet", "arrow"])
def test_what_is_written_follows_the_umask(few, tmp_path, form):
    for mask in (0o022, 0o027, 0o077):
        before = os.umask(mask)
        try:
            convert(few, tmp_path / f"{form}{mask}", form)
        finally:
            os.umask(before)
        written = [tmp_path / f"{form}{mask}", *(tmp_path / f"{form}{mask}").rglob("*")]
        assert len(written) > 1
        for path in written:
            expected = (0o777 if path.is_dir() else 0o666) & ~mask
            assert path.stat().st_mode & 0o777 == expected, path


def test_names_of_classes_are_read_with_a_mark(few, tmp_path):
    convert(few, tmp_path / "tar", "webdataset")
    names = tmp_path / "tar" / "identities.json"
    names.write_bytes(BOM + names.read_bytes())
    assert contents(tmp_path / "tar") == EXPECTED
    assert json.loads(names.read_bytes()) == ["p0", "p1", "p2"]
