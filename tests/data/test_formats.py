"""Image sets in files: every format to every other byte for byte, and what is refused."""

from __future__ import annotations

import bz2
import errno
import gzip
import json
import lzma
import os
import pickle
import re
import struct
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
import webdataset
from PIL import Image
from synface.data import DataError, TwoDomainLoader, convert, open_images, read_folder
from synface.data.formats.image_set import ImageSet
from synface.data.formats.images import FORMATS, IDENTITIES
from synface.data.formats.recordio import MAGIC, MAX_PART, _frame, _pack
from synface.training.sources import fingerprint

from tests.helpers.command_line import call, refused

PEOPLE, EACH = 20, 50


def picture(seed: int, size: tuple[int, int] = (12, 10), kind: str | None = None) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, kind or ("PNG", "JPEG", "WEBP", "BMP")[seed % 4])
    return buffer.getvalue()


def folder(root: Path, people: int = 4, each: int = 3, **options) -> Path:
    """Images of people that natural and other orders tell apart: p1, p2, … p10."""
    for person in range(people):
        (root / f"p{person + 1}").mkdir(parents=True)
        for i in range(each):
            content = picture(person * each + i, **options)
            (root / f"p{person + 1}" / f"{i}.png").write_bytes(content)
    return root


@pytest.fixture(scope="module")
def thousand(tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("thousand") / "faces", PEOPLE, EACH)


@pytest.fixture
def few(tmp_path) -> Path:
    return folder(tmp_path / "faces")


def content(images: ImageSet) -> list[tuple[str, bytes]]:
    """Return every image's identity and bytes, in order."""
    return [(images.identities[s.label], s.content) for s in images.samples()]


def expected(root: Path) -> list[tuple[str, bytes]]:
    """Return the same as read from the file system alone."""
    people = sorted(os.listdir(root), key=lambda name: int(name[1:]))
    return [
        (name, (root / name / file).read_bytes())
        for name in people
        for file in sorted(os.listdir(root / name), key=lambda f: int(f.split(".")[0]))
    ]


# -- from each format to each


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.slow
def test_a_thousand_images_go_round_byte_for_byte(thousand, tmp_path, first):
    wanted = expected(thousand)
    assert len(wanted) == 1000
    done: list[tuple[int, int]] = []
    one = convert(
        thousand,
        tmp_path / "one",
        first,
        shard_bytes=100_000,
        progress=lambda *numbers: done.append(numbers),
    )
    assert content(one) == wanted
    assert done == [(i + 1, 1000) for i in range(1000)]
    shards = {"webdataset": "*.tar", "parquet": "data/*.parquet", "arrow": "*.arrow"}
    if first in shards:  # of at least 100 kB each, of 400 bytes an image or more
        assert 3 < len(list((tmp_path / "one").glob(shards[first]))) < 40
    for second in FORMATS:
        two = convert(tmp_path / "one", tmp_path / second, second)
        assert content(two) == wanted
        assert two.identities == one.identities == [f"p{i + 1}" for i in range(PEOPLE)]
        assert np.array_equal(two.labels, np.repeat(np.arange(PEOPLE), EACH))


