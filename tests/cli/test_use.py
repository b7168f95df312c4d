"""`synface embed`, `compare` and `export` use a trained network, and say what came of it."""

import csv
import json
import shutil

import numpy as np
import pytest
import synface
import torch
from synface.data import open_images
from synface.evaluation.embedding import embed_store
from synface.synthesis import read_embeddings

from tests.helpers.command_line import call, refused
from tests.helpers.images import folder, truncate
from tests.helpers.training import TINY


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("faces") / "faces", 5, 4, 0)


@pytest.fixture(scope="module")
def run(faces, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    call("train", "--data", faces, "--holdout", 0, "--output", path, *TINY)
    return path


@pytest.fixture
def verified(run, tmp_path):
    """Copy the run, with a log of verifications."""
    path = tmp_path / "verified"
    shutil.copytree(run, path)
    lines = [{"step": 1, "threshold": 0.2, "accuracy": 0.75}, {"step": 2, "auc": 0.5}]
    (path / "verification.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return path


# -- embed


@pytest.mark.parametrize("suffix", [".safetensors", ".npy", ".npz", ".parquet"])
def test_embed_writes_what_the_evaluation_computes(faces, run, tmp_path, suffix):
    output = tmp_path / "new" / f"x{suffix}"
    shown = call("embed", run, faces, "--output", output, "--device", "cpu")
    assert "20 images of 5 people as embeddings of 8 numbers: " in shown
    images, network = open_images(faces), synface.load(run)
    expected = embed_store(network.backbone, images.store, (16, 16, 1), resize=True)
    names = [images.name(row) for row in range(20)]
    people = [f"p{row // 4}" for row in range(20)]
    if suffix == ".npz":
        with np.load(output) as arrays:
            found, came = torch.from_numpy(arrays["embeddings"]), arrays["names"].tolist()
    elif suffix == ".parquet":
        table = pytest.importorskip("pyarrow.parquet").read_table(output)
        found, came = torch.tensor(table["embedding"].to_pylist()), table["name"].to_pylist()
        assert table["identity"].to_pylist() == people
    else:
        found, came = read_embeddings(output), names
    if suffix == ".npy":
        with output.with_suffix(".names.csv").open(newline="") as file:
            rows = list(csv.reader(file))
        assert rows == [["name", "identity"], *map(list, zip(names, people, strict=True))]
    assert torch.equal(found, expected)
    assert came == names
    assert [each.name for each in output.parent.iterdir() if "part" in each.name] == []


def test_embed_takes_files_and_folders_without_the_flip(faces, run, tmp_path):
    files = [faces / "p1" / "2.png", faces / "p0"]
    output = tmp_path / "x.npy"
    shown = call("embed", run, *files, "--output", output, "--no-flip", "--batch-size", 2)
    assert "5 images as embeddings" in shown
    plain = synface.load(run, flip=False)
    wanted = [files[0], *sorted(files[1].iterdir())]
    assert torch.equal(read_embeddings(output), plain.embed(wanted, batch_size=2))
    assert not torch.allclose(read_embeddings(output), synface.load(run).embed(wanted), atol=1e-3)
    names = (tmp_path / "x.names.csv").read_text().splitlines()
    assert names == ["name", *map(str, wanted)]
    again = ["embed", run, *files, "--output", output]
    assert f"{output} exists" in refused(*again)
    output.unlink()
    assert "x.names.csv exists" in refused(*again)
    call(*again, "--overwrite")


def test_leak_reads_the_embeddings(faces, run, tmp_path):
    for name, path in (("a.npy", faces), ("b.safetensors", faces / "p0")):
        call("embed", run, path, "--output", tmp_path / name)
    output = tmp_path / "report"
    shown = call("leak", tmp_path / "a.npy", tmp_path / "b.safetensors", "--output", output)
    assert "4 rows of" in shown


def test_bad_images_end_embed_unless_they_are_left_out(faces, run, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(faces, mixed)
    truncate(mixed / "p1" / "3.png")
    (mixed / "p2" / "0.png").write_text("no image")
    output = tmp_path / "x.npy"
    shown = refused("embed", run, mixed, "--output", output)
    assert "2 of 20 images cannot be used" in shown
    assert f"{mixed}/p2/0.png: not a readable image" in shown
    assert "--skip-bad leaves out such images" in shown
    assert not output.exists()
    shown = call("embed", run, mixed, "--output", output, "--skip-bad", code=1)
    assert f"left out {mixed}/p2/0.png: not a readable image" in shown
    assert f"left out {mixed}/p1/3.png: " in shown
    assert "2 of 20 images cannot be decoded and were left out" in shown
    with (tmp_path / "x.names.csv").open(newline="") as file:
        names = [name for name, _ in csv.reader(file)][1:]
    whole = call("embed", run, faces, "--output", tmp_path / "whole.npy")
    assert "20 images" in whole
    kept = [row for row in range(20) if row not in (7, 8)]
    assert names == [f"{mixed}/p{row // 4}/{row % 4}.png" for row in kept]
    difference = read_embeddings(output) - read_embeddings(tmp_path / "whole.npy")[kept]
    assert difference.abs().max() < 1e-6
    shown = refused("embed", run, mixed / "p2" / "0.png", "--output", output, "--skip-bad",
                    "--overwrite")  # fmt: skip
    assert "1 of 1 images cannot be used" in shown


def test_embed_refuses_other_outputs_and_paths(faces, run, tmp_path):
    shown = refused("embed", run, faces, "--output", tmp_path / "x.csv")
    assert "ends in .safetensors, .npy, .npz, .parquet" in shown
    shown = refused("embed", run, tmp_path / "gone", "--output", tmp_path / "x.npy")
    assert "gone does not exist" in shown
    shown = refused("embed", tmp_path, faces, "--output", tmp_path / "x.npy")
    assert "no checkpoint in" in shown


# -- compare


def cosine(run, *paths):
    a, b = synface.load(run).embed(paths, batch_size=1).double()
    return float(a @ b)


def test_compare_takes_the_threshold_of_the_last_verification(faces, verified):
    same, other = faces / "p0" / "0.png", faces / "p3" / "1.png"
    step = next((verified / "checkpoints").iterdir())
    for path in (verified, step):
        shown = call("compare", path, same, same, "--device", "cpu").splitlines()
        assert shown[0] == "cosine 1.0000: same person"
        log = verified / "verification.jsonl"
        assert shown[1] == (
            f"same person: from a cosine of 0.2000 on ({log}, step 1, whose accuracy was 0.7500)"
        )
    value = cosine(verified, same, other)
    verdicts = {value - 0.01: "same person", (value + 1) / 2: "different people"}
    for threshold, verdict in verdicts.items():
        shown = call("compare", verified, same, other, "--threshold", threshold).splitlines()
        assert shown[0] == f"cosine {value:.4f}: {verdict}"
        assert shown[1] == f"same person: from a cosine of {threshold:.4f} on (--threshold)"


def test_compare_without_a_threshold_says_how_to_get_one(faces, run):
    shown = call("compare", run, faces / "p0" / "0.png", faces / "p0" / "1.png")
    first, second, *rest = shown.splitlines()
    assert first == f"cosine {cosine(run, *sorted((faces / 'p0').iterdir())[:2]):.4f}"
    assert second.startswith("no verdict, for the run has no threshold: give --threshold")
    assert not rest


def test_compare_as_json_and_of_folders(faces, verified):
    paths = [faces / "p0", faces / "p1" / "0.png", faces / "p1" / "1.png"]
    found = json.loads(call("compare", verified, *paths, "--json"))
    log = verified / "verification.jsonl"
    assert found["threshold"] == 0.2
    assert found["threshold_from"] == f"{log}, step 1"
    assert found["accuracy"] == 0.75
    pairs = [(pair["first"], pair["second"]) for pair in found["pairs"]]
    a, b, c = map(str, paths)
    assert pairs == [(a, b), (a, c), (b, c)]
    network = synface.load(verified)
    mean = torch.nn.functional.normalize(network.embed(sorted(paths[0].iterdir())).mean(0), dim=0)
    one = network.embed(paths[1])[0]
    assert found["pairs"][0]["cosine"] == pytest.approx(float(mean @ one), abs=1e-6)
    for pair in found["pairs"]:
        assert pair["same_person"] is (pair["cosine"] >= 0.2)
    shown = call("compare", verified, *paths)
    lines = shown.splitlines()
    assert lines[0].split() == ["cosine", "verdict", "images"]
    for line, pair in zip(lines[1:4], found["pairs"], strict=True):
        verdict = "same person" if pair["same_person"] else "different people"
        wanted = f"{pair['cosine']:.4f} {verdict} {pair['first']} and {pair['second']}"
        assert line.split() == wanted.split()


def test_compare_as_json_without_a_threshold(faces, run):
    image = faces / "p0" / "0.png"
    found = json.loads(call("compare", run, image, image, "--json"))
    assert (found["threshold"], found["threshold_from"]) == (None, None)
    assert found["pairs"][0]["same_person"] is None


def test_compare_refuses_one_image_no_image_and_no_cosine(faces, run, tmp_path):
    image = faces / "p0" / "0.png"
    assert "compare needs two images or more, got 1" in refused("compare", run, image)
    (tmp_path / "x.png").write_text("no image")
    assert "x.png: not a readable image" in refused("compare", run, image, tmp_path / "x.png")
    shown = refused("compare", run, image, image, "--threshold", 1.5)
    assert "--threshold must be in [-1, 1], got 1.5" in shown


# -- export


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_export_writes_files_that_it_has_compared(faces, run, tmp_path):
    file = tmp_path / "out" / "x.ts"
    options = ["--torchscript", file, "--safetensors", tmp_path / "out" / "x.safetensors"]
    shown = call("export", run, *options, "--images", faces, "--no-flip")
    assert {each.name for each in file.parent.iterdir()} == {"x.ts", "x.safetensors"}
    assert shown.count("loaded again, its embeddings differ from the network's by at most") == 2
    assert "x.ts exists" in refused("export", run, *options)
    images = torch.from_numpy(np.random.default_rng(3).integers(0, 256, (4, 16, 16, 1), np.uint8))
    with torch.no_grad():
        expected = synface.load(run, flip=False)(images)
    assert (torch.jit.load(file)(images) - expected).abs().max() <= 1e-5


def test_each_option_of_export_has_its_format(faces, run, tmp_path, monkeypatch):
    from synface.inference import Exporter

    written = {}

    def write(self, kind, path):
        written[kind] = path
        path.touch()
        return 0.0

    monkeypatch.setattr(Exporter, "write", write)
    kinds = ("onnx", "torchscript", "torch-export", "safetensors")
    options = [part for kind in kinds for part in (f"--{kind}", tmp_path / kind)]
    call("export", run, *options)
    assert written == {kind: tmp_path / kind for kind in kinds}


def test_an_export_that_differs_is_not_kept(faces, run, tmp_path, monkeypatch):
    load = torch.jit.load
    monkeypatch.setattr(torch.jit, "load", lambda path: lambda x: load(path)(x) + 0.5)
    files = ["--torchscript", tmp_path / "x.ts", "--safetensors", tmp_path / "x.safetensors"]
    shown = call("export", run, *files, "--images", faces / "p0" / "0.png", code=1)
    assert f"{tmp_path}/x.ts was not written: the embeddings of the exported torchscript" in shown
    assert "differ from the network's by up to 0.5, more than 1e-05" in shown
    assert [each.name for each in tmp_path.iterdir()] == ["x.safetensors"]


def test_export_refuses_what_it_cannot_do(faces, run, tmp_path):
    assert "export needs a file: --onnx, --torchscript, --torch-export" in refused("export", run)
    twice = ["--onnx", tmp_path / "x", "--torchscript", tmp_path / "x"]
    assert "each format needs a file of its own" in refused("export", run, *twice)
    (tmp_path / "x.png").write_text("no image")
    shown = refused("export", run, "--onnx", tmp_path / "x", "--images", tmp_path / "x.png")
    assert "1 of 1 images cannot be used" in shown
