"""Images are found in files, folders and sets; their embeddings are written with their names."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image
from synface.common.files import CheckpointError
from synface.data import DataError, convert, open_images
from synface.inference import find_images, recorded_threshold, write_embeddings
from synface.synthesis import read_embeddings

from tests.helpers.images import folder


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("faces") / "faces", 3, 2, 0)


def names(found):
    return [found.store.name(row) for row in range(len(found.store))]


def test_two_people_of_one_number_are_not_merged(tmp_path):
    for name, person in (("one", "7"), ("two", "7"), ("three", "ann"), ("four", "ann")):
        (tmp_path / name / person).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / name / person / "0.png")
    with pytest.raises(DataError, match=r"one and .*two both have an identity '7'"):
        find_images([tmp_path / "one", tmp_path / "two"])
    assert find_images([tmp_path / "one"] * 2).identities == ["7", "7"]
    assert find_images([tmp_path / "three", tmp_path / "four"]).identities == ["ann", "ann"]


def test_embeddings_and_names_must_be_equally_many(tmp_path):
    with pytest.raises(ValueError, match="must be equally many, got 2, 3 and 3"):
        write_embeddings(tmp_path / "x.npz", torch.zeros(2, 4), ["a"] * 3, [None] * 3, {})
    assert not (tmp_path / "x.npz").exists()


def test_sub_folders_are_identities_only_where_all_images_are_in_them(faces, tmp_path):
    found = find_images([faces])
    assert names(found) == [str(faces / f"p{i // 2}" / f"{i % 2}.png") for i in range(6)]
    assert found.identities == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert find_images([faces / "p1"]).identities == [None, None]
    deep = folder(tmp_path / "deep" / "below", 1, 2, 1)
    assert find_images([deep]).identities == ["p0", "p0"]  # one person is enough
    found = find_images([tmp_path / "deep"])
    assert (len(found.store), found.identities) == (2, [None, None])


def test_paths_keep_their_order_and_links_do_not_end_in_circles(faces, tmp_path):
    packed = convert(open_images(faces), tmp_path / "packed", "webdataset")
    root = folder(tmp_path / "more", 1, 10, 2)
    (root / "p0" / "around").symlink_to(root)
    (root / "p0" / "notes.txt").write_text("no image")
    (root / "p0" / ".hidden.png").write_text("no image")
    file = faces / "p2" / "1.png"
    with pytest.warns(UserWarning, match="more: 1 files are skipped, which do not end in .bmp"):
        found = find_images([file, tmp_path / "packed", str(root), file])
    assert len(found.store) == len(found.identities) == 18
    assert names(found)[0] == names(found)[17] == str(file)
    assert found.identities[1:7] == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert names(found)[1:7] == [packed.name(row) for row in range(6)]
    assert names(found)[16] == str(root / "p0" / "9.png")
    pixels = np.zeros((2, 21, 20, 1), np.uint8)
    found.store.decode_into(pixels[0], 6)  # the same image in the set
    found.store.decode_into(pixels[1], 17)
    assert pixels[0].any()
    assert np.array_equal(*pixels)


@pytest.mark.parametrize(
    ("path", "message"),
    [("gone", "gone does not exist"), ("empty", "empty holds no image: none of 1 files ends in")],
)
def test_paths_without_images_are_errors(tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("")
    with pytest.raises(DataError, match=message):
        find_images([tmp_path / path])


# -- embeddings in files

ROWS = torch.nn.functional.normalize(torch.arange(12.0).view(4, 3) + 1)
NAMES = ["a/é.png", "b,\n.png", "c\udce9.png", "d.png"]
PEOPLE = ["s10", None, "s2", "s10"]
ABOUT = {"run": "runs/é", "step": 3}


@pytest.mark.parametrize("people", [PEOPLE, [None] * 4])
def test_embeddings_are_read_back_from_files(tmp_path, people):
    some = people is PEOPLE
    for suffix in (".safetensors", ".npy", ".npz"):
        write_embeddings(tmp_path / f"x{suffix}", ROWS, NAMES, people, ABOUT)
    for suffix in (".safetensors", ".npy"):
        assert torch.equal(read_embeddings(tmp_path / f"x{suffix}"), ROWS)

    from safetensors import safe_open

    with safe_open(tmp_path / "x.safetensors", framework="np") as file:
        assert file.metadata() == {"run": '"runs/\\u00e9"', "step": "3"}
        assert json.loads(file.get_tensor("names").tobytes()) == NAMES
        assert ("labels" in file.keys()) == some  # noqa: SIM118
        if some:
            assert file.get_tensor("labels").tolist() == [0, -1, 1, 0]
            assert json.loads(file.get_tensor("identities").tobytes()) == ["s10", "s2"]
    with np.load(tmp_path / "x.npz") as arrays:  # without pickles
        assert np.array_equal(arrays["embeddings"], ROWS)
        assert arrays["names"].tolist() == NAMES
        assert ("labels" in arrays) == some
        if some:
            assert arrays["labels"].tolist() == [0, -1, 1, 0]
            assert arrays["identities"].tolist() == ["s10", "s2"]
    with (tmp_path / "x.names.csv").open(errors="surrogateescape", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["name", "identity"][: 1 + some]
    assert [row[0] for row in rows] == NAMES
    assert not some or [row[1] for row in rows] == ["s10", "", "s2", "s10"]


def test_a_parquet_file_has_fixed_size_lists(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    for people in (PEOPLE, [None] * 4):
        write_embeddings(tmp_path / "x.parquet", ROWS, NAMES, people, ABOUT)
        table = pq.read_table(tmp_path / "x.parquet")
        wanted = ["name", *(["identity"] * (people is PEOPLE)), "embedding"]
        assert table.column_names == wanted
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[3]"
    assert table["embedding"].to_pylist() == ROWS.tolist()
    assert table["name"].to_pylist() == [*NAMES[:2], "c\ufffd.png", "d.png"]
    assert table.schema.metadata[b"step"] == b"3"


def test_another_suffix_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"ends in .safetensors, .npy, .npz, .parquet, got .*csv"):
        write_embeddings(tmp_path / "x.csv", ROWS, NAMES, PEOPLE, ABOUT)


# -- thresholds


def a_run(root, step, *lines):
    """Write the files of a run that hold its checkpoint's step and its verifications."""
    from synface import checkpoint

    checkpoint.save(root / "checkpoints", step, {"x": torch.zeros(1)}, {})
    if lines:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (root / "verification.jsonl").write_text(text)
    return root


