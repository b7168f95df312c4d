"""The SynFace recipe: four rows and the real people alone, resumed by cell, bad input named."""

import json
import os
import re
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from synface.common.files import CheckpointError
from synface.data import DataError
from synface.recipes import sweep, synface
from synface.recipes.synface import load_config

from tests.helpers.command_line import call
from tests.helpers.figures import blank
from tests.helpers.generators import people

ORL = Path(__file__).parents[2] / ".." / "shared" / "data" / "orl"
TINY = """
seeds = [0, 4]
[data]
size = 16
embedding_size = 8
identities = 4
images_per_identity = 3
real_identities = 3
held_out_identities = 4
[train]
epochs = 2
batch_size = 8
lr = 0.05
warmup_epochs = 0.5
widths = [4, 8]
depths = [1, 1]
embedding_size = 8
checkpoint_every = 1
"""


@pytest.mark.slow
@pytest.mark.usefixtures("quick_workers")
def test_from_data_to_a_report(tmp_path, file):
    command = ["recipe", "synface", "--config", file, "--output", tmp_path / "run"]
    call(*command)
    report = tmp_path / "run" / "report"
    page = (report / "synface.md").read_text()
    shown = re.findall(r"!\[.*\]\((.*)\)", page)
    assert shown == ["synface-rows.png", "synface-differences.png", "synface-faces.png"]
    assert all((report / name).stat().st_size > 1000 for name in shown)
    assert f"`synface recipe synface --config {file}`" in page
    block = re.search(r"```toml\n(.*)```", page, re.DOTALL)
    (tmp_path / "again.toml").write_text(block.group(1))
    assert load_config(tmp_path / "again.toml") == load_config(file)
    figures = json.loads((report / "synface.json").read_text())
    assert list(figures["rows"]) == list(synface.ROWS)
    for row in figures["rows"].values():
        assert len(row["auc"]["values"]) == 2
        assert row["auc"]["mean"] == pytest.approx(sum(row["auc"]["values"]) / 2)
        assert 0.2 < row["auc"]["mean"] <= 1.0
    gains = figures["above synthetic"]["both"]["auc"]["values"]
    first, both = (figures["rows"][row]["auc"]["values"] for row in ("synthetic", "both"))
    assert gains == [b - a for a, b in zip(first, both, strict=True)]

    # All is there: nothing is trained again, and no faces are shown where none are wanted.
    logs = {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("metrics.jsonl")}
    assert len(logs) == 12
    other = tmp_path / "report"
    with blank():
        call(*command, "--resume", "--report", other, "--no-faces")
    assert {f: f.stat().st_mtime_ns for f in logs} == logs
    assert json.loads((other / "synface.json").read_text()) == figures
    assert sorted(f.name for f in other.iterdir()) == [
        "synface-differences.png",
        "synface-rows.png",
        "synface.json",
        "synface.md",
    ]


@pytest.mark.slow
def test_cells_apart_and_cut_off_give_the_same(tmp_path, file):
    config = replace(load_config(file), seeds=(4,), rows=("both", "real"))
    whole = synface.run(config, tmp_path / "whole")
    assert whole.cells == synface.run(config, tmp_path / "twice").cells
    with pytest.raises(FileExistsError, match="holds a run already"):
        synface.run(config, tmp_path / "whole")

    pressed = []

    class Impatient:
        """Presses Ctrl-C in the third step, once."""

        def start(self, total_steps: int, step: int) -> None: ...

        def step(self, loss: float, accuracy: float, images: int) -> None:
            pressed.append(loss)
            if len(pressed) == 3:
                os.kill(os.getpid(), signal.SIGINT)

    @contextmanager
    def bar(name: str):
        yield Impatient()

    apart = tmp_path / "apart"
    with pytest.raises(KeyboardInterrupt):
        synface.run(config, apart, only="both-seed-4", progress=bar)
    assert not (apart / "both-seed-4" / sweep.RESULT).exists()
    found = synface.run(config, apart, only="both-seed-4", resume=True)
    assert list(found.cells) == ["both-seed-4"]
    assert synface.run(config, apart, resume=True).cells == whole.cells

    with pytest.raises(ValueError, match="cell must be one of both-seed-4, real-seed-4, got 'x'"):
        synface.run(config, apart, only="x")
    other = replace(config, train=replace(config.train, lr=0.01))
    with pytest.raises(CheckpointError, match="of another run: its config's lr is"):
        synface.run(other, apart, resume=True)
    (apart / "both-seed-4" / sweep.RESULT).write_text("{}")
    with pytest.raises(CheckpointError, match=r"result\.json is damaged"):
        synface.run(config, apart, resume=True)


