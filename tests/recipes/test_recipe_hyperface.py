"""The HyperFace recipe: packed beside random identities, the report, resumption, bad input."""

import json
import re
from dataclasses import replace

import pytest
import torch
from synface.data import DataError
from synface.recipes import hyperface
from synface.recipes.generated import identities
from synface.recipes.hyperface import load_config
from synface.synthesis.packing import closest_pair

from tests.helpers.command_line import call

TINY = """
seeds = [0, 2]
[data]
size = 16
embedding_size = 3
identities = 6
images_per_identity = 3
[pack]
steps = 40
[train]
epochs = 1
batch_size = 8
widths = [4, 8]
depths = [1, 1]
embedding_size = 8
checkpoint_every = 1
"""


def test_from_packing_to_a_report(tmp_path, file):
    run = tmp_path / "run"
    command = ["recipe", "hyperface", "--config", file, "--output", run]
    call(*command, "--cell", "packed-seed-0")
    call(*command, "--resume")
    page = (run / "report" / "hyperface.md").read_text()
    shown = re.findall(r"!\[.*\]\((.*)\)", page)
    assert shown == ["hyperface-kinds.png", "hyperface-faces.png"]
    assert all((run / "report" / name).stat().st_size > 1000 for name in shown)
    block = re.search(r"```toml\n(.*)```", page, re.DOTALL)
    (tmp_path / "again.toml").write_text(block.group(1))
    assert load_config(tmp_path / "again.toml") == load_config(file)
    for kind in hyperface.KINDS:
        for seed in (0, 2):
            assert len(list((run / "faces" / f"{kind}-seed-{seed}").rglob("*.png"))) == 18
    figures = json.loads((run / "report" / "hyperface.json").read_text())
    # Six points in three dimensions: the octahedron.
    assert figures["bound"]["cosine"] == pytest.approx(0.0, abs=1e-9)
    assert figures["packed"]["worst cosine"]["mean"] == pytest.approx(0.0, abs=0.02)
    random = [closest_pair(identities(6, 3, seed))[0] for seed in (0, 2)]
    assert figures["random"]["worst cosine"]["values"] == pytest.approx(random)
    assert min(random) > 0.1
    less = figures["packed less random"]["auc"]["values"]
    aucs = [figures[kind]["auc"]["values"] for kind in hyperface.KINDS]
    assert less == [a - b for a, b in zip(*aucs, strict=True)]

    # All is there: nothing is made again, and the same comes out.
    made = {f: f.stat().st_mtime_ns for f in run.rglob("*") if f.suffix in (".png", ".jsonl")}
    other = tmp_path / "report"
    call(*command, "--resume", "--report", other, "--no-faces")
    assert {f: f.stat().st_mtime_ns for f in made} == made
    assert json.loads((other / "hyperface.json").read_text()) == figures
    assert not (other / "hyperface-faces.png").exists()


def test_the_same_again_and_not_for_another_configuration(tmp_path, file):
    config = replace(load_config(file), seeds=(0,))
    first = hyperface.run(config, tmp_path / "first")
    second = hyperface.run(config, tmp_path / "second")
    assert first.cells == second.cells
    for kind in hyperface.KINDS:
        assert all(map(torch.equal, first.cosines[kind], second.cosines[kind]))
    with pytest.raises(FileExistsError):
        hyperface.run(config, tmp_path / "first")
    other = replace(config, pack=replace(config.pack, steps=3))
    with pytest.raises(ValueError, match="of another run: its steps is '40', expected '3'"):
        hyperface.run(other, tmp_path / "first", resume=True)
    (tmp_path / "second" / "packed-seed-0.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        hyperface.run(config, tmp_path / "second", resume=True)


def test_a_missing_folder_is_named(tmp_path, file):
    config = load_config(file)
    config = replace(config, data=replace(config.data, real=str(tmp_path / "nobody")))
    with pytest.raises(DataError, match="nobody"):
        hyperface.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
