"""The command `synface align`: folders, what could not be placed, and what is resumed."""

from __future__ import annotations

import csv
import json
import re
import sys

import numpy as np
import pytest
from PIL import Image
from skimage.data import astronaut, brick
from synface.alignment import Aligner, settings_of, template
from synface.data import DataError, open_images

from tests.helpers.chips import chip, needs_orl, needs_weights, orl
from tests.helpers.command_line import call, refused

PERSON = astronaut()[:220, 120:340]
POINTS = ",".join(f"{x:.2f}" for x in (template() + 40).ravel())


def write(file, pixels):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def record(folder):
    first, *rows = (folder / "faces.jsonl").read_text().splitlines()
    assert json.loads(first).keys() == {"settings"}
    return [json.loads(row) for row in rows]


@pytest.fixture
def photos(tmp_path):
    """Write two photos without landmarks of their own, and a file that is none."""
    noise = np.random.default_rng(1).integers(0, 256, (200, 180, 3), np.uint8)
    for name in ("ann/1.png", "bob/x/2.png"):
        write(tmp_path / "photos" / name, noise)
    (tmp_path / "photos" / "notes.txt").write_text("notes")
    return tmp_path / "photos"


def marks(tmp_path, *names):
    file = tmp_path / "marks.csv"
    file.write_text("".join(f"{name},{POINTS}\n" for name in names))
    return file


@needs_weights
@needs_orl
@pytest.mark.slow
def test_folders_of_people_become_folders_of_faces(tmp_path):
    random = np.random.default_rng(0)
    for person in (1, 2, 3):
        for number in (1, 2):
            write(tmp_path / f"in/s{person}/{number}.png", chip(orl(person, number), random)[0])
    write(tmp_path / "in/s3/wall.png", brick())
    (tmp_path / "in/s3/cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more")
    out, sheet = tmp_path / "out", tmp_path / "sheet.png"
    shown = call("align", tmp_path / "in", "--output", out, "--preview", sheet, code=1)
    assert "6 faces of 8 photos were written" in shown
    assert "2 of 8 photos could not be placed:" in shown
    assert "in/s3/wall.png: no face found" in shown
    assert "in/s3/cut.jpg: " in shown
    with (out / "not_placed.csv").open() as file:
        names = [row[0].rpartition("/")[2] for row in csv.reader(file)]
    assert names == ["input", "cut.jpg", "wall.png"]
    faces = open_images(out)
    assert faces.identities == ["s1", "s2", "s3"]
    assert [faces[i][0].shape for i in range(6)] == [(112, 112, 3)] * 6
    all_six = [f"s{p}/{n}.png" for p in (1, 2, 3) for n in (1, 2)]
    assert [row["output"] for row in record(out)] == all_six
    for row in record(out):
        assert row["input"] == row["output"]
        assert row["score"] > 0.7
        assert np.shape(row["landmarks"]) == (5, 2)
    assert Image.open(sheet).width > 100

    # what exists is kept, what is missing is written, and what had no face is tried again
    times = {file: file.stat().st_mtime_ns for file in out.rglob("*.png")}
    (out / "s1/1.png").unlink()
    (tmp_path / "in/s3/wall.png").unlink()
    shown = call("align", tmp_path / "in", "--output", out, code=1)
    assert "1 faces of 7 photos were written, those of 5 photos existed" in shown
    changed = [file for file, time in times.items() if file.stat().st_mtime_ns != time]
    assert changed == [out / "s1/1.png"]
    assert sorted(row["output"] for row in record(out)) == all_six
    (tmp_path / "in/s3/cut.jpg").unlink()
    call("align", tmp_path / "in", "--output", out)
    assert not (out / "not_placed.csv").exists()


