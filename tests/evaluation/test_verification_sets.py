"""Readers of verification sets: pickles as data, pairs and templates."""

from __future__ import annotations

import os
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest
import torch
from synface.data import DataError
from synface.evaluation import report, safe_pickle
from synface.evaluation.report import evaluate_set, pool
from synface.evaluation.sets import PairSet, TemplateSet, open_set, read_bin
from torch import nn

from tests.helpers.verification_sets import SAME, Flat, images, png

# -- .bin


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["bytes", "bytearray", "arrays", "objects", "strings", "scalars"])
def test_a_bin_is_read_as_it_was_written(tmp_path, protocol, kind):
    wanted, same = images(), SAME
    value: object = {
        "bytes": (wanted, same),
        "bytearray": [[bytearray(image) for image in wanted], tuple(same)],
        "arrays": ([np.frombuffer(image, np.uint8) for image in wanted], np.array(same)),
        "objects": (np.array(wanted, object), np.array(same, object)),
        "strings": (np.array(wanted, np.bytes_), np.array(same, np.int64)),
        "scalars": (wanted, [np.bool_(x) for x in same]),
    }[kind]
    (tmp_path / "x.bin").write_bytes(pickle.dumps(value, protocol))
    found = read_bin(tmp_path / "x.bin")
    assert [found.store.read(i) for i in range(8)] == [bytes(image) for image in wanted]
    assert found.same.tolist() == same
    assert found.first.tolist() == [0, 2, 4, 6]
    assert found.second.tolist() == [1, 3, 5, 7]
    assert found.people is None


def test_a_bin_of_python_2(tmp_path):
    """Python 2's strings are bytes, by opcodes that Python 3 does not write."""
    wanted = images(2)
    text = b"".join(b"T" + len(w).to_bytes(4, "little") + w for w in wanted)
    (tmp_path / "x.bin").write_bytes(b"\x80\x02](" + text + b"e]\x88a\x86.")
    found = read_bin(tmp_path / "x.bin")
    assert [found.store.read(i) for i in range(2)] == wanted
    assert found.same.tolist() == [True]
    raw = (tmp_path / "x.bin").read_bytes()
    assert found.store.name(1) == f"{tmp_path / 'x.bin'}, image 1, offset {raw.rindex(wanted[1])}"


def test_the_folds_of_a_bin_are_runs_of_pairs(tmp_path):
    image = images(1)[0]
    (tmp_path / "x.bin").write_bytes(pickle.dumps(([image] * 46, [True] * 23), 4))
    fold = read_bin(tmp_path / "x.bin").fold
    assert np.bincount(fold).tolist() == [3, 3, 3, 2, 2, 2, 2, 2, 2, 2]
    assert (np.diff(fold) >= 0).all()


