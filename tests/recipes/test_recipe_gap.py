"""The gap recipe: rows, drawn people, measures of embeddings, the report, bad input named."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from synface.recipes import gap
from synface.recipes.gap import load_config
from synface.recipes.gap.embeddings import across, between, scaled, unpaired, within
from synface.recipes.gap.recipe import first_images, unseen_faces, varied
from synface.recipes.generated import drawn_people
from synface.recipes.report import spread
from synface.synthesis import open_generator

from tests.helpers.command_line import call
from tests.helpers.figures import blank
from tests.helpers.generators import people, unit

TINY = """
seeds = [0, 3]
strengths = [0.5, 1]
samples = [3, 1]
pictured = 2
[data]
size = 16
embedding_size = 8
identities = 4
images_per_identity = 3
real_identities = 3
[train]
epochs = 1
batch_size = 8
lr = 0.05
warmup_epochs = 0.5
widths = [4, 8]
depths = [1, 1]
embedding_size = 8
checkpoint_every = 1
"""


def test_seeds_train_on_different_people():
    faces = people(10, 2)
    parts = [drawn_people(faces, 3, seed) for seed in range(4)]
    trained = [real.identities for real, _ in parts]
    assert len({tuple(sorted(names)) for names in trained}) > 1
    assert trained == [drawn_people(faces, 3, seed)[0].identities for seed in range(4)]
    for real, held in parts:
        assert sorted(real.identities + held.identities) == sorted(faces.identities)
        for part in (real, held):
            for label, name in enumerate(part.identities):
                images = faces.images[faces.labels == int(name[1:])]
                assert torch.equal(part.images[part.labels == label], images)
    for count in (9, 10):
        with pytest.raises(ValueError, match=r"random pixels must have .* people or more"):
            drawn_people(faces, count, 0)


def test_fewer_images_of_each_person():
    faces = people(3, 4)
    fewer = first_images(faces, 2)
    assert fewer.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert torch.equal(fewer.images, faces.images[[0, 1, 4, 5, 8, 9]])
    with pytest.raises(ValueError, match=r"must have 5 images or more of each person.* 4 of p0"):
        first_images(faces, 5)


def test_measures_of_embeddings():
    # Two images each, at ±60° and at 0° of their centers, which are the axes and a diagonal.
    axes = torch.eye(4, dtype=torch.float64)
    aside = 0.5 * axes[0] + 0.75**0.5 * axes[3]
    other = 0.5 * axes[0] - 0.75**0.5 * axes[3]
    diagonal = F.normalize(axes[0] + axes[1], dim=0)
    faces = torch.stack(
        [torch.stack([aside, other]), *(x.repeat(2, 1) for x in (axes[1], diagonal))]
    )
    assert within(faces)["values"] == pytest.approx([0.5, 0, 0], abs=1e-12)
    root = 0.5**0.5
    assert between(faces)["mean"] == pytest.approx((1 + 2 * (1 - root)) / 3)
    assert across(faces, axes[None, :1])["values"] == pytest.approx([0, 1, 1 - root], abs=1e-12)

    # The jackknife's standard error, from the definition: each identity left out in turn.
    faces = unit(24, 5).double().unflatten(0, (8, 3))
    left = [between(torch.cat([faces[:i], faces[i + 1 :]]))["mean"] for i in range(8)]
    error = np.sqrt(7 * np.var(left))
    found = between(faces)
    assert found["std"] / np.sqrt(8) == pytest.approx(error)

    less = unpaired(spread([1.0, 2.0, 3.0]), spread([0.0, 0.5, 1.0, 0.5]))
    assert less["mean"] == pytest.approx(1.5)
    # Welch: variances 1/3 and 1/24, 2.51 degrees of freedom; Student's quantile 3.565.
    assert less["ci95"] == pytest.approx(3.565 * 0.375**0.5, rel=2e-3)


def test_the_map_keeps_distances():
    # Points of a sphere whose cosine distances are those of a line: two axes hold them all.
    cosines = 1 - np.abs(np.subtract.outer(*[np.array([0.0, 0.3, 0.5, 0.9])] * 2))
    values, vectors = np.linalg.eigh(cosines)
    rows = torch.from_numpy(vectors * np.sqrt(values.clip(0)))
    points, share = scaled(rows)
    assert share == pytest.approx(1)
    distances = np.linalg.norm(points[:, None] - points, axis=-1)
    np.testing.assert_allclose(distances, 1 - cosines, atol=1e-6)


def test_strengths_scale_the_chosen_controls(file):
    config = load_config(file)
    generator = open_generator(None, 8, size=16)
    near, far = (varied(generator, config, strength) for strength in (0.5, 1.0))
    assert near.strengths == dict.fromkeys(generator.controls, 0.5)
    alone = replace(config, data=replace(config.data, controls=("pose",)))
    pose = varied(alone.data.face_generator(), alone, 0.5)
    assert pose.strengths == {"pose": 0.5}
    front = unseen_faces(alone, alone.data.face_generator(), 0.0, 1, 2)
    assert torch.equal(front[0, 0], front[0, 1])
    drawn = [unseen_faces(config, generator, s, 2, 4).double() for s in (0.5, 1.0)]
    assert drawn[0].shape == (2, 4, *far.image_shape)
    assert drawn[0].std(1).mean() < drawn[1].std(1).mean()


@pytest.mark.slow
def test_from_data_to_a_report(tmp_path, file):
    run = tmp_path / "run"
    command = ["recipe", "gap", "--config", file, "--output", run]
    call(*command, "--cell", "real-S-3-seed-3")
    call(*command, "--resume", "--workers", "1")
    page = (run / "report" / "gap.md").read_text()
    shown = re.findall(r"!\[.*\]\((.*)\)", page)
    assert shown == ["gap-rows.png", "gap-map.png", "gap-spread.png", "gap-faces.png"]
    assert all((run / "report" / name).stat().st_size > 1000 for name in shown)
    block = re.search(r"```toml\n(.*)```", page, re.DOTALL)
    (tmp_path / "again.toml").write_text(block.group(1))
    assert load_config(tmp_path / "again.toml") == load_config(file)

    numbers = json.loads((run / "report" / "gap.json").read_text())
    rows = numbers["rows"]
    assert list(rows) == list(gap.rows(load_config(file)))
    assert len(rows) == 6
    gains = numbers["differences"]
    assert len(gains) == 7
    for name, found in gains.items():
        of, less = (rows[row]["auc"]["values"] for row in name.split(" − "))
        assert found["auc"]["values"] == [a - b for a, b in zip(of, less, strict=True)]
        assert 0 <= found["auc"]["p"] <= 1
    real = numbers["embeddings"]["real"]
    assert len(real["within"]["values"]) == 97  # all but the three that were trained on
    assert numbers["map"]["people"] == 2
    assert len(numbers["map"]["points"]) == 2 * 2 * 3
    assert len(numbers["raw pixels"]["auc"]["values"]) == 2

    # All is there: nothing is trained again, and no faces are shown where none are wanted.
    logs = {f: f.stat().st_mtime_ns for f in run.rglob("metrics.jsonl")}
    assert len(logs) == 12
    other = tmp_path / "report"
    with blank():
        call(*command, "--resume", "--workers", "1", "--report", other, "--no-faces")
    assert {f: f.stat().st_mtime_ns for f in logs} == logs
    assert json.loads((other / "gap.json").read_text()) == numbers
    assert not (other / "gap-faces.png").exists()


def test_cells_have_as_many_steps_and_people_of_their_own(file):
    config = load_config(file)
    config = replace(config, train=replace(config.train, epochs=4))
    generator = open_generator(None, 8, size=16)
    found = {cell.name: cell for cell in gap.cells(config, generator, people(9, 4))}
    assert {cell.steps for cell in found.values()} == {8}
    mixed, real = found["mixed-S-1-seed-3"], found["real-S-1-seed-3"]
    assert mixed.source().num_classes == 4 + 3
    assert len(real.source()) == 3
    assert mixed.held.identities == real.held.identities
    assert mixed.held.identities == drawn_people(people(9, 4), 3, 3)[1].identities


def test_bad_input_is_named(tmp_path, file):
    config = load_config(file)

    def raises(message: str, **data: object) -> None:
        bad = replace(config, data=replace(config.data, **data))
        with pytest.raises(ValueError, match=message):
            gap.run(bad, tmp_path / "run")

    raises("must have 101 people or more, got 100", real_identities=98)
    raises("controls: .* has no control 'pose'; .*", generator="eigenfaces", controls=("pose",))
    config = replace(config, samples=(11,))
    raises(r"must have 11 images or more of each person \(samples\), got 10")
    assert not (tmp_path / "run").exists()

    class Nameless:
        """A face generator that names no control."""

        embedding_size, style_size, image_shape, description = 8, 2, (16, 16, 1), {"kind": "x"}

    with pytest.raises(ValueError, match="generator = 'heads' names no controls"):
        varied(Nameless(), config, 0.5)
