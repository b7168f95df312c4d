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
from synface.recipes.synface.study import load_config, one_attribute
from synface.synthesis.generators import EigenfaceGenerator, HeadGenerator

from tests.helpers.command_line import call
from tests.helpers.training import folder

TINY = """
identities = [4, 6]
images = [2, 3]
attributes = ["none", "pose"]
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
checkpoint_every = 2
"""


@pytest.mark.slow
@pytest.mark.usefixtures("quick_workers")
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
    assert "one seed: no interval" in page
    block = re.search(r"```toml\n(.*)```", page, re.DOTALL)
    (tmp_path / "again.toml").write_text(block.group(1))
    assert load_config(tmp_path / "again.toml") == load_config(file)
    figures = json.loads((report / "study.json").read_text())
    for kind in ("plain", "identity mixup"):
        assert list(figures["sizes"][kind]) == ["4x2", "4x3", "6x2", "6x3"]
        assert list(figures["attributes"][kind]) == ["none", "pose"]
    found = json.loads((log.parent / "result.json").read_text())["found"]
    assert figures["sizes"]["identity mixup"]["4x2"]["auc"]["values"] == [found["auc"]]
    assert f"{found['auc']:.4f}" in page

    # The same again elsewhere, and another configuration is not taken for this one.
    config = load_config(file)
    alone = study.run(config, tmp_path / "twice", only="4x2-mixup-seed-0")
    assert alone.cells["4x2-mixup-seed-0"] == found
    other = replace(config, train=replace(config.train, lr=0.5))
    with pytest.raises(CheckpointError, match="of another run: its config's lr is"):
        study.run(other, tmp_path / "run", resume=True)


def test_sizes_have_equal_counts_and_train_to_an_accuracy():
    config = load_config()
    generator = HeadGenerator(64, 32)
    found = study.cells(config, generator)
    sizes, attributes = found[:25], found[25:]
    assert len({cell.name for cell in found}) == len(found) == 5 * 5 + 5 * 5 * 2
    for cell in sizes:
        assert cell.images == 1920
        assert (cell.target_top1, cell.max_steps) == (0.95, 4000)
        assert cell.steps == 17 * 60
    for cell in attributes:
        assert cell.target_top1 is None
        assert cell.steps == 240
        source = cell.source()
        assert (source.identity_mixup is not None) == ("mixup" in cell.name)
        assert source.keep_epochs == (4 if "mixup" in cell.name else 1)


def test_sizes_of_different_counts_train_for_as_many_steps(file):
    config = load_config(file)
    found = study.cells(config, EigenfaceGenerator(8, 16), HeadGenerator(8, 16))
    assert len(found) == 2 * 4 + 2 * 2
    assert {cell.steps for cell in found[:4]} == {6}


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_the_report_compares_and_tells_what_reached_the_accuracy(tmp_path, file):
    config = replace(
        load_config(file), seeds=(0, 1), attributes=("none", "light"), size_mixup=False,
        target_top1=0.9, max_steps=4, total=12, images=(2, 3), identities=(4, 6),
    )  # fmt: skip
    data = replace(config.data, real=str(folder(tmp_path / "people")))
    results = study.run(replace(config, data=data), tmp_path / "run")
    assert set(config.sizes) == {(4, 3), (6, 2)}
    numbers = study.measured(results)
    assert numbers["sizes"]["plain"]["4x3"]["reached"] in (0, 1, 2)
    gain = numbers["differences"]["sizes"]["plain"]["6x2"]["auc"]
    one, other = (numbers["sizes"]["plain"][name]["auc"]["values"] for name in ("6x2", "4x3"))
    assert gain["values"] == [a - b for a, b in zip(one, other, strict=True)]
    trend = numbers["differences"]["per doubling of identities"]["plain"]["auc"]
    doublings = 0.5849625  # of 4 to 6 identities
    assert trend["values"] == pytest.approx([value / doublings for value in gain["values"]])
    mixup = numbers["differences"]["identity mixup, attributes"]
    assert list(mixup) == ["none", "light"]
    assert list(numbers["differences"]["attributes"]["plain"]) == ["light"]
    page = study.write(results, tmp_path / "report", "synface study").read_text()
    assert "until its training accuracy in an epoch reaches 0.9" in page
    assert " of 2 |" in page
    assert "With 12 images in all, per doubling of the number of identities" in page
    assert "p = " in page or "p < " in page


@pytest.mark.parametrize("attribute", ["none", "all", *HeadGenerator(8, 8).controls])
def test_one_attribute_varies_and_the_others_do_not(attribute):
    generator = HeadGenerator(8, 24)
    varied = one_attribute(generator, attribute)
    one = identities(1, 8, seed=0).expand(6, -1)
    style = torch.randn(6, generator.style_size, generator=torch.Generator().manual_seed(0))
    style[:, generator.controls["sensor"][0]] += 2.0
    seed = torch.zeros(6).long()
    images = varied.generate(one, style, seed)
    alike = (images == images[:1]).flatten(1).all(1)
    assert alike.tolist() == [True] + [attribute == "none"] * 5
    own = generator.controls.get(attribute, () if attribute == "none" else range(21))
    moved = style.clone()
    moved[:, [i for i in range(21) if i not in own]] += 1.0
    assert torch.equal(images, varied.generate(one, moved, seed))
    assert varied.description != generator.description


def test_no_attribute_is_the_eigenface_itself():
    generator = EigenfaceGenerator(8, 25)
    points = identities(2, 8, seed=0)
    drawn = one_attribute(generator, "none").generate(points, torch.randn(2, 10), torch.arange(2))
    faces = (generator.faces(points) * 255).round()
    assert (drawn[..., 0] - faces).abs().max() <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total": 7}, "total must be a number of images of a size, got 7"),
        ({"target_top1": 2.0}, r"target_top1 must be in \[0, 1\], got 2"),
        ({"target_top1": 0.9}, "target_top1 needs max_steps ≥ 1, and size_mixup = false"),
        ({"attributes": ("pose", "pose")}, r"attributes must be distinct, got \['pose', 'pose'\]"),
        ({"attribute_seeds": (1, 1)}, "seeds must be different"),
    ],
)
def test_configurations_that_are_wrong(file, change, message):
    with pytest.raises(ValueError, match=message):
        replace(load_config(file), **change)


def test_a_control_that_the_generator_lacks(tmp_path, file):
    config = replace(load_config(file), attributes=("none", "gaze"))
    with pytest.raises(ValueError, match="attributes: heads has no control 'gaze'; it has express"):
        study.run(config, tmp_path / "run")
    eigenfaces = replace(config.data, generator="eigenfaces")
    with pytest.raises(ValueError, match="eigenfaces has no control 'pose'; it has placement, "):
        study.run(replace(load_config(file), data=eigenfaces), tmp_path / "run")


def test_bad_data_is_named(tmp_path, file):
    config = load_config(file)
    config = replace(config, data=replace(config.data, real=str(tmp_path / "nobody")))
    with pytest.raises(DataError, match="nobody"):
        study.run(config, tmp_path / "run")
    with pytest.raises(ValueError, match=r"cell must be one of 4x2-seed-0, .*, got '4x9'"):
        study.run(load_config(file), tmp_path / "run", only="4x9")