class Command:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_a_pickle_that_calls_is_refused_and_nothing_runs(tmp_path, protocol):
    marker, file = tmp_path / "executed", tmp_path / "x.bin"
    for value in (Command(marker), ([Command(marker)], [True]), (images(2), [Command(marker)])):
        file.write_bytes(pickle.dumps(value, protocol))
        with pytest.raises(DataError, match=rf"{file}, offset \d+: .*(posix.system|bytes2|opcode)"):
            read_bin(file)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Command(marker), protocol))
    assert marker.exists()  # so it would have run


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"cos\nsystem\n(S'x'\ntR.", "asks for os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "asks for os.system"),
        (b"(S'x'\nios\nsystem\n.", "opcode (STRING|INST)"),
        (b"\x80\x02cnumpy\nload\n.", "asks for numpy.load"),
        (b"\x80\x02c__builtin__\neval\n.", "asks for __builtin__.eval"),
        (b"\x80\x02cnumpy\nndarray\n)R.", "asks for a call of numpy.ndarray"),
        (b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x05\0\0\0rot13\x86R.", "the coding 'rot13'"),
        (b"\x80\x02}.", "opcode EMPTY_DICT"),
        (b"\x80\x02\x82\x01.", "opcode EXT1"),
        (b"\x80\x02Pabc\n.", "opcode PERSID"),
        (b"\x80\x02]", "not a whole pickle"),
        (b"\x80\x02a.", "not a whole pickle"),
        (b"\x80\x02h\x05.", "not a whole pickle"),
        (b"\x80\x02(.", "hold two lists|not a whole pickle"),
        (b"\x80\x02T\xff\xff\xff\x7fab", "not a whole pickle"),
        (b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7fab", "not a whole pickle"),
        (b"", "is empty"),
        (b"\x80\x02K\x01.", "must hold two lists"),
        (pickle.dumps(([b"x"], [True])), "1 images for 1 pairs"),
        (pickle.dumps(([], [])), "holds no pair"),
        (pickle.dumps(([1, 2], [True])), "list of images: expected the bytes of an image, got int"),
        (pickle.dumps(([b"x", b"y"], [2])), "list of booleans: expected a boolean, got 2"),
        (pickle.dumps(([b"x", b"y"], b"1")), "list of booleans: expected a list"),
        (pickle.dumps((np.zeros(2), [True])), "NumPy array of 'f8'"),
    ],
)
def test_a_pickle_of_anything_else_is_a_clear_error(tmp_path, raw, message):
    (tmp_path / "x.bin").write_bytes(raw)
    with pytest.raises(DataError, match=f"x.bin.*({message})"):
        read_bin(tmp_path / "x.bin")


def test_an_array_must_have_as_many_items_as_it_says(tmp_path):
    raw = pickle.dumps(np.arange(7, dtype=np.uint8), 2)
    assert raw.count(b"K\x07") == 1
    (tmp_path / "x").write_bytes(raw)
    assert safe_pickle.load(tmp_path / "x").items == bytes(range(7))
    (tmp_path / "x").write_bytes(raw.replace(b"K\x07", b"K\x09"))
    with pytest.raises(DataError, match=r"shape \(9,\) without as many items"):
        safe_pickle.load(tmp_path / "x")


def test_every_opcode_is_either_known_or_refused(tmp_path):
    """Opcodes that call, import or make objects are refused."""
    acting = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"}
    machine = safe_pickle._Machine(tmp_path)
    for opcode in pickletools.opcodes:
        if opcode.name in acting | {"EMPTY_DICT", "SETITEM", "SETITEMS", "DICT", "NEXT_BUFFER"}:
            with pytest.raises(safe_pickle._Refused, match=f"opcode {opcode.name}"):
                machine.step(opcode.name, None, 0)


# -- pairs


@pytest.fixture
def people(tmp_path) -> Path:
    """Three people, four images each, named in two ways."""
    for number, name in enumerate(("Ann_Lee", "Bo", "C d")):
        (tmp_path / name).mkdir()
        for i in range(1, 5):
            file = f"{name}_{i:04d}.jpg" if number % 2 == 0 else f"{i:02d}.png"
            (tmp_path / name / file).write_bytes(images(12)[4 * number + i - 1])
    return tmp_path