@needs_weights
def test_all_faces_of_a_photo_are_numbered(tmp_path):
    write(tmp_path / "pair.png", np.concatenate([PERSON, PERSON], axis=1))
    out = tmp_path / "out"
    call("align", tmp_path / "pair.png", "--output", out, "--faces", "all", "--format", "jpg")
    assert sorted(p.name for p in out.glob("*.jpg")) == ["pair_0.jpg", "pair_1.jpg"]
    assert "those of 1 photos existed" in call(
        "align", tmp_path / "pair.png", "--output", out, "--faces", "all", "--format", "jpg"
    )
    shown = refused("align", tmp_path / "pair.png", "--output", out)
    assert "faces of other settings" in shown
    assert "--overwrite" in shown
    call("align", tmp_path / "pair.png", "--output", out, "--overwrite")
    assert [row["output"] for row in record(out)] == ["pair.png"]


def test_landmarks_take_the_place_of_a_detector(tmp_path, photos):
    given = marks(tmp_path, "ann/1.png", "bob/x/2.png")
    options = ("--landmarks", given, "--size", "160x120", "--grayscale")
    shown = call("align", photos, "--output", tmp_path / "out", *options)
    assert "2 faces of 2 photos were written" in shown
    assert "1 files that are no photos were skipped (1 .txt)" in shown
    with Image.open(tmp_path / "out/bob/x/2.png") as face:
        assert (face.size, face.mode) == ((120, 160), "L")
    assert [row["score"] for row in record(tmp_path / "out")] == [None, None]


def test_photos_without_landmarks_or_with_wrong_ones_are_named(tmp_path, photos):
    given = marks(tmp_path, "bob/x/2.png")
    options = ("--output", tmp_path / "out", "--landmarks", given)
    shown = call("align", photos, *options, code=1)
    assert "ann/1.png: no landmarks given" in shown
    given.write_text(f"ann/1.png,{','.join(str(900 + i) for i in range(10))}\n")
    shown = call("align", photos, *options, code=1)
    assert "ann/1.png: the landmarks lie outside the photo of 180x200 pixels" in shown
    given.write_text(f"ann/1.png,{POINTS}\nann/3.png,{POINTS}\n")
    shown = refused("align", photos, *options)
    assert f"{given}, line 2: 'ann/3.png' is none of the 2 images" in shown


def test_photos_that_differ_in_suffix_have_a_face_each(tmp_path):
    for name in ("a.png", "a.bmp", "b.png"):
        write(tmp_path / "in" / name, np.zeros((200, 200, 3), np.uint8))
    given = marks(tmp_path, "a.png", "a.bmp", "b.png")
    call("align", tmp_path / "in", "--output", tmp_path / "out", "--landmarks", given)
    faces = sorted(file.name for file in (tmp_path / "out").glob("*.png"))
    assert faces == ["a.bmp.png", "a.png.png", "b.png"]


def test_an_output_within_the_photos_is_not_searched(tmp_path, photos):
    given = marks(tmp_path, "ann/1.png", "bob/x/2.png")
    for _ in range(2):
        call("align", photos, "--output", photos / "faces", "--landmarks", given)
    assert len(record(photos / "faces")) == 2


def test_a_record_that_was_cut_off_is_continued(tmp_path, photos):
    given = marks(tmp_path, "ann/1.png", "bob/x/2.png")
    call("align", photos, "--output", tmp_path / "out", "--landmarks", given)
    file = tmp_path / "out" / "faces.jsonl"
    whole = file.read_text()
    file.write_text(whole[:-30])
    shown = call("align", photos, "--output", tmp_path / "out", "--landmarks", given)
    assert "1 faces of 2 photos were written, those of 1 photos existed" in shown
    assert file.read_text() == whole
    file.write_text("{}\n[]\n")
    assert "is not a record" in refused(
        "align", photos, "--output", tmp_path / "out", "--landmarks", given
    )


