"""The SynFace recipe: four rows and the real people alone, resumed by cell, bad input named."""

import json
import os
import re
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from synface.cli.recipes import app
from synface.common.config import to_toml
from synface.common.files import CheckpointError
from synface.data import Augment, DataError, Faces
from synface.data.loading.sampler import Part
from synface.data.mixing import Constant, IdentityMixup
from synface.recipes import sweep as cells
from synface.recipes.generated import identities
from synface.recipes.synface import recipe as synface
from synface.recipes.synface.recipe import load_config
from synface.synthesis.dataset import synthesize
from synface.synthesis.generators import EigenfaceGenerator
from synface.synthesis.sources import GeneratedSource
from synface.training.loop import TrainConfig
from typer.testing import CliRunner

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
CONFIG = TrainConfig(epochs=2, batch_size=5, augment=0.0, seed=3)


def people(count: int, images: int, size: int = 16) -> Faces:
    pixels = torch.randint(256, (count * images, size, size, 1), dtype=torch.uint8)
    labels = torch.arange(count).repeat_interleave(images)
    return Faces(pixels, labels, [f"p{i}" for i in range(count)], "random pixels")


def test_from_data_to_a_report(tmp_path, file):
    command = ["synface", "--config", str(file), "--output", str(tmp_path / "run")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    report = tmp_path / "run" / "report"
    page = (report / "synface.md").read_text()
    shown = re.findall(r"!\[.*\]\((.*)\)", page)
    assert shown == ["synface-rows.png", "synface-faces.png"]
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
    assert len(logs) == 10
    other = tmp_path / "report"
    again = CliRunner().invoke(app, [*command, "--resume", "--report", str(other), "--no-faces"])
    assert again.exit_code == 0, again.output
    assert {f: f.stat().st_mtime_ns for f in logs} == logs
    assert json.loads((other / "synface.json").read_text()) == figures
    assert sorted(f.name for f in other.iterdir()) == [
        "synface-rows.png",
        "synface.json",
        "synface.md",
    ]


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
    assert not (apart / "both-seed-4" / cells.RESULT).exists()
    found = synface.run(config, apart, only="both-seed-4", resume=True)
    assert list(found.cells) == ["both-seed-4"]
    assert synface.run(config, apart, resume=True).cells == whole.cells

    with pytest.raises(ValueError, match="cell must be one of both-seed-4, real-seed-4, got 'x'"):
        synface.run(config, apart, only="x")
    other = replace(config, train=replace(config.train, lr=0.01))
    with pytest.raises(CheckpointError, match="of another run: its config's lr is"):
        synface.run(other, apart, resume=True)
    (apart / "both-seed-4" / cells.RESULT).write_text("{}")
    with pytest.raises(CheckpointError, match=r"result\.json is damaged"):
        synface.run(config, apart, resume=True)


def test_the_real_row_trains_for_as_many_steps(file):
    config = load_config(file)
    found = synface.cells(config, config.data.painter(), people(3, 2))
    steps = {}
    for cell in found[: len(config.rows)]:
        length = len(cell.source())
        steps[cell.name] = cell.config.epochs * -(-length // cell.config.batch_size)
    assert set(steps.values()) == {4}
    real = found[config.rows.index("real")].config
    assert (real.epochs, real.warmup_epochs, real.checkpoint_every) == (4, 1.0, 2)


def test_generated_images_are_those_of_a_folder(tmp_path):
    """Without mixing, an epoch is what `synthesize` writes, in another order."""
    from synface.data import normalize, read_folder

    points, painter = identities(4, 8, seed=1), EigenfaceGenerator(8, 16)
    synthesize(points, painter, tmp_path / "faces", 3, seed=7)
    written = read_folder(tmp_path / "faces")
    source = GeneratedSource(points, painter, 3, seed=7)
    assert (source.num_classes, len(source)) == (4, 12)
    epochs = [batch for _, batch in source.batches(CONFIG, 0)]
    assert [len(batch.images) for batch in epochs] == [5, 5, 2] * 2
    for epoch in (epochs[:3], epochs[3:]):
        labels = torch.cat([batch.target for batch in epoch])
        images = torch.cat([batch.images for batch in epoch])
        for label in range(4):
            wanted = normalize(written.images[written.labels == label]).flatten(1)
            came = images[labels == label].flatten(1)
            assert sorted(wanted.tolist()) == sorted(came.tolist())
    assert not torch.equal(epochs[0].target, epochs[3].target)


def test_identity_mixup_draws_the_identity_between():
    points, painter = identities(4, 8, seed=1), EigenfaceGenerator(8, 16)
    mixup = IdentityMixup(Constant(0.25))
    source = GeneratedSource(points, painter, 2, seed=7, identity_mixup=mixup)
    _, batch = next(source.batches(CONFIG, 0))
    assert batch.target.shape == (5, 2)
    torch.testing.assert_close(batch.target_weight, torch.tensor([[0.25, 0.75]] * 5))
    plain = GeneratedSource(points, painter, 2, seed=7)
    assert torch.equal(next(plain.batches(CONFIG, 0))[1].target, batch.target[:, 0])
    # The coefficients, seen by a painter that shows them.
    seen = []

    class Painter(EigenfaceGenerator):
        def generate(self, embedding, style, seed):
            seen.append(embedding)
            return super().generate(embedding, style, seed)

    next(GeneratedSource(points, Painter(8, 16), 2, identity_mixup=mixup).batches(CONFIG, 0))
    first, second = points[batch.target.T]
    torch.testing.assert_close(seen[0], F.normalize(0.25 * first + 0.75 * second))


@pytest.mark.parametrize("psi", [0.0, 1.0, 0.25])
def test_domain_mixup_mixes_the_augmented_sides(psi):
    points, painter, real = identities(4, 8, seed=1), EigenfaceGenerator(8, 16), people(3, 2)
    config = replace(CONFIG, augment=1.0)
    source = GeneratedSource(points, painter, 2, real=real, ratio=Constant(psi))
    assert source.num_classes == 7
    _, mixed = next(source.batches(config, 0))
    _, plain = next(GeneratedSource(points, painter, 2).batches(config, 0))
    assert torch.equal(mixed.target[:, 0], plain.target)
    assert (mixed.target[:, 1] >= 4).all()
    assert mixed.target_weight.tolist() == [[psi, 1 - psi]] * 5
    if psi == 1.0:
        torch.testing.assert_close(mixed.images, plain.images)
    only_real = GeneratedSource(points, painter, 2, real=real, ratio=Constant(0.0))
    other = next(only_real.batches(config, 0))[1].images
    torch.testing.assert_close(mixed.images, psi * plain.images + (1 - psi) * other)


def test_three_labels_parts_and_resumption():
    points, painter, real = identities(4, 8, seed=1), EigenfaceGenerator(8, 16), people(3, 2)
    source = GeneratedSource(points, painter, 3, real=real, identity_mixup=IdentityMixup())
    whole = dict(source.batches(CONFIG, 0))
    assert list(whole) == list(range(6))
    batch = whole[2]
    assert batch.target.shape == batch.target_weight.shape == (2, 3)
    assert (batch.target_weight.sum(1) == 1).all()
    for step, again in source.batches(CONFIG, 4):
        assert all(map(torch.equal, again, whole[step]))
    parts = [dict(source.batches(CONFIG, 0, Part(rank, 2))) for rank in (0, 1)]
    assert [len(part[0].images) for part in parts] == [2, 3]
    seen = torch.cat([part[0].target[:, 0] for part in parts])
    assert torch.equal(seen, whole[0].target[:, 0])


def test_bad_sources_are_named():
    points, painter = identities(4, 8, seed=1), EigenfaceGenerator(8, 16)
    with pytest.raises(ValueError, match="images_per_identity must be at least 1, got 0"):
        GeneratedSource(points, painter, 0)
    with pytest.raises(ValueError, match=r"embeddings must be .* \(N, 8\)"):
        GeneratedSource(points[:, :7], painter, 2)
    with pytest.raises(ValueError, match=r"real must hold images of shape \(16, 16, 1\)"):
        GeneratedSource(points, painter, 2, real=people(3, 2, size=12))
    assert Augment(0.0)(people(2, 1).images, torch.Generator()).shape == (2, 1, 16, 16)


def test_the_default_is_read_and_written_back(tmp_path):
    config = load_config()
    file = tmp_path / "copy.toml"
    file.write_text(to_toml(config))
    assert load_config(file) == config


def test_real_people_of_a_folder(tmp_path, file):
    if not ORL.is_dir():
        pytest.skip(f"{ORL} is not there")
    config = replace(load_config(file), seeds=(0,), rows=("real",))
    config = replace(config, data=replace(config.data, real=str(ORL)))
    results = synface.run(config, tmp_path / "run")
    assert (len(results.real), len(results.held)) == (30, 40)
    assert results.held.images.shape[1:] == (16, 16, 1)
    assert not set(results.real.identities) & set(results.held.identities)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sead = 1", "tiny.toml: unknown key 'sead'; did you mean 'seeds'"),
        ("[data]\nidentity = 1", r"\[data\]: unknown key 'identity'; did you mean 'identities'"),
        ("[data]\nidentities = 1", "identities must be at least 2, got 1"),
        ("[data]\nsize = 4", "size must be at least 8, got 4"),
        ("seeds = []", r"seeds must be different, and at least one, got \[\]"),
        ("seeds = [1, 1]", r"seeds must be different, and at least one, got \[1, 1\]"),
        ("seeds = [-1]", "seeds must be at least 0, got -1"),
        ("rows = ['mixup']", r"rows must be different ones of synthetic, .*, got \['mixup'\]"),
        ("[train]\nepochs = 0", r"\[train\]: epochs must be positive"),
        ("seeds = ", "tiny.toml is not TOML"),
    ],
)
def test_a_bad_configuration_is_named(tmp_path, text, message):
    file = tmp_path / "tiny.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config(file)


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