def test_pairs_of_lfw(people):
    lines = ["2\t2"]
    for first in (1, 2):
        lines += [f"Ann_Lee\t{first}\t3", f"Bo\t{first}\t4"]
        lines += [f"Ann_Lee\t{first}\tBo\t1", f"C d\t{first}\tAnn_Lee\t4"]
    (people / "pairs.txt").write_text("\n".join(lines) + "\n\n")
    found = open_set(people / "pairs.txt")
    assert isinstance(found, PairSet)
    assert found.same.tolist() == [True, True, False, False] * 2
    assert found.fold.tolist() == [0] * 4 + [1] * 4
    names = [Path(found.store.name(i)).relative_to(people) for i in found.first]
    assert list(map(str, names[:4])) == [
        "Ann_Lee/Ann_Lee_0001.jpg",
        "Bo/01.png",
        "Ann_Lee/Ann_Lee_0001.jpg",
        "C d/C d_0001.jpg",
    ]
    shown = [found.store.name(i).split("/")[-2] for i in range(len(found.store))]
    assert len(set(zip(shown, found.people.tolist(), strict=True))) == 3


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "line 1: expected the numbers"),
        ("x y", "line 1: expected the numbers"),
        ("1\nBo 1 2", "has 1 pairs, its first line announces 1 x 2 x 1"),
        ("1\nBo 1 2\nBo 1 2", "line 3: expected 'name number name number', got 'Bo 1 2'"),
        ("1\nBo 1 9\nBo 1 Ann_Lee 1", "line 2: .*Bo has no image 9"),
        ("1\nBo 1 2\nBo 1 Zoe 1", "Zoe is not a person"),
        ("1\nBo 1 x\nBo 1 Ann_Lee 1", "line 2: 'x' is not an image number"),
        ("1\nBo 1 2\nBo 1 Bo 1", "line 3: 'Bo' twice, where people differ"),
        ("1\n../x 1 2\nBo 1 Ann_Lee 1", "'../x' cannot be the name of a person's folder"),
        ("99999999 99999999", "announces 99999999"),
    ],
)
def test_pairs_that_are_not_as_expected(people, lines, message):
    (people / "pairs.txt").write_text(lines)
    with pytest.raises(DataError, match=message):
        open_set(people / "pairs.txt")


# -- templates


@pytest.fixture
def janus(tmp_path) -> Path:
    """Six images in four templates of two people."""
    for i, image in enumerate(images(6)):
        (tmp_path / f"{i}.png").write_bytes(image)
    rows = [(0, 7, 1), (1, 7, 1), (2, 7, 2), (3, 9, 1), (4, 20, 3), (5, 30, 3)]
    text = "".join(f"{i}.png {template} {media}\n" for i, template, media in rows)
    (tmp_path / "ijb_face_tid_mid.txt").write_text(text)
    (tmp_path / "ijb_template_pair_label.txt").write_text("7 9 0\n7 20 1\n9 30 1\n")
    (tmp_path / "gallery_G1.csv").write_text("TEMPLATE_ID,SUBJECT_ID,X\n7,1,a\n")
    (tmp_path / "gallery_G2.csv").write_text("TEMPLATE_ID,SUBJECT_ID,X\n9,2,a\n")
    (tmp_path / "probe.csv").write_text("TEMPLATE_ID,SUBJECT_ID\n20,1\n30,2\n")
    return tmp_path


def test_templates(janus):
    found = open_set(janus)
    assert isinstance(found, TemplateSet)
    assert found.template.tolist() == [0, 0, 0, 1, 2, 3]
    assert found.media.tolist() == [1, 1, 2, 1, 3, 3]
    assert (found.first.tolist(), found.second.tolist()) == ([0, 0, 1], [1, 2, 3])
    assert found.same.tolist() == [False, True, True]
    assert found.gallery.tolist() == [[0, 1], [1, 2]]
    assert found.probe.tolist() == [[2, 1], [3, 2]]
    result = evaluate_set(Flat(36), found, (6, 6, 1), batch_size=4)
    assert (result.images, result.verification.pairs) == (6, 3)
    assert result.verification.accuracy is None
    assert result.identification.probes == 2