def test_the_settings_of_a_folder_are_read(tmp_path, photos):
    given, out = marks(tmp_path, "ann/1.png", "bob/x/2.png"), tmp_path / "out"
    options = ("--landmarks", given, "--size", "160x120", "--margin", "0.1", "--grayscale")
    call("align", photos, "--output", out, *options)
    settings = settings_of(out)
    aligner = Aligner(settings["size"], margin=settings["margin"])
    assert (aligner.size, aligner.margin, settings["grayscale"]) == ((160, 120), 0.1, True)
    assert settings_of(photos) is None
    good = {"size": [112, 112], "margin": 0, "grayscale": False}
    for wrong in (
        "", "{}", "[1]", '{"settings": 3}', "\xff",
        *(json.dumps({"settings": good | bad}) for bad in (
            {"size": 9}, {"size": [0, 9]}, {"margin": -1}, {"margin": "0"}, {"grayscale": "no"}
        )),
        json.dumps({"settings": {"size": [112, 112]}}),
    ):  # fmt: skip
        (out / "faces.jsonl").write_text(wrong, encoding="latin-1")
        with pytest.raises(DataError, match=r"out/faces\.jsonl is not a record of aligned faces: "):
            settings_of(out)


def test_a_users_detector_is_called(tmp_path, photos, monkeypatch):
    (tmp_path / "own_detector.py").write_text(
        "import numpy as np\nfrom synface.alignment import template\n"
        "def find(image):\n"
        "    return np.array([[0, 0, 90, 90.0]]), np.ones(1), template()[None] + 20\n"
        "def nothing(image):\n    return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ("--output", tmp_path / "out")
    call("align", photos, *options, "--detector", "own_detector:find")
    assert [row["box"] for row in record(tmp_path / "out")] == [[0, 0, 90, 90]] * 2
    options = ("--output", tmp_path / "other", "--detector")
    assert "must return boxes" in refused("align", photos, *options, "own_detector:nothing")
    for wrong, message in {
        "own_detector": "--detector must be package.module:function, got 'own_detector'",
        "own_detector:none": "own_detector:none cannot be imported: .*no attribute 'none'",
        "no_module:find": "no_module:find cannot be imported: No module named 'no_module'",
        ":find": "--detector must be package.module:function, got ':find'",
    }.items():
        assert re.search(message, refused("align", photos, *options, wrong))
    assert "must be a function" in refused("align", photos, *options, "own_detector:np")
    sys.modules.pop("own_detector")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["photos", "--output", "photos"], "the output folder photos must not be an input"),
        (["photos/ann/1.png", "--output", "photos/ann"], "1.png exists, and is no face of an"),
        (["photos/ann/1.png", "--output", "photos/ann", "--overwrite"], "1.png exists, and is no"),
        (
            ["photos/ann/1.png", "--output", "more"],
            "more/1.png exists, and is no face of an earlier",
        ),
        (["none", "--output", "out"], "none does not exist"),
        (["empty", "--output", "out"], "no photo in empty; expected files that end in .bmp, .heic"),
        (["photos/ann", "more", "--output", "out"], "would both be aligned as 1.png"),
        (["photos", "--output", "photos/notes.txt"], "must be a folder that can be written to"),
        (["photos", "--output", "out", "--size", "112"], "--size must be HEIGHTxWIDTH"),
        (
            ["photos", "--output", "out", "--faces", "best"],
            "--faces must be one of largest, center, all, got 'best'",
        ),
        (
            ["photos", "--output", "out", "--format", "gif"],
            "--format must be one of png, jpg, got 'gif'",
        ),
        (["photos", "--output", "out", "--quality", "9"], "--quality has no effect without"),
        (
            ["photos", "--output", "out", "--landmarks", "m.csv", "--min-face", "9"],
            "--min-face has no effect with --landmarks",
        ),
        (
            ["photos", "--output", "out", "--landmarks", "m.csv"],
            "m.csv cannot be read: No such file",
        ),
        (["photos", "--output", "out", "--weights", "w.onnx"], "w.onnx does not exist"),
    ],
)
@needs_weights
def test_what_cannot_be_done_is_refused(tmp_path, photos, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "more" / "1.png", np.zeros((9, 9, 3), np.uint8))
    assert message in refused("align", *words)
