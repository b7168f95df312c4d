"""The command `synface leak`, called as users call it."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from synface.data import convert, open_images
from synface.evaluation import embed_pixels, embed_store, nearest_of_another
from synface.synthesis.packing import closest_pairs, nearest_cosines
from synface.training.model import load_backbone

from tests.helpers.command_line import call, refused
from tests.helpers.images import folder, truncate
from tests.helpers.training import TINY

FILES = ["closest.png", "leak.csv", "leak.json", "nearest.png"]


@pytest.fixture
def faces(tmp_path, monkeypatch) -> Path:
    """Write real and synthetic people; two synthetic images are copies of a real one, one RGB."""
    monkeypatch.chdir(tmp_path)
    folder(Path("real"), 5, 4, seed=0)
    folder(Path("synthetic"), 4, 3, seed=1)
    with Image.open("real/p2/1.png") as image:
        image.convert("RGB").save("synthetic/p0/copy.bmp")
    shutil.copy("real/p2/1.png", "synthetic/p3/$x$ again.png")
    return tmp_path


def report(where="leak-report"):
    """Return the report's JSON and the rows of its table."""
    with open(f"{where}/leak.csv", newline="") as file:
        rows = list(csv.reader(file))
    return json.loads(Path(where, "leak.json").read_text()), rows


def names(where="leak-report"):
    return sorted(path.name for path in Path(where).iterdir())


def test_images_are_compared_by_pixels(faces):
    shown = call("leak", "real", "synthetic", "--top", 7)
    assert names() == FILES
    found, (header, *rows) = report()
    real, synthetic = open_images("real"), open_images("synthetic")
    a, b = (embed_pixels(each.store, (56, 48, 3)) for each in (real, synthetic))
    wanted = closest_pairs(b, a, 7)
    assert [pair["cosine"] for pair in found["closest"]] == [pair.cosine for pair in wanted]
    assert [pair["synthetic"]["row"] for pair in found["closest"]] == [pair.i for pair in wanted]
    assert found["closest"][0]["synthetic"] == {
        "row": 3, "name": "synthetic/p0/copy.bmp", "identity": "p0",
    }  # fmt: skip
    assert found["closest"][0]["real"] == {"row": 9, "name": "real/p2/1.png", "identity": "p2"}
    assert found["compared_by"] == {
        "kind": "pixels", "image_shape": [56, 48, 3], "dimension": 8064,
    }  # fmt: skip
    assert found["real"] == {"source": "real", "kind": "images", "rows": 20, "identities": 5}
    assert found["copies"] == 2
    assert [pair["real"]["row"] for pair in found["first_copies"]] == [9, 9]
    nearest = found["nearest"]
    assert set(nearest) == {"synthetic to real", "real to another identity"}
    assert nearest["synthetic to real"]["quantiles"]["maximum"] == 1.0
    within = nearest_of_another(a, torch.as_tensor(real.labels))
    ordered = within.double().sort().values.tolist()
    quantiles = nearest["real to another identity"]["quantiles"]
    assert quantiles == {
        "median": ordered[9], "90 %": ordered[17], "99 %": ordered[19], "maximum": ordered[19],
    }  # fmt: skip
    assert header == [
        "rank", "cosine", "synthetic_row", "synthetic_name", "synthetic_identity", "real_row",
        "real_name", "real_identity",
    ]  # fmt: skip
    assert [(float(row[1]), int(row[2]), int(row[5])) for row in rows] == wanted
    assert rows[1][3] == "synthetic/p3/$x$ again.png"
    assert "1. cosine 1.000000: synthetic/p0/copy.bmp and real/p2/1.png" in shown
    assert "images of synthetic with the pixels of one of real: 2" in shown
    for name in ("closest.png", "nearest.png"):
        with Image.open(Path("leak-report", name)) as picture:
            assert min(picture.size) > 200


def test_names_of_any_bytes_are_reported(faces):
    name = b"synthetic/p1/\xe5\xbc\xa0\xff.png"  # a character that plots lack, and no UTF-8
    shutil.copy(b"real/p0/0.png", name)
    call("leak", "real", "synthetic", "--top", 3)
    assert names() == FILES
    assert name in Path("leak-report/leak.csv").read_bytes()
    found = json.loads(Path("leak-report/leak.json").read_bytes())
    assert name in {os.fsencode(pair["synthetic"]["name"]) for pair in found["closest"]}


@pytest.mark.usefixtures("blank_figures")
def test_a_threshold_is_the_exit_status(faces):
    a, b = (embed_pixels(open_images(x).store, (20, 18, 3)) for x in ("real", "synthetic"))
    known = closest_pairs(b, a, 10**4)
    at = known[9].cosine  # the pair itself is not above it
    options = ["--size", "20x18", "--top", 3, "--threshold"]
    shown = call("leak", "real", "synthetic", *options, at, code=1)
    assert "pairs with a cosine above" in shown
    found, (_, *rows) = report()
    assert found["threshold"] == at
    assert found["pairs_above_threshold"] == 9
    assert len(found["closest"]) == 3
    assert [(float(row[1]), int(row[2]), int(row[5])) for row in rows] == known[:9]
    share = found["nearest"]["synthetic to real"]
    above = int((nearest_cosines(b, a).double() > at).sum())
    assert (share["above_threshold"], share["share_above_threshold"]) == (above, above / 14)
    call("leak", "real", "synthetic", *options, 1, "--overwrite")
    assert report()[0]["pairs_above_threshold"] == 0
    assert report()[1][1:] == []