def test_the_real_row_trains_for_as_many_steps(file):
    config = load_config(file)
    found = synface.cells(config, config.data.face_generator(), people(3, 2))
    steps = {}
    for cell in found[: len(config.rows)]:
        length = len(cell.source())
        steps[cell.name] = cell.config.epochs * -(-length // cell.config.batch_size)
    assert steps.pop("merged-seed-0") == 3  # one epoch of twice the images: the nearest to 4
    assert set(steps.values()) == {4}
    real = found[config.rows.index("real")].config
    assert (real.epochs, real.warmup_epochs, real.checkpoint_every) == (4, 1.0, 2)


def test_real_people_of_a_folder(tmp_path, file):
    if not ORL.is_dir():
        pytest.skip(f"{ORL} is not there")
    config = replace(load_config(file), seeds=(0,), rows=("real",))
    config = replace(config, data=replace(config.data, real=str(ORL)))
    results = synface.run(config, tmp_path / "run")
    assert (len(results.real), len(results.held)) == (30, 40)
    assert results.held.images.shape[1:] == (16, 16, 1)
    assert not set(results.real.identities) & set(results.held.identities)


def test_bad_data_is_named(tmp_path, file):
    config = load_config(file)
    missing = replace(config, data=replace(config.data, real=str(tmp_path / "nobody")))
    with pytest.raises(DataError, match="nobody"):
        synface.run(missing, tmp_path / "run")
    greedy = replace(config, data=replace(config.data, real_identities=97))
    with pytest.raises(ValueError, match="must have 101 people or more, got 100"):
        synface.run(greedy, tmp_path / "run")
    model = replace(config, data=replace(config.data, generator=str(tmp_path / "model.pt")))
    with pytest.raises(ValueError, match=r"model\.pt cannot be loaded as TorchScript"):
        synface.run(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("blank_figures")
def test_each_seed_draws_its_people_and_merged_has_half_of_each(tmp_path, file):
    config = load_config(file)
    config = replace(config, rows=("merged",), data=replace(config.data, draw_people=True))
    results = synface.run(config, tmp_path / "run")
    assert len(results.held.identities) == 97
    assert set(results.pixels_of) == {0, 4}
    assert results.pixels_of[0] != results.pixels_of[4]
    page = synface.write(results, tmp_path / "report", "synface recipe synface").read_text()
    assert "One row: nothing to compare." in page
    assert "each seed draws the people to train on" in page
    assert not (tmp_path / "report" / "synface-differences.png").exists()
    cell = synface.cells(config, config.data.face_generator(), people(3, 2))[0]
    (_, batch) = next(cell.source().batches(replace(cell.config, batch_size=24), 0))
    assert len(batch.images) == 24
    assert int((batch.target >= 4).sum()) == 12  # 12 generated images, and 6 real ones twice


def test_color_has_real_faces_in_color_too(tmp_path, file):
    config = load_config(file)
    data = replace(config.data, channels=3)
    config = replace(config, seeds=(0,), rows=("both", "merged"), data=data)
    results = synface.run(config, tmp_path / "run")
    assert results.held.images.shape[3] == 3
    with pytest.raises(ValueError, match="columns are for generators in files"):
        replace(data, columns="pose=0:3").face_generator()