class Shades(nn.Module):
    """A network that maps gray levels 0 to 255 to angles from 0 to 90 degrees."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angle = (x.mean((1, 2, 3)) + 1) * torch.pi / 4
        return torch.stack([angle.cos(), angle.sin()], 1)


def test_a_template_is_searched_once_however_many_images_it_has(tmp_path):
    """The probe of one image is misidentified, that of nine is not; each counts once."""
    shades = {1: [0], 2: [250], 11: [240], 12: [230] * 9}  # templates 1 and 11 show person 1
    lines, tables = [], {"gallery": ["TEMPLATE_ID,SUBJECT_ID,FILENAME"]}
    tables["probe"] = tables["gallery"][:]
    for template, each in shades.items():
        for i, shade in enumerate(each):
            file = f"{template}-{i}.png"
            (tmp_path / file).write_bytes(png(np.full((6, 6), shade, np.uint8)))
            lines.append(f"{file} {template} {i // 3}")
            table = tables["gallery" if template < 10 else "probe"]
            table.append(f"{template},{template % 10},{file}")
    (tmp_path / "x_face_tid_mid.txt").write_text("\n".join(lines))
    (tmp_path / "x_template_pair_label.txt").write_text("1 11 1\n2 12 1\n1 12 0\n")
    for name, rows in tables.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(rows))
    found = evaluate_set(Shades(), open_set(tmp_path), (6, 6, 1)).identification
    assert (found.rank1, found.probes, found.gallery) == (0.5, 2, 2)


def test_pooling_is_the_sum_of_the_medias_means():
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    template, media = torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([4, 4, 9, 4, 1, 1])
    got = pool(rows, template, media)
    wanted = [(rows[0] + rows[1]) / 2 + rows[2], rows[3], (rows[4] + rows[5]) / 2]
    wanted = torch.stack([row / row.norm() for row in wanted])
    torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("ijb_face_tid_mid.txt", "0.png x 1\n", "line 1: expected image, template and media"),
        ("ijb_face_tid_mid.txt", "../../etc/passwd 7 1\n", "line 1: .* is not inside of"),
        ("ijb_face_tid_mid.txt", "", "is empty"),
        ("ijb_template_pair_label.txt", "7 9\n", "expected 3 integers a line"),
        ("ijb_template_pair_label.txt", "7 8 1\n", "template 8 of the pairs has no image"),
        ("ijb_template_pair_label.txt", "7 9 2\n", "label must be 0 or 1"),
        ("probe.csv", "TEMPLATE_ID,SUBJECT_ID\n1,1\n", "template 1 of the probe has no image"),
        ("probe.csv", "TEMPLATE_ID,SUBJECT_ID\n7,a\n", "expected 2 integers a line"),
        (
            "probe.csv",
            "TEMPLATE_ID,SUBJECT_ID\n20,1\n20,2\n",
            r"probe.csv: template 20 is of person 2, and of 1 too",
        ),
        (
            "gallery_G2.csv",
            "TEMPLATE_ID,SUBJECT_ID\n7,2\n9,2\n",
            r"gallery_G2.csv: template 7 is of person 2, and of 1 in .*gallery_G1.csv",
        ),
        ("probe.csv", "TEMPLATE_ID,SUBJECT_ID\n7,1\n", "template 7 is in a gallery and among"),
        (
            "probe.csv",
            "TEMPLATE_ID,SUBJECT_ID\n20,3\n",
            "template 20 of the probes .* person 3, who",
        ),
    ],
)
def test_templates_that_are_not_as_expected(janus, file, text, message):
    (janus / file).write_text(text)
    with pytest.raises(DataError, match=message):
        open_set(janus)


def test_paths_that_are_no_set(tmp_path):
    with pytest.raises(DataError, match=r"0 files \*tid_mid.txt, expected one"):
        open_set(tmp_path)
    with pytest.raises(DataError, match=r"nowhere.bin does not exist"):
        open_set(tmp_path / "nowhere.bin")
    (tmp_path / "x.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"x.zip is not a verification set"):
        open_set(tmp_path / "x.zip")


def test_two_formats_of_one_set_give_the_same_figures(people):
    lines = ["2\t1", "Ann_Lee 1 2", "Ann_Lee 3 Bo 1", "Bo 2 3", "Bo 4 Ann_Lee 4"]
    (people / "pairs.txt").write_text("\n".join(lines))
    pairs = open_set(people / "pairs.txt")
    content = [
        pairs.store.read(i) for pair in zip(pairs.first, pairs.second, strict=True) for i in pair
    ]
    (people / "x.bin").write_bytes(pickle.dumps((content, pairs.same.tolist()), 4))
    results = [
        evaluate_set(Flat(36), data, (6, 6, 1)) for data in (pairs, open_set(people / "x.bin"))
    ]
    assert results[0].verification.auc == results[1].verification.auc
    assert np.array_equal(results[0].verification.fpr, results[1].verification.fpr)
    assert results[0].identification.probes == 6
    assert results[1].identification is None
    assert report.table(results)[2][-1] == "not measured"
