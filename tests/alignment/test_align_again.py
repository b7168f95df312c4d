"""Later calls of `synface align`: what they keep, replace, remove and refuse."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from synface.alignment import Aligner, align_photos, find_photos, folders, template

from tests.helpers.command_line import call, refused

NOISE = np.random.default_rng(1).integers(0, 256, (200, 180, 3), np.uint8)
NAMES = ("ann/1.png", "ann/2.png", "bob/1.png")


def detector(image):
    """Find as many faces as the first pixel says."""
    sides = 90.0 - np.arange(image[0, 0, 0])
    boxes = np.stack([0 * sides, 0 * sides, sides, sides], axis=1)
    return boxes, 0 * sides + 1, template() + 0 * sides[:, None, None]


def other(image):
    return detector(image)


def photo(file, faces=1):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((120, 120, 3), faces, np.uint8)).save(file)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return a folder of three photos, and a call of the command with a detector for them."""
    for name in NAMES:
        photo(tmp_path / "in" / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "counting", sys.modules[__name__])
    return tmp_path


OPTIONS = ("--detector", "counting:detector", "--output", "out")


def pictures(folder="out"):
    return sorted(p.relative_to(folder).as_posix() for p in folders.Path(folder).rglob("*.[pj]*g"))


def settings_and_rows(file="out/faces.jsonl"):
    first, *rows = folders.Path(file).read_text().splitlines()
    return json.loads(first)["settings"], [json.loads(row)["output"] for row in rows]


def test_faces_of_two_settings_are_never_in_one_folder(place):
    call("align", "in", *OPTIONS)
    before = settings_and_rows()
    for options, change in {
        ("--margin", "0.5"): "(margin 0.0, now 0.5)",
        ("--threshold", "0.5"): "(threshold 0.7, now 0.5)",
        ("--min-face", "30"): "(min_face 40, now 30)",
        ("--format", "jpg"): "(format png, now jpg, quality None, now 95)",
        ("--detector", "counting:other"): "(detector ",
    }.items():
        shown = refused("align", "in", *OPTIONS, *options)
        assert f"out has faces of other settings {change}" in shown
        assert "choose another output, or --overwrite" in shown
        (place / "some/bob").mkdir(parents=True, exist_ok=True)
        photo(place / "some/bob/1.png")
        shown = refused("align", "some", *OPTIONS, *options, "--overwrite")
        assert f"out has faces of other settings {change}" in shown
        assert "all of its photos, such as ann/1.png, which is not among those given" in shown
    assert settings_and_rows() == before
    assert pictures() == list(NAMES)
    call("align", "in", *OPTIONS, "--margin", "0.5", "--overwrite")
    assert settings_and_rows() == (before[0] | {"margin": 0.5}, list(NAMES))


def test_faces_that_are_not_written_again_are_removed(place):
    photo(place / "in/ann/1.png", faces=2)
    call("align", "in", *OPTIONS, "--faces", "all", "--format", "jpg")
    assert pictures() == ["ann/1_0.jpg", "ann/1_1.jpg", "ann/2_0.jpg", "bob/1_0.jpg"]
    photo(place / "in/ann/2.png", faces=0)
    call("align", "in", *OPTIONS, "--overwrite", code=1)
    assert pictures() == ["ann/1.png", "bob/1.png"] == settings_and_rows()[1]


def test_a_picture_that_is_not_recorded_is_never_replaced(place):
    photo(place / "out/ann/2.png")
    own = (place / "out/ann/2.png").read_bytes()
    for more in ([], ["--overwrite"]):
        assert "out/ann/2.png exists, and is no face of an" in refused(
            "align", "in", *OPTIONS, *more
        )
    call("align", "in/bob", *OPTIONS)
    for more in ([], ["--overwrite"]):
        assert "out/ann/2.png exists, and is no face of an" in refused(
            "align", "in", *OPTIONS, *more
        )
    assert (place / "out/ann/2.png").read_bytes() == own
    photo(place / "other/1.bmp")
    assert "out/1.png exists, and is the face of 1.png" in refused("align", "other", *OPTIONS)


@pytest.mark.parametrize("name", ["1_0.png", "1_7.png", "1_12.png"])
def test_no_numbered_picture_is_replaced(place, name):
    photo(place / "out/ann" / name)
    for free in ("1.png", "1_0.jpg", "1_01.png", "3_0.png", "1_x.png"):
        photo(place / "out/ann" / free)
    shown = refused("align", "in", *OPTIONS, "--faces", "all", "--overwrite")
    assert f"out/ann/{name} exists, and is no face of an earlier call" in shown
    (place / "out/ann" / name).unlink()
    call("align", "in", *OPTIONS, "--faces", "all")


def test_a_photo_is_not_removed_as_a_face(place):
    call("align", "in/ann", *OPTIONS)
    shown = refused("align", "out/1.png", *OPTIONS, "--overwrite")
    assert "out/1.png is a face of an earlier call, which would be removed" in shown
    assert pictures() == ["1.png", "2.png"]


def test_a_record_names_no_picture_elsewhere(place):
    call("align", "in", *OPTIONS)
    file = place / "out/faces.jsonl"
    whole = file.read_text()
    for wrong in (
        "../in/ann/1.png",
        f"{place}/in/ann/1.png",
        "ann/../../in/ann/1.png",
        "notes.txt",
    ):
        file.write_text(whole.replace('"output": "ann/1.png"', f'"output": "{wrong}"'))
        assert "is no picture in the folder" in refused("align", "in", *OPTIONS, "--overwrite")
    assert (place / "in/ann/1.png").exists()


