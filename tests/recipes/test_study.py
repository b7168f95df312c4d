"""The study of depth, width and attributes: cells, what is held still, the report, resumption."""

import json
import re
from dataclasses import replace

import pytest
import torch
from synface.common.files import CheckpointError
from synface.data import DataError
from synface.recipes.generated import identities
from synface.recipes.synface import study
from synface.recipes.synface.study import ATTRIBUTES, OneAttribute, load_config
from synface.synthesis.generators import EigenfaceGenerator

from tests.helpers.command_line import call

TINY = """
identities = [4, 6]
images = [2, 3]
attributes = ["none", "blur"]
attribute_identities = 4
attribute_images = 3
[data]
size = 16
embedding_size = 8
[train]
epochs = 2
batch_size = 8
widths = [4, 8]
depths = [1, 1]
embedding_size = 8
augment = 0.0
checkpoint_every = 1
"""


@pytest.mark.slow
def test_from_cells_to_a_report(tmp_path, file):
    command = ["study", "--config", file, "--output", tmp_path / "run"]
    call(*command, "--cell", "4x2-mixup-seed-0")
    assert not (tmp_path / "run" / "report").exists()
    log = tmp_path / "run" / "4x2-mixup-seed-0" / "metrics.jsonl"
    written = log.stat().st_mtime_ns
    call(*command, "--resume")
    assert log.stat().st_mtime_ns == written  # finished, so not run again
    report = tmp_path / "run" / "report"
    page = (report / "study.md").read_text()
    shown = re.findall(r"!\[.*\]\((.*)\)", page)
    assert shown == ["study-sizes.png", "study-attributes.png"]
    assert all((report / name).stat().st_size > 1000 for name in shown)
    assert "of 4 cells" in page
    block = re.search(r"```toml\n(.*)```", page, re.DOTALL)
    (tmp_path / "again.toml").write_text(block.group(1))
    assert load_config(tmp_path / "again.toml") == load_config(file)
    figures = json.loads((report / "study.json").read_text())
    for kind in ("plain", "identity mixup"):
        assert {w: list(d) for w, d in figures["sizes"][kind].items()} == {
            "4": ["2", "3"],
            "6": ["2", "3"],
        }
        assert list(figures["attributes"][kind]) == ["none", "blur"]
    found = json.loads((log.parent / "result.json").read_text())["found"]
    assert figures["sizes"]["identity mixup"]["4"]["2"]["auc"]["values"] == [found["auc"]]
    assert f"{found['auc']:.4f}" in page

    # The same again elsewhere, and another configuration is not taken for this one.
    config = load_config(file)
    alone = study.run(config, tmp_path / "twice", only="4x2-mixup-seed-0")
    assert alone.cells["4x2-mixup-seed-0"] == found
    other = replace(config, train=replace(config.train, lr=0.5))
    with pytest.raises(CheckpointError, match="of another run: its config's lr is"):
        study.run(other, tmp_path / "run", resume=True)


def test_every_cell_trains_for_as_many_steps():
    config = load_config()
    found = study.cells(config, EigenfaceGenerator(64, 32))
    assert len(found) == len({cell.name for cell in found}) == 2 * (9 + 6)
    steps = []
    for cell in found:
        source = cell.source()
        per_epoch = -(-len(source) // cell.config.batch_size)
        steps.append(cell.config.epochs * per_epoch)
        assert (source.identity_mixup is not None) == ("mixup" in cell.name)
    assert max(steps) - min(steps) <= 0.1 * max(steps)


@pytest.mark.parametrize("attribute", sorted(ATTRIBUTES))
def test_one_attribute_varies_and_the_others_do_not(attribute):
    generator = EigenfaceGenerator(8, 24)
    varied = OneAttribute(generator, attribute)
    one = identities(1, 8, seed=0).expand(6, -1)
    style = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    seed = torch.arange(6)
    images = varied.generate(one, style, seed)
    assert torch.equal(images, varied.generate(one, style, seed))
    alike = (images == images[:1]).flatten(1).all(1)
    assert alike.tolist() == [True] + [attribute == "none"] * 5
    for other in set(range(10)) - set(ATTRIBUTES[attribute]):
        moved = style.clone()
        moved[:, other] += 1.0
        assert torch.equal(images, varied.generate(one, moved, seed))
    for own in ATTRIBUTES[attribute]:
        moved = style.clone()
        moved[:, own] += 1.0
        assert not torch.equal(images, varied.generate(one, moved, seed))
    assert varied.description != generator.description


def test_still_is_the_face_without_style():
    generator = EigenfaceGenerator(8, 25)
    points = identities(2, 8, seed=0)
    drawn = OneAttribute(generator, "none").generate(points, torch.randn(2, 10), torch.arange(2))
    faces = (generator.faces(points) * 255).round()
    assert (drawn[..., 0] - faces).abs().max() <= 1


def test_bad_data_is_named(tmp_path, file):
    config = load_config(file)
    config = replace(config, data=replace(config.data, real=str(tmp_path / "nobody")))
    with pytest.raises(DataError, match="nobody"):
        study.run(config, tmp_path / "run")
    with pytest.raises(ValueError, match=r"cell must be one of 4x2-seed-0, .*, got '4x9'"):
        study.run(load_config(file), tmp_path / "run", only="4x9")