@pytest.mark.slow
def test_the_same_comparison_writes_the_same_bytes_in_any_format(faces):
    convert(open_images("real"), "record", "recordio")
    call("leak", "real", "synthetic")
    call("leak", "real", "synthetic", "--output", "again")
    for name in FILES:
        assert Path("leak-report", name).read_bytes() == Path("again", name).read_bytes()
    call("leak", "record", "synthetic", "--output", "other")
    one, other = report()[0], report("other")[0]
    assert one["nearest"] == other["nearest"]
    assert other["copies"] == 2
    assert other["closest"][0]["real"]["name"].startswith("record/train.rec, offset ")
    with Image.open("other/closest.png") as picture:
        assert min(picture.size) > 200


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_images_are_compared_by_a_network(faces):
    call("train", "--data", "real", "--holdout", 2, "--output", "run", *TINY)
    call("leak", "real", "synthetic", "--network", "run", "--no-flip", "--device", "cpu")
    network, state = load_backbone(Path("run"))
    a, b = (
        embed_store(network, open_images(x).store, (16, 16, 1), flip=False, resize=True)
        for x in ("real", "synthetic")
    )
    found = report()[0]
    assert found["compared_by"] == {
        "kind": "network", "run": "run", "step": state["step"], "flip": False, "device": "cpu",
        "image_shape": [16, 16, 1], "dimension": 8,
    }  # fmt: skip
    assert [pair["cosine"] for pair in found["closest"]] == [
        pair.cosine for pair in closest_pairs(b, a, 10)
    ]
    assert names() == FILES


@pytest.mark.usefixtures("blank_figures")
def test_embeddings_are_compared(faces):
    random = np.random.default_rng(0)
    a = random.standard_normal((30, 6)).astype(np.float32)
    b = random.standard_normal((20, 6)).astype(np.float32)
    b[3], b[4] = a[8], 2 * a[9]
    np.save("a.npy", a)
    save_file({"embeddings": torch.from_numpy(b)}, "b.safetensors")
    call("leak", "real", "synthetic")  # pictures that --overwrite removes
    call("leak", "a.npy", "b.safetensors", "--top", 4, "--overwrite")
    assert names() == [name for name in FILES if name != "closest.png"]
    found, (header, *rows) = report()
    wanted = closest_pairs(torch.from_numpy(b), torch.from_numpy(a), 4)
    assert header == ["rank", "cosine", "synthetic_row", "real_row"]
    assert [(float(c), int(i), int(j)) for _, c, i, j in rows] == wanted
    assert found["copies"] == 1  # of equal bits
    assert set(found["nearest"]) == {"synthetic to real", "real to another row"}
    np.save("one.npy", a[:1])
    call("leak", "one.npy", "b.safetensors", "--output", "one")
    assert set(report("one")[0]["nearest"]) == {"synthetic to real"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "synthetic"], "missing does not exist"),
        (["real", "missing.npy"], "both sets must be images or both embeddings"),
        (["a.npy", "missing.npy"], "missing.npy cannot be read"),
        (["a.npy", "c.npy"], "a.npy and c.npy must have the same dimension, got 6 and 4"),
        (["a.npy", "empty.npy"], r"empty.npy: expected embeddings.*\(0, 6\)"),
        (["a.npy", "zero.npy"], "zero.npy: 1 of 5 rows are zero"),
        (["real", "empty"], "empty holds 0 identity folders"),
        (["real", "broken"], "readable, complete images:.*p1/0.png"),
        (["a.npy", "synthetic"], "got embeddings in a.npy and images in synthetic"),
        (["real", "a.npy", "--network", "run"], "--network embeds images, and a.npy holds"),
        (["a.npy", "a.npy", "--network", "run"], "--network embeds images, and a.npy holds"),
        (["a.npy", "a.npy", "--size", "9x9"], "--size has no effect with embeddings"),
        (["a.npy", "a.npy", "--no-flip"], "--flip/--no-flip has no effect with embeddings"),
        (["real", "synthetic", "--device", "cpu"], "--device has no effect without --network"),
        (["real", "synthetic", "--network", "x", "--size", "9x9"], "--size has no effect with"),
        (["real", "synthetic", "--network", "empty"], "no checkpoint in empty"),
        (["real", "synthetic", "--size", "big"], "--size must be HEIGHTxWIDTH"),
        (["real", "synthetic", "--threshold", "-2"], r"--threshold must be in \[-1, 1\], got -2"),
        (["real", "synthetic", "--output", "a.npy"], "--output must be a folder that can be"),
        (["real", "synthetic", "--output", "full"], "leak.csv exists: .*--overwrite"),
        (["real", "synthetic", "--output", "odd"], "leak.json is a folder"),
    ],
)
def test_errors_are_one_line(faces, arguments, message):
    rows = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    np.save("a.npy", rows)
    np.save("c.npy", rows[:, :4])
    np.save("empty.npy", rows[:0])
    rows[2] = 0
    np.save("zero.npy", rows)
    truncate(folder(Path("broken"), 2, 1, seed=0) / "p1" / "0.png")
    Path("empty").mkdir()
    Path("odd/leak.json").mkdir(parents=True)
    Path("full").mkdir()
    Path("full/leak.csv").write_text("kept")
    before = names(".")
    shown = refused("leak", *arguments)
    assert re.search(message, shown, re.DOTALL)
    assert "Traceback" not in shown
    assert "error: " in shown
    assert names(".") == before
    assert Path("full/leak.csv").read_text() == "kept"