KILLED = """
import os, sys
from pathlib import Path
from synface.alignment import Aligner, align_photos, find_photos, folders
from tests.alignment.test_align_again import detector

def killed(path, *others):
    if path.name == "2.png" and sys.argv[1] == "before":
        os._exit(9)
    write(path, *others)
    if path.name == "2.png":
        os._exit(9)

detector.__module__ = sys.argv[2]
write, folders._write = folders._write, killed
align_photos(find_photos([Path("in")], Path("out"))[0], Path("out"), Aligner(detector=detector))
"""


@pytest.mark.parametrize(("when", "kept"), [("before", 1), ("after", 2)])
def test_a_call_that_was_killed_is_continued(place, when, kept):
    paths = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", KILLED, when, __name__], env=os.environ | paths)
    assert done.returncode == 9
    shown = call("align", "in", *OPTIONS)
    assert f"{3 - kept} faces of 3 photos were written, those of {kept} photos existed" in shown
    assert pictures() == list(NAMES) == settings_and_rows()[1]


@pytest.mark.parametrize(
    ("more", "what"), [([], "the same command"), (["--overwrite"], "the command without --overw")]
)
def test_an_interruption_says_how_to_continue(place, monkeypatch, more, what):
    def interrupted(*_):
        raise KeyboardInterrupt

    call("align", "in", *OPTIONS)
    (place / "out/ann/2.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(folders, "_write", interrupted)
        shown = call("align", "in", *OPTIONS, *more, code=130)
    assert f"interrupted: {what}" in shown
    call("align", "in", *OPTIONS)
    assert pictures() == list(NAMES) == settings_and_rows()[1]


def test_other_landmarks_are_other_settings(place):
    marks = place / "marks.json"
    marks.write_text(json.dumps({name: template().tolist() for name in NAMES}))
    options = ("--output", "out", "--landmarks", marks)
    call("align", "in", *options)
    assert "those of 3 photos existed" in call("align", "in", *options)
    marks.write_text(json.dumps({name: (template() + 1).tolist() for name in NAMES}))
    assert "by other landmarks" in refused("align", "in", *options)
    call("align", "in", *options, "--overwrite")


def test_reasons_of_other_photos_are_kept(place):
    for name in ("ann/2.png", "bob/1.png"):
        photo(place / "in" / name, faces=0)

    def listed():
        with (place / "out/not_placed.csv").open(newline="") as file:
            return [row[0] for row in csv.reader(file)]

    call("align", "in/ann", "--output", "out", *OPTIONS[:2], code=1)
    call("align", "in", "--output", "out", *OPTIONS[:2], code=1)
    both = [str(place / "in" / name) for name in ("ann/2.png", "bob/1.png")]
    assert listed() == ["input", *both]
    photo(place / "in/ann/2.png")
    call("align", "in/ann", "--output", "out", *OPTIONS[:2])
    assert listed() == ["input", both[1]]
    (place / "out/not_placed.csv").write_text("my,own\n1,2\n")
    assert "not_placed.csv is no list of photos without" in refused("align", "in", *OPTIONS)


def test_people_behind_links_are_found_without_circles(place):
    (place / "in/carl").symlink_to(place / "in/ann")
    (place / "in/ann/up").symlink_to(place / "in")
    (place / "in/ann/faces").symlink_to(place / "out")
    (place / "in/ann/gone.png").symlink_to(place / "none")
    call("align", "in/ann", "--output", "out", *OPTIONS[:2])
    photos, skipped = find_photos([place / "in"], place / "out")
    assert [photo.name for photo in photos] == [*NAMES, "carl/1.png", "carl/2.png"]
    assert skipped == {"broken links or devices": 2}


def test_names_of_faces_are_distinct(place):
    for name in ("a.jpg", "a.png", "a.jpg.png", "b.png"):
        photo(place / "many" / name)
    photos, _ = find_photos([place / "many"], place / "out")
    assert [photo.stem for photo in photos] == ["a.jpg", "a.jpg.png", "a.png", "b"]
    align_photos(photos, place / "out", Aligner(detector=detector))
    assert len(pictures()) == 4


# -- the preview


def test_a_preview_replaces_nothing_unasked(place):
    (place / "mine.png").write_bytes(b"mine")
    assert "mine.png exists: choose another" in refused(
        "align", "in", *OPTIONS, "--preview", "mine.png"
    )
    assert "--preview must end in .png, got in" in refused(
        "align", "in", *OPTIONS, "--preview", "in/ann/1.jpg"
    )
    assert not (place / "out").exists()
    call("align", "in", *OPTIONS, "--preview", "mine.png", "--overwrite")
    assert Image.open("mine.png").width > 100


def test_a_preview_that_fails_loses_nothing(place, monkeypatch):
    photo(place / "in/bob/1.png", faces=0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("synface.reporting.plots.image_grid", full)
    shown = refused("align", "in", *OPTIONS, "--preview", "sheet.png")
    assert "2 faces of 3 photos were written" in shown
    assert "in/bob/1.png: no face found" in shown


def test_names_that_matplotlib_would_interpret_are_drawn(place):
    photo(place / "in/a$b_{$.png")
    photo(place / "in/\udcff\n.png")
    call("align", "in", *OPTIONS, "--preview", "sheet.png")
    assert Image.open("sheet.png").width > 100


def test_a_missing_decoder_is_named_with_its_photo_once(place, monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.new("RGB", (64, 64))).save("in/ann/1.heic")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    shown = call("align", "in", *OPTIONS, code=1)
    (line,) = [line for line in shown.splitlines() if "needs pillow_heif" in line]
    assert line.count("1.heic") == 1
