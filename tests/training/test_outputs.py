"""Output folders and the networks that a command builds are checked before it reads images."""

import re
import sys
from importlib import import_module
from pkgutil import walk_packages

import pytest
from synface import recipes
from synface.common.check import check_folder
from synface.data import embedded_faces
from synface.training.loop import TrainConfig, train
from synface.training.model import check_network

from tests.helpers.command_line import refused


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Make unreadable images, and a file named "file"; the embedded faces fail the test."""
    for person in range(4):
        (tmp_path / "faces" / f"p{person}").mkdir(parents=True)
        for i in range(3):
            (tmp_path / "faces" / f"p{person}" / f"{i}.png").write_bytes(b"no image")
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    for found in walk_packages(recipes.__path__, "synface.recipes."):
        import_module(found.name)
    for name, module in list(sys.modules.items()):
        if name.startswith("synface.") and "embedded_faces" in vars(module):
            monkeypatch.setattr(module, "embedded_faces", lambda *_, **__: pytest.fail("read"))
    return tmp_path


@pytest.mark.parametrize("output", ["file", "file/run", "/proc/run"])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        (["train", "--output"], "--output"),
        (["train", "--data", "faces", "--holdout", "2", "--output"], "--output"),
        (["synthesize", "--packed", "faces/none.npy", "--output"], "--output"),
        (["recipe", "cfsm", "--output"], "--output"),
        (["recipe", "synface", "--report"], "--report"),
        (["recipe", "hyperface", "--output"], "--output"),
        (["study", "--real", "faces", "--output"], "--output"),
        (["demo", "--output"], "--output"),
        (["bench", "scale", "--identities", "1M", "--output"], "--output"),
        (["bench", "scale", "--identities", "1M", "--directory"], "--directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_an_output_that_cannot_be_written_is_named_first(here, command, option, output):
    before = sorted(here.rglob("*"))
    found = refused(*command, output)
    assert f"{option} must be a folder that can be written to, got {output}: " in found
    assert "Errno" not in found
    assert sorted(here.rglob("*")) == before


def test_a_destination_below_a_file(here):
    found = refused("convert", "faces", "file/shards", "--to", "webdataset")
    assert re.search("destination's folder must be a folder .*file: Not a directory", found)


def test_a_run_that_is_there_is_named_first(here):
    (here / "run").mkdir()
    (here / "run" / "metrics.jsonl").write_text("")
    assert "run holds a run already" in refused("train", "--data", "faces", "--output", "run")
    with pytest.raises(NotADirectoryError, match="output must be a folder that can be written to"):
        train(TrainConfig(), embedded_faces(2, 16, identities=3), here / "file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "8x8"], "image_size must be at least 16 pixels a side for 4 stages, got 8×8"),
        (["--widths", "4,8"], "widths and depths must be equally many"),
        (["--depths", "1,1,0,1"], "and, like embedding_size, positive"),
        (
            ["--widths", "16,32,64,9999999"],
            "a network of widths .* would take .* GiB of memory, and .* are free",
        ),
        (
            ["--embedding-size", str(1 << 40)],
            "a network of .* embedding_size 1099511627776 .* would take",
        ),
        (
            ["--size", "8000x8000", "--embedding-size", "99999"],
            "a network of .* for images of 8000×8000 would take",
        ),
        (["--size", "60000x60000"], "--size must have at most 67,108,864 pixels"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
@pytest.mark.parametrize(
    "data", [["--data", "faces"], ["--synthetic", "faces", "--real", "file"], []], ids=str
)
def test_a_network_that_cannot_be_built_is_named_first(here, data, options, message):
    assert re.search(message, refused("train", *data, *options, "--holdout", "2"))
    assert not (here / "runs").exists()


@pytest.mark.parametrize("name", ["synface", "hyperface", "study"])
def test_a_recipe_s_network_is_looked_at_first(here, name):
    (here / "recipe.toml").write_text(
        '[data]\nreal = "faces"\nsize = 16\n'
        "[train]\nwidths = [2, 2, 2, 2, 2]\ndepths = [1, 1, 1, 1, 1]\n"
    )
    command = ["study"] if name == "study" else ["recipe", name]
    found = refused(*command, "--config", "recipe.toml", "--output", "run")
    assert "image_size must be at least 32 pixels a side for 5 stages, got 16×16" in found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[recogniser]\nwidths = [2]\ndepths = [1, 1]\n", "widths and depths must be equally many"),
        ("[generator]\ndownsamplings = 7\n", "images must have sides that are multiples of 128"),
        ("[discriminator]\nlayers = 9\n", "images must have sides of 2048 or more for 9 layers"),
    ],
)
def test_all_networks_of_cfsm_are_looked_at_first(here, text, message):
    (here / "recipe.toml").write_text(text)
    found = refused("recipe", "cfsm", "--config", "recipe.toml", "--output", "run")
    assert message in found


def test_what_is_checked_needs_no_memory_and_leaves_nothing(tmp_path):
    network = check_network(TrainConfig(), (48, 48, 1))
    assert {each.device.type for each in network.parameters()} == {"meta"}
    check_folder("output", tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_measurement_is_named(here):
    found = refused("plan", "--identities", "1M", "--measured", "none.json")
    assert found == "error: none.json cannot be read: No such file or directory\n"