@pytest.mark.parametrize(("ending", "pack"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
def test_compressed_shards_are_read_in_order(few, tmp_path, ending, pack):
    convert(few, tmp_path / "set", "webdataset", shard_bytes=3000)
    for shard in list((tmp_path / "set").glob("*.tar")):
        shard.with_suffix(f".tar.{ending}").write_bytes(pack.compress(shard.read_bytes()))
        shard.unlink()
    images = open_images(tmp_path / "set")
    assert images.store.streams
    assert content(images) == expected(few)
    assert content(convert(images, tmp_path / "back", "folder")) == expected(few)
    faces, plain = read_folder(tmp_path / "set"), read_folder(few)
    assert torch.equal(faces.images, plain.images)
    with pytest.raises(
        DataError, match="only supports sequential reads, but training shuffles; convert it"
    ):
        TwoDomainLoader(tmp_path / "set", few, 2)


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_trains_as_the_folder_does(few, tmp_path, form):
    convert(few, tmp_path / "set", form)
    images = open_images(tmp_path / "set")
    options = {"size": (8, 9), "seed": 5, "last_step": 5, "workers": 2}
    batches = []
    for domain in (open_images(few), images):
        with TwoDomainLoader(domain, few, 5, **options) as loader:
            batches.append([[part.clone() for part in pairs] for _, pairs in loader])
    for a, b in zip(*batches, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    rest, held = images.split(1)
    assert content(held) == expected(few)[9:]
    assert fingerprint(rest) != fingerprint(images)
    assert fingerprint(open_images(tmp_path / "set")) == fingerprint(images)
    assert content(pickle.loads(pickle.dumps(images))) == expected(few)


def test_the_command_line_converts_trains_and_verifies(few, tmp_path):
    shown = call("convert", few, tmp_path / "rec", "--to", "recordio")
    assert "12 images of 4 identities" in shown
    options = ["--holdout", "0", "--epochs", "1", "--size", "16x16", "--embedding-size", "8"]
    for number, data in enumerate((few, tmp_path / "rec")):
        call("train", "--data", data, "--output", tmp_path / f"run{number}", *options)
    lines = [(tmp_path / f"run{i}" / "metrics.jsonl").read_text() for i in range(2)]
    assert lines[0] == lines[1]


def test_what_is_there_says_which_format_it_is(few, tmp_path):
    convert(few, tmp_path / "rec", "recordio")
    convert(few, tmp_path / "tar", "webdataset")
    assert len(open_images(tmp_path / "rec" / "train.rec")) == 12
    assert len(open_images(tmp_path / "rec" / "train.idx")) == 12
    assert len(open_images(tmp_path / "tar" / "000000.tar")) == 12
    (tmp_path / "rec" / "x.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"files of several formats \(recordio, webdataset\)"):
        open_images(tmp_path / "rec")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        DataError, match=r"notes.txt is not a folder, nor a file that ends in \.rec"
    ):
        open_images(tmp_path / "notes.txt")
    with pytest.raises(DataError, match="nowhere does not exist"):
        open_images(tmp_path / "nowhere")


def test_a_destination_is_there_as_a_whole_or_not_at_all(few, tmp_path):
    (few / "p4" / "9.png").write_bytes(b"no image")
    for form in FORMATS:
        with pytest.raises(DataError, match=r"p4/9\.png: not a readable image"):
            convert(few, tmp_path / "set", form)
    assert os.listdir(tmp_path) == ["faces"]
    (few / "p4" / "9.png").unlink()

    def full(done: int, total: int) -> None:
        if done == 7:
            raise OSError(errno.ENOSPC, "No space left on device")

    for form in FORMATS:
        with pytest.raises(OSError, match="No space left"):
            convert(few, tmp_path / "set", form, progress=full)
    assert os.listdir(tmp_path) == ["faces"]
    (tmp_path / "set").mkdir()
    with pytest.raises(FileExistsError, match="set exists already"):
        convert(few, tmp_path / "set", "recordio")
    with pytest.raises(ValueError, match=r"to must be one of folder, recordio, .*got 'zip'"):
        convert(few, tmp_path / "other", "zip")


# -- labels


def records(root: Path, labels: list[float], prop: str | None = None) -> Path:
    """RecordIO as MXNet's im2rec writes it, without insightface's record 0."""
    root.mkdir()
    with (root / "train.rec").open("wb") as rec, (root / "train.idx").open("w") as idx:
        for key, number in enumerate(labels):
            idx.write(f"{key}\t{rec.tell()}\n")
            header = struct.pack("<IfQQ", 0, number, key, 0)
            rec.write(_frame(header + picture(key)))
    if prop is not None:
        (root / "property").write_text(prop)
    return root


def test_labels_with_gaps_are_an_error_or_are_numbered_again(tmp_path):
    root = records(tmp_path / "rec", [5, 0, 2, 5])
    with pytest.raises(DataError, match=r"3 of 6 labels have no image, the first is 1; relabel"):
        open_images(root)
    images = open_images(root, relabel=True)
    assert images.labels.tolist() == [2, 0, 1, 2]
    assert images.identities == ["0", "2", "5"]
    relabelled = convert(root, tmp_path / "new", "webdataset", relabel=True)
    assert relabelled.identities == ["0", "2", "5"]
    assert content(open_images(tmp_path / "new")) == content(images)
    assert "--relabel" in refused("convert", root, tmp_path / "x", "--to", "folder")


def test_a_class_count_that_disagrees(tmp_path):
    with pytest.raises(
        DataError, match=r"train.rec, offset \d+: label 2, expected one in \[0, 2\)"
    ):
        open_images(records(tmp_path / "few", [0, 1, 2], "2,12,10"))
    with pytest.raises(DataError, match="1 of 4 labels have no image, the first is 3"):
        open_images(records(tmp_path / "many", [0, 1, 2], "4,12,10"))
    root = records(tmp_path / "names", [0, 1, 2], "3,12,10")
    (root / IDENTITIES).write_text('["a", "b"]')
    with pytest.raises(DataError, match="3 classes, but 2 names of classes"):
        open_images(root)
    (root / IDENTITIES).write_text('["a", "b", "a"]')
    with pytest.raises(DataError, match="names of the 3 classes are not distinct"):
        open_images(root)


def test_a_resumed_run_refuses_another_number_of_classes(few, tmp_path):
    convert(few, tmp_path / "rec", "recordio")
    options = ["--holdout", "0", "--epochs", "1", "--size", "16x16", "--embedding-size", "8"]
    call("train", "--data", tmp_path / "rec", "--output", tmp_path / "run", *options)
    for file in (tmp_path / "rec").iterdir():
        file.unlink()
    (tmp_path / "rec").rmdir()
    folder(tmp_path / "more", people=5)
    convert(tmp_path / "more", tmp_path / "rec", "recordio")
    shown = " ".join(refused("train", "--resume", tmp_path / "run").split())
    assert "is of another run: its data's fingerprint is not that of" in shown


@pytest.mark.parametrize("number", [-1.0, 0.5, float("nan"), float("inf"), 2.0**25])
def test_a_label_must_be_a_small_integer(tmp_path, number):
    with pytest.raises(DataError, match=r"train.rec, offset \d+: label .* expected an integer"):
        open_images(records(tmp_path / "rec", [0, number, 1]))


def test_images_of_another_size_than_the_property_says(tmp_path, few):
    root = records(tmp_path / "rec", [0, 1, 0, 1], "2,12,11")
    with pytest.raises(DataError, match=r"offset \d+: decodes to 12x10 pixels, expected 12x11"):
        read_folder(root)
    with TwoDomainLoader(root, few, 2) as loader:
        assert loader.image_shape[:2] == (12, 11)
        with pytest.raises(DataError, match=r"train.rec, offset \d+ cannot be used.*12x10 pixels"):
            next(loader)


# -- RecordIO


def test_recordio_is_framed_as_mxnet_does(tmp_path):
    """The layout is restated here from dmlc-core's header."""
    hidden = b"head" + MAGIC + b"xy" + MAGIC + b"abMN" + MAGIC  # at offsets 4, 10 and 18
    framed = _frame(hidden)
    words = struct.unpack_from("<II", framed)
    assert words == (0xCED7230A, 1 << 29 | 4)
    assert framed[8:12] == b"head"
    kind_and_size = struct.unpack_from("<II", framed, 12)
    assert kind_and_size == (0xCED7230A, 3 << 29 | len(hidden) - 8)  # the others are not aligned
    assert len(framed) % 4 == 0
    assert _frame(b"abcde") == MAGIC + struct.pack("<I", 5) + b"abcde\0\0\0"
    middle = _frame(MAGIC * 2)
    assert [w >> 29 for w in struct.unpack("<6I", middle)[1::2]] == [1, 2, 3]


def test_records_of_several_parts_and_labels(tmp_path):
    png = picture(0, kind="PNG")
    images = [png + bytes(-len(png) % 4) + MAGIC + b"tail", png + MAGIC * 3, png]
    (tmp_path / "rec").mkdir()
    with (
        (tmp_path / "rec" / "train.rec").open("wb") as rec,
        (tmp_path / "rec" / "train.idx").open("w") as idx,
    ):
        for key, (image, labels) in enumerate(zip(images, ([1], [0, 9], [0, 7, 7]), strict=True)):
            idx.write(f"{key}\t{rec.tell()}\n")
            rec.write(_frame(_pack(labels, key, image)))
    got = open_images(tmp_path / "rec")
    assert got.labels.tolist() == [1, 0, 0]
    assert [sample.content for sample in got.samples()] == images
    assert content(convert(got, tmp_path / "again", "recordio")) == content(got)


def test_record_0_says_which_records_are_images(few, tmp_path):
    """Record 0 and the ranges of identities are as insightface's own reader takes them."""
    convert(few, tmp_path / "rec", "recordio")
    lines = (tmp_path / "rec" / "train.idx").read_text().splitlines()
    offsets = dict(tuple(map(int, line.split("\t"))) for line in lines)
    rec = (tmp_path / "rec" / "train.rec").read_bytes()

    def labels(key: int) -> tuple:
        magic, size, flag, single = struct.unpack_from("<IIIf", rec, offsets[key])
        assert magic == 0xCED7230A
        many = struct.unpack_from(f"<{flag}f", rec, offsets[key] + 32)
        assert size == 24 + 4 * flag or flag == 0
        return many or (single,)

    assert labels(0) == (13, 17)
    assert [labels(key) for key in range(13, 17)] == [(1, 4), (4, 7), (7, 10), (10, 13)]
    assert [labels(key)[0] for key in range(1, 13)] == [i // 3 for i in range(12)]
    assert (tmp_path / "rec" / "property").read_text() == "4,12,10\n"
    assert (tmp_path / "rec" / "train.lst").read_text().splitlines()[3] == "4\t1\tp2/4"


def patch(file: Path, at: int, data: bytes) -> None:
    content = bytearray(file.read_bytes())
    content[at : at + len(data)] = data
    file.write_bytes(content)


def test_damaged_records_are_named(few, tmp_path):
    convert(few, tmp_path / "rec", "recordio")
    rec, idx = tmp_path / "rec" / "train.rec", tmp_path / "rec" / "train.idx"
    sound, index = rec.read_bytes(), idx.read_text()
    fourth = int(index.splitlines()[3].split("\t")[1])
    for damage, message in (
        (lambda: patch(rec, fourth, b"x"), rf"offset {fourth}: no record begins"),
        (lambda: patch(rec, fourth + 7, b"\xe0"), rf"offset {fourth}.* out of its order|kind 7"),
        (
            lambda: patch(rec, fourth + 4, b"\xff\xff\xff\x1f"),
            rf"offset {fourth}: .*over the limit",
        ),
        (lambda: patch(rec, fourth + 4, b"\x05\0\0\0"), rf"offset {fourth}: a record of 5 bytes"),
        (
            lambda: patch(rec, fourth + 8, b"\xff\xff"),
            rf"offset {fourth}: .*announces 65535 labels",
        ),
        (lambda: rec.write_bytes(sound[: fourth + 9]), "too short for the record"),
        (lambda: rec.write_bytes(b""), "too short for the record"),
        (lambda: idx.write_text(index + "junk\n"), r"train.idx, line 18: expected a key, a tab"),
        (lambda: idx.write_text(index + "3\t8\n"), "the key 3 twice"),
        (lambda: idx.write_text(index.replace("\n5\t", "\n99\t")), "announces 12 images.* has 11"),
        (lambda: (tmp_path / "rec" / "property").write_text("4;1"), "property must be the number"),
    ):
        rec.write_bytes(sound)
        idx.write_text(index)
        damage()
        with pytest.raises(DataError, match=message):
            open_images(tmp_path / "rec")
    assert len(MAGIC) == 4
    assert MAX_PART == 2**29 - 1


# -- WebDataset


def test_webdataset_reads_ours_and_we_read_its(few, tmp_path):
    convert(few, tmp_path / "ours", "webdataset")
    got = [
        (
            sample["cls"].decode(),
            next(v for k, v in sample.items() if k not in ("cls",) and k[0] != "_"),
        )
        for sample in webdataset.WebDataset(
            str(tmp_path / "ours" / "000000.tar"), shardshuffle=False
        )
    ]
    assert got == [(str(int(name[1:]) - 1), image) for name, image in expected(few)]
    with webdataset.TarWriter(str(tmp_path / "theirs.tar"), encoder=False) as writer:
        for i in range(6):
            label_of = {"cls": b"%d" % (i % 2)} if i < 3 else {"json": b'{"label": %d}' % (i % 2)}
            writer.write({"__key__": f"a/{i:03d}", "jpg": picture(i, kind="JPEG"), **label_of})
    theirs = open_images(tmp_path / "theirs.tar")
    assert content(theirs) == [(str(i % 2), picture(i, kind="JPEG")) for i in range(6)]


def archive(path: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, BytesIO(member[1]))
    return path


def test_shards_that_are_not_as_expected(tmp_path):
    link = tarfile.TarInfo("1.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    image = picture(0)
    for members, message in (
        ([("1.png", image)], "sample '/1' has no label"),
        ([("1.cls", b"0")], "sample '/1' has no image"),
        ([("1.png", image), ("1.jpg", image), ("1.cls", b"0")], "has a second image"),
        ([("1.png", image), ("1.cls", b"x")], "expected a label, an integer ≥ 0, got b'x'"),
        ([("1.png", image), ("1.cls", b"-1")], "expected a label"),
        ([("1.png", image), ("1.json", b"[" * 50_000)], "expected a label"),
        ([("1.png", image), ("1.cls", b"1"), ("1.json", b'{"label": 2}')], "labels 1 and 2"),
        ([("1.png", image), ("1.cls", b"0" * 70_000)], "a label of 70,000 bytes"),
        ([link], "'1.png' is not a regular file"),
    ):
        with pytest.raises(
            DataError, match=rf"x.tar, (before )?offset \d+: .*{re.escape(message)}"
        ):
            open_images(archive(tmp_path / "x.tar", *members))
    whole = archive(tmp_path / "x.tar", ("1.png", image), ("1.cls", b"0")).read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:700])
    with pytest.raises(DataError, match=r"x.tar is not a whole tar file: unexpected end of data"):
        open_images(tmp_path / "x.tar")


def test_a_header_that_announces_gigabytes_is_not_believed(tmp_path):
    pax = tarfile.TarInfo("pax")
    pax.type, pax.size = tarfile.XHDTYPE, 1 << 33
    raw = pax.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    for name, data in (("x.tar", raw), ("y.tar.gz", gzip.compress(raw))):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="an extended header of 8,589,934,592 bytes"):
            open_images(tmp_path / name)


# -- Parquet and Arrow


def parquet(path: Path, **columns) -> Path:
    pa.parquet.write_table(pa.table(columns), path)
    return path


def test_tables_of_other_makers(tmp_path):
    images = [picture(i) for i in range(4)]
    names = ["s2", "s10", "s2", "s1"]
    strings = open_images(
        parquet(tmp_path / "a.parquet", jpg=images, person=names, score=[0.5] * 4)
    )
    assert strings.identities == ["s1", "s2", "s10"]
    assert strings.labels.tolist() == [1, 2, 1, 0]
    assert [s.content for s in strings.samples()] == images
    for missing, message in (
        ({"text": ["x"] * 4, "label": [0] * 4}, "which column holds the images.*text \\(string\\)"),
        ({"image": images, "score": [0.5] * 4}, "which column holds the labels"),
        ({"image": images, "a": [0] * 4, "b": [1] * 4}, "which column holds the labels"),
        ({"image": images, "label": [0, None, 1, 0]}, "1 rows have no label"),
    ):
        with pytest.raises(DataError, match=message):
            open_images(parquet(tmp_path / "b.parquet", **missing))
    lacking = open_images(
        parquet(
            tmp_path / "c.parquet",
            image=[{"bytes": images[0], "path": "a"}, {"bytes": None, "path": "b"}],
            label=[0, 1],
        )
    )
    with pytest.raises(
        DataError, match=r"c\.parquet, row 1: the row has no bytes, and its path 'b' is no"
    ):
        list(lacking.samples())


def test_splits(few, tmp_path):
    convert(few, tmp_path / "set", "parquet")
    data = tmp_path / "set" / "data"
    (data / "test-00000-of-00001.parquet").write_bytes(b"never opened")
    assert len(open_images(tmp_path / "set")) == 12
    (data / "train-00000-of-00001.parquet").unlink()
    (data / "validation-00000-of-00001.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"splits \['test', 'validation'\]; name a file of one"):
        open_images(tmp_path / "set")
    convert(few, tmp_path / "dict" / "train", "arrow")
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    assert content(open_images(tmp_path / "dict")) == expected(few)
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["../../faces"]}')
    with pytest.raises(DataError, match="name the folder of one"):
        open_images(tmp_path / "dict")
    state = tmp_path / "dict" / "train" / "state.json"
    state.write_text(json.dumps({"_data_files": [{"filename": "../../x.arrow"}]}))
    with pytest.raises(DataError, match=r"state.json must name the files of its folder"):
        open_images(tmp_path / "dict" / "train")


def test_more_rows_than_bytes_are_not_believed(tmp_path):
    """Millions of labels take a few bytes when they are all the same."""
    count = 1_000_000
    table = pa.table(
        {"image": pa.repeat(pa.scalar(b""), count), "label": np.zeros(count, np.int64)}
    )
    pa.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=count)
    with pytest.raises(DataError, match=r"1,000,000 rows in \d,\d+ bytes"):
        open_images(tmp_path / "x.parquet")


def test_without_pyarrow_the_error_says_what_to_install(few, tmp_path, monkeypatch):
    convert(few, tmp_path / "set", "parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        ImportError, match=r'needs pyarrow.*pip install "synface-kernels\[parquet\]"'
    ):
        open_images(tmp_path / "set")


# -- names of identities


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "a\0b", "n" * 201, "c:d"])
def test_a_name_that_is_no_folders_is_not_written(few, tmp_path, name):
    convert(few, tmp_path / "set", "webdataset")
    (tmp_path / "set" / IDENTITIES).write_text(json.dumps(["p1", name, "p3", "p4"]))
    with pytest.raises(DataError, match="is not a valid folder name"):
        convert(tmp_path / "set", tmp_path / "out", "folder")
    assert sorted(os.listdir(tmp_path)) == ["faces", "set"]
