"""The HyperFace recipe: packed beside random identities, the report, resumption, bad input."""

import json
import re
from dataclasses import replace

import pytest
import torch
from synface.data import DataError
from synface.recipes import hyperface
from synface.recipes.generated import identities
from synface.recipes.hyperface import load_config, report
from synface.recipes.report import difference, spread, verdict
from synface.synthesis.packing import Packer, closest_pair

from tests.helpers.command_line import call
from tests.helpers.figures import blank

TINY = """
seeds = [0, 2]
recognizer_epochs = 2
[data]
size = 16
embedding_size = 3
identities = 6
images_per_identity = 4
[pack]
steps = 40
gallery = 30
[train]
epochs = 1
batch_size = 8
lr = 0.02
widths = [4, 8]
depths = [1, 1]
embedding_size = 8
checkpoint_every = 1
"""


@pytest.mark.slow
def test_from_packing_to_a_report(tmp_path, file):
    run = tmp_path / "run"
    command = ["recipe", "hyperface", "--config", file, "--output", run]
    call(*command, "--cell", "packed-gallery-seed-0")
    call(*command, "--resume", "--workers", 1)
    page = (run / "report" / "hyperface.md").read_text()
    shown = re.findall(r"!\[.*\]\((.*)\)", page)
    assert shown == ["hyperface-distances.png", "hyperface-kinds.png", "hyperface-faces.png"]
    assert all((run / "report" / name).stat().st_size > 1000 for name in shown)
    block = re.search(r"```toml\n(.*)```", page, re.DOTALL)
    (tmp_path / "again.toml").write_text(block.group(1))
    assert load_config(tmp_path / "again.toml") == load_config(file)
    figures = json.loads((run / "report" / "hyperface.json").read_text())
    # Six points in three dimensions: the octahedron.
    assert figures["bound"]["cosine"] == pytest.approx(0.0, abs=1e-9)
    assert figures["packed"]["worst cosine"]["mean"] == pytest.approx(0.0, abs=0.02)
    random = [closest_pair(identities(6, 3, seed))[0] for seed in (0, 2)]
    assert figures["random"]["worst cosine"]["values"] == pytest.approx(random)
    assert min(random) > 0.1
    for kind in hyperface.KINDS[1:]:
        less = figures[f"{kind} less random"]
        for key in ("auc", "mean nearest cosine of the faces in the recognizer"):
            pairs = zip(figures[kind][key]["values"], figures["random"][key]["values"], strict=True)
            assert less[key]["values"] == [a - b for a, b in pairs]
        assert f"- {kind}, against random: ROC-AUC {verdict(less['auc'])} (" in page
        assert less["smallest distance of the faces, gray levels"]["p"] is not None

    # All is there: nothing is made again, and the same comes out.
    made = {f: f.stat().st_mtime_ns for f in run.glob("*/*") if "report" not in f.parts}
    other = tmp_path / "report"
    with blank():
        call(*command, "--resume", "--report", other, "--no-faces")
    assert {f: f.stat().st_mtime_ns for f in made} == made
    assert json.loads((other / "hyperface.json").read_text()) == figures
    assert not (other / "hyperface-faces.png").exists()


def test_a_packing_that_cannot_be_is_refused_before_any_work(file):
    config = load_config(file)
    packing = replace(config.pack, objective="orbit")
    message = "pack, for the identities 'packed, gallery': objective must be .* with a gallery"
    with pytest.raises(ValueError, match=message):
        replace(config, pack=packing)
    others = tuple(kind for kind in hyperface.KINDS if kind != "packed, gallery")
    assert replace(config, kinds=others, pack=packing).packing(0).objective == "orbit"


def test_packing_by_faces_separates_the_faces_and_the_gallery_attracts(tmp_path, file):
    config = load_config(file)
    config = replace(config, pack=replace(config.pack, gallery=4, alpha=100.0))
    generator = config.data.face_generator()

    def points(kind, **options):
        return hyperface.points_of(config, generator, tmp_path, kind, 0, **options)

    found = {kind: points(kind) for kind in hyperface.KINDS}
    smallest = {}
    for kind, rows in found.items():
        assert torch.equal(points(kind, resume=True), rows)
        faces = hyperface.neutral_faces(generator, rows)
        assert faces.shape == (6, 16, 16, 1)
        smallest[kind] = torch.pdist(faces.flatten(1).double()).min().item() / 16
    assert smallest["packed by faces"] > max(smallest["packed"], smallest["random"]) + 1
    # With so large a weight the points are close to the four of the gallery.
    assert closest_pair(found["packed, gallery"])[0] > closest_pair(found["packed"])[0] + 0.3
    with pytest.raises(FileExistsError, match=r"packed-by-faces-seed-0\.safetensors exists"):
        points("packed by faces")
    for kind, name in (("packed, gallery", "gallery"), ("packed by faces", "candidates")):
        config = replace(config, pack=replace(config.pack, **{name: 7}))
        with pytest.raises(ValueError, match=f"of another run: its {name} is"):
            points(kind, resume=True)