def test_the_threshold_is_that_of_the_last_verification_up_to_the_checkpoint(tmp_path):
    lines = [
        {"step": 4, "threshold": 0.25, "accuracy": 0.75},
        {"step": 6, "auc": 0.5},
        {"step": 7, "threshold": None},
        {"step": 9, "threshold": 0.5},
    ]
    run = a_run(tmp_path / "run", 8, *lines)
    log = run / "verification.jsonl"
    for path in (run, run / "checkpoints" / "step-00000008"):
        assert recorded_threshold(path) == (0.25, log, 4, 0.75)
    a_run(run, 9)
    assert recorded_threshold(run) == (0.5, log, 9, None)
    assert recorded_threshold(run / "checkpoints" / "step-00000008") == (0.25, log, 4, 0.75)
    (run / "best").mkdir()
    (run / "checkpoints" / "step-00000008").rename(run / "best" / "step-00000008")
    assert recorded_threshold(run / "best") == (0.25, log, 4, 0.75)
    assert recorded_threshold(a_run(tmp_path / "early", 3, *lines)) is None
    assert recorded_threshold(a_run(tmp_path / "none", 3)) is None
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        recorded_threshold(tmp_path / "gone")


@pytest.mark.parametrize("value", ["high", float("inf"), [0.5]])
def test_a_threshold_that_is_no_number_is_an_error_of_the_file(tmp_path, value):
    run = a_run(tmp_path, 8, {"step": 8, "threshold": value})
    with pytest.raises(CheckpointError, match=r"verification\.jsonl: threshold and accuracy of st"):
        recorded_threshold(run)