def test_a_packing_that_was_interrupted_goes_on(tmp_path, file):
    config = load_config(file)
    generator = config.data.face_generator()
    whole = hyperface.points_of(config, generator, tmp_path / "whole", "packed", 2)
    begun = tmp_path / "part" / "packed-seed-2.checkpoints"
    with pytest.raises(KeyboardInterrupt):
        Packer(config.packing(2)).run(begun, stop_after=9)
    arguments = config, generator, tmp_path / "part", "packed", 2
    with pytest.raises(FileExistsError, match="holds a run already"):
        hyperface.points_of(*arguments)
    assert torch.equal(hyperface.points_of(*arguments, resume=True), whole)
    assert [each.name for each in (tmp_path / "part").iterdir()] == ["packed-seed-2.safetensors"]


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_the_same_again_and_not_for_another_configuration(tmp_path, file):
    config = replace(load_config(file), seeds=(0,), kinds=("random", "packed"))
    first = hyperface.run(config, tmp_path / "first")
    second = hyperface.run(config, tmp_path / "second")
    assert first.cells == second.cells
    assert list(first.cells) == ["recognizer", "random-seed-0", "packed-seed-0"]
    for kind in config.kinds:
        for name in ("cosines", "face_cosines", "face_distances", "recognizer_cosines"):
            assert all(map(torch.equal, getattr(first, name)[kind], getattr(second, name)[kind]))
        faces = hyperface.neutral_faces(first.generator, first.points[kind][0]).double().flatten(1)
        difference = (faces[:, None] - faces).square().mean(2).sqrt().fill_diagonal_(torch.inf)
        torch.testing.assert_close(first.face_distances[kind][0], difference.amin(1))
    page = hyperface.write(first, tmp_path / "report", "synface").read_text()
    assert "One seed has no interval: nothing is concluded." in page
    with pytest.raises(FileExistsError):
        hyperface.run(config, tmp_path / "first")
    other = replace(config, pack=replace(config.pack, steps=3))
    with pytest.raises(ValueError, match="of another run: its steps is '40', expected '3'"):
        hyperface.run(other, tmp_path / "first", resume=True)
    (tmp_path / "second" / "packed-seed-0.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        hyperface.run(config, tmp_path / "second", resume=True)


def numbers_of(*rows):
    """Return the numbers of kinds by name and ROC-AUCs, all else 0.5."""
    numbers = {kind: {"top1": spread([0.5] * len(aucs))} for kind, aucs in rows}
    first = rows[0][1]
    for kind, aucs in rows[1:]:
        same = difference(spread([0.5] * len(first)), spread([0.5] * len(first)))
        found = dict.fromkeys((*report.METRICS, *report.KEYS), same)
        numbers[f"{kind} less a"] = found | {"auc": difference(spread(aucs), spread(first))}
    return numbers


def test_conclusions_are_worded_by_their_intervals():
    first = [0.90, 0.91, 0.89]
    numbers = numbers_of(
        ("a", first),
        ("b", [0.94, 0.952, 0.931]),
        ("c", [0.80, 0.99, 0.91]),
        ("d", [0.86, 0.868, 0.851]),
    )
    text = report.conclusions(numbers, "a", ["b", "c", "d"])
    assert "- b, against a: ROC-AUC higher (+0.0410 ± " in text
    assert "- c, against a: ROC-AUC not resolved (" in text
    assert "- d, against a: ROC-AUC lower (-0.0403 ± " in text
    assert "“b” has a higher ROC-AUC than “a”" in text
    assert "“d” has a lower ROC-AUC than “a”" in text
    assert "Far from trained" not in text
    numbers["d"]["top1"] = spread([0.3, 0.4, 0.5])
    text = report.conclusions(numbers, "a", ["b", "c", "d"])
    assert "below 0.5" in text
    assert text.endswith("said of them: d.")
    text = report.conclusions(numbers, "a", ["c"])
    assert "No kind has a higher ROC-AUC" in text
    assert "No kind has a lower ROC-AUC" in text


def test_a_missing_folder_is_named(tmp_path, file):
    config = load_config(file)
    config = replace(config, data=replace(config.data, real=str(tmp_path / "nobody")))
    with pytest.raises(DataError, match="nobody"):
        hyperface.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
