"""The CFSM recipe: from data to a report, resumed bitwise the same, bad configurations named."""

import json
import os
import re
import shutil
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from synface.checkpoint.state import FORMAT
from synface.common.files import CheckpointError, read_state, sealed
from synface.data import embedded_faces
from synface.recipes import cfsm
from synface.recipes.cfsm import load_config, style
from synface.recipes.cfsm.config import ADDITIONS
from synface.recipes.cfsm.degrade import DOMAINS, degrade
from synface.recipes.cfsm.model import Generator, GeneratorConfig
from torch import nn

from tests.helpers.command_line import call, refused
from tests.helpers.figures import blank

ROOT = Path(__file__).parents[2]
ORL = ROOT / ".." / "shared" / "data" / "orl"
TINY = """
seed = 3
domains = ["dark", "blurred"]
[data]
size = 16
images_per_identity = 3
target_identities = 75
held_out_identities = 10
[recognizer]
epochs = 1
widths = [4, 8]
depths = [1, 1]
embedding_size = 8
batch_size = 15
[generator]
styles = 3
latent = 8
width = 4
downsamplings = 1
blocks = 1
hidden = 8
[discriminator]
width = 4
layers = 2
scales = 2
[style]
steps = 6
batch_size = 4
lr = 1e-3
checkpoint_every = 2
[guided]
domain = "dark"
steps = 4
batch_size = 8
originals = 0.5
checkpoint_every = 3
"""


@pytest.fixture
def config(file) -> cfsm.CfsmConfig:
    return load_config(file)


def weights(folder: Path) -> dict[str, bytes]:
    """Return the tensors' files of the last checkpoints below a folder."""
    files = sorted(folder.rglob("tensors.safetensors"))
    newest = {file.parent.parent: file for file in files}  # sorted: the last one stays
    return {str(k.relative_to(folder)): file.read_bytes() for k, file in newest.items()}


def logs(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): f.read_text() for f in folder.rglob("metrics.jsonl")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return a run that was not interrupted, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.toml").write_text(TINY)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        state = torch.get_rng_state()
        results = cfsm.run(load_config(folder / "tiny.toml"), folder / "run")
        assert torch.equal(torch.get_rng_state(), state)
    return SimpleNamespace(folder=folder / "run", results=results)


def earlier(run: Path, copy: Path, change) -> None:
    """Copy a run with other configurations in its checkpoints, which a resumed run must restore."""
    shutil.copytree(run, copy)
    for file in copy.rglob("result.json"):
        file.unlink()
    for kind in ("style", "guided"):
        files = list((copy / kind).rglob("state.json"))
        assert files
        for file in files:
            state = read_state(file, FORMAT)
            file.write_text(sealed(state | {"config": change(state["config"])}))


@pytest.mark.slow
def test_from_data_to_a_report(tmp_path, config):
    (tmp_path / "tiny.toml").write_text(TINY)
    command = ["recipe", "cfsm", "--config", tmp_path / "tiny.toml", "--output", tmp_path / "run"]
    command += ["--workers", "1"]
    assert "guided images raise the loss by" in call(*command)
    report = tmp_path / "run" / "report"
    page = (report / "cfsm.md").read_text()
    shown = re.findall(r"!\[.*\]\((.*)\)", page)
    assert len(shown) == 10
    assert all((report / name).stat().st_size > 1000 for name in shown)
    assert "20" in page  # batches
    block = re.search(r"```toml\n(.*)```", page, re.DOTALL)
    (tmp_path / "again.toml").write_text(block.group(1))
    assert load_config(tmp_path / "again.toml") == config
    figures = json.loads((report / "cfsm.json").read_text())
    assert figures["similarity"]["dark"]["dark"] == pytest.approx(1.0)
    assert figures["verification"].keys() == {"before", *cfsm.VARIANTS}

    # Everything is there: the same figures come out, and nothing is trained again.
    before = weights(tmp_path / "run"), logs(tmp_path / "run")
    with blank():
        call(*command, "--resume")
    assert (weights(tmp_path / "run"), logs(tmp_path / "run")) == before
    same = json.loads((report / "cfsm.json").read_text())
    assert same.pop("seconds") is None
    assert figures.pop("seconds") > 0
    assert same == figures
    with pytest.raises(FileExistsError, match="holds a run already"):
        cfsm.run(config, tmp_path / "run")


def test_options_that_have_no_effect_are_refused(tmp_path):
    paper = tmp_path / "paper.toml"
    paper.write_text('fidelity = "paper"\n[generator]\nnoise = true\n')
    command = ("recipe", "cfsm", "--output", tmp_path / "run")
    assert "'paper': change it there" in refused(
        *command, "--config", paper, "--fidelity", "extended"
    )
    assert "ablations need additions" in refused(*command, "--fidelity", "paper", "--ablations")
    assert "fidelity must be one of" in refused(*command, "--fidelity", "full")
    assert "--config has no effect with --quick" in refused(*command, "--quick", "--config", paper)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_runs_are_the_same_and_an_interrupted_one_too(tmp_path, config, whole):
    pressed = []

    class Impatient:
        """Presses Ctrl-C in the third step of each part, once."""

        def __init__(self, name: str) -> None:
            self.name, self.steps = name, 0

        def start(self, total_steps: int, step: int) -> None: ...

        def step(self, loss: float, accuracy: float, images: int) -> None:
            self.advance("")

        def advance(self, note: str) -> None:
            self.steps += 1
            if self.steps == 3 and self.name not in pressed:
                pressed.append(self.name)
                os.kill(os.getpid(), signal.SIGINT)

    @contextmanager
    def bar(name: str):
        yield Impatient(name)

    for _ in range(20):
        try:
            cut = cfsm.run(config, tmp_path / "cut", resume=True, progress=bar)
            break
        except KeyboardInterrupt:
            torch.rand(3)
    assert len(pressed) == 6  # the recognizer, stage 1 twice, stage 2 three times
    assert weights(whole.folder) == weights(tmp_path / "cut")
    assert logs(whole.folder) == logs(tmp_path / "cut")
    assert cfsm.measured(whole.results) == cfsm.measured(cut)

    other = replace(config, style=replace(config.style, lr=0.5))
    with pytest.raises(CheckpointError, match=r"another run: its config's style is .*0.001"):
        cfsm.run(other, tmp_path / "cut", resume=True)
    log = tmp_path / "cut" / "style" / "dark" / "metrics.jsonl"
    log.write_text(log.read_text()[:50])
    with pytest.raises(CheckpointError, match=r"metrics.jsonl does not fit the checkpoint"):
        cfsm.run(config, tmp_path / "cut", resume=True)


@pytest.mark.slow
def test_a_run_of_version_0_1_goes_on(tmp_path, config, whole):
    """Version 0.1 had the British spelling in the recognizer's folder and checkpoints."""

    def british(stored):
        return json.loads(json.dumps(stored).replace('"recognizer"', '"recogniser"'))

    earlier(whole.folder, tmp_path / "old", british)
    (tmp_path / "old" / "recognizer").rename(tmp_path / "old" / "recogniser")
    before = weights(tmp_path / "old")
    shutil.rmtree(tmp_path / "old" / "guided" / "random")
    resumed = cfsm.run(config, tmp_path / "old", resume=True)
    assert weights(tmp_path / "old") == before
    assert cfsm.measured(resumed) == cfsm.measured(whole.results)
    other = replace(config, recognizer=replace(config.recognizer, dropout=0.5))
    with pytest.raises(CheckpointError, match="another run: its config's dropout is"):
        cfsm.run(other, tmp_path / "old", resume=True)


def test_a_configuration_of_version_0_1_is_read(tmp_path, config):
    file = tmp_path / "old.toml"
    file.write_text(TINY.replace("[recognizer]", "[recogniser]"))
    assert load_config(file) == config


@pytest.mark.slow
def test_the_orthogonality_falls(tmp_path, config):
    config = replace(config, style=replace(config.style, steps=100, lr=0.01, checkpoint_every=100))
    people = cfsm.read_people(config.data, config.seed)
    recognizer = nn.Sequential(nn.Flatten(), nn.Linear(256, 8))
    _, history = cfsm.learn_style(config, people, recognizer, "noisy", tmp_path / "run")
    assert history[0]["l1"] > 0.5
    assert max(row["l1"] for row in history[-5:]) < 1e-2
    assert recognizer[1].weight.requires_grad
    assert recognizer[1].weight.grad is None


def test_a_sweep_is_the_cosine_at_each_strength():
    generator = Generator(GeneratorConfig(3, 6, 4, 1, 1, 8)).eval()
    recognizer = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
    images = torch.rand(2, 1, 8, 8)
    strengths = torch.tensor([0.0, 2.0])
    found = cfsm.strength_sweep(generator, recognizer, images, strengths, seed=0)
    assert found["axes"].shape == (3, 2)
    with torch.no_grad():
        own = recognizer(images)
        at_rest = F.cosine_similarity(own, recognizer(generator(images, torch.zeros(2, 3)))).mean()
        o = torch.tensor([[0.0, 2.0, 0.0]] * 2)
        end = F.cosine_similarity(own, recognizer(generator(images, o))).mean()
    torch.testing.assert_close(found["axes"][:, 0], at_rest.expand(3))
    torch.testing.assert_close(found["random"][0], at_rest)
    torch.testing.assert_close(found["axes"][1, 1], end)


@pytest.mark.parametrize("domain", sorted(DOMAINS))
def test_degradations(domain):
    faces = embedded_faces(images_per_identity=2, size=24, identities=4)
    changed = cfsm.degraded(faces, domain, seed=1)
    assert torch.equal(changed.images, cfsm.degraded(faces, domain, seed=1).images)
    assert changed.images.shape == faces.images.shape
    assert torch.equal(changed.images, faces.images) == (domain == "as_is")
    x = torch.zeros(3, 3, 20, 16)
    assert degrade(x, domain, torch.Generator().manual_seed(0)).shape == x.shape
    with pytest.raises(ValueError, match=r"domain must be one of low_resolution, .*, got 'foggy'"):
        cfsm.degraded(faces, "foggy", seed=1)


def test_stage_2_keeps_a_share_of_originals(tmp_path, config, monkeypatch):
    people = cfsm.read_people(config.data, config.seed)
    seen = []

    class Halving(nn.Module):
        def forward(self, images, o):
            seen.append((len(images), torch.is_grad_enabled()))
            return images * 0.5 + 0 * o.sum()

    from synface.heads import MarginHead
    from synface.models.iresnet import IResNet

    network = IResNet((16, 16), 1, (4, 8), (1, 1), 8)
    head = MarginHead(8, len(people.source.identities))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    config = replace(config, guided=replace(config.guided, originals=0.25))
    for variant in ("guided", "random", "originals"):
        seen.clear()
        folder = tmp_path / variant
        trained, _ = cfsm.train_guided(config, people, network, head, Halving(), variant, folder)
        steps = config.guided.steps
        expected = {
            "guided": [(6, True), (6, False)] * steps,
            "random": [(6, False)] * steps,
            "originals": [],
        }
        assert seen == expected[variant]
        assert not torch.equal(trained.stem[0].weight, network.stem[0].weight)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    with pytest.raises(ValueError, match=r"variant must be one of .*, got 'best'"):
        cfsm.train_guided(config, people, network, head, Halving(), "best", tmp_path / "x")


def test_people_of_another_folder_as_targets(config):
    if not ORL.is_dir():
        pytest.skip(f"{ORL} is not there")
    data = replace(config.data, target=str(ORL), target_identities=0)
    people = cfsm.read_people(data, 0)
    assert len(people.target) == 400
    assert people.target.images.shape[1:] == (16, 16, 1)
    assert len(people.source.identities) == 90


def test_the_page_is_so(tmp_path):
    """The page's code runs, and its figures come from the default configuration."""
    code = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/recipes/cfsm.md").read_text(), re.DOTALL
    )
    assert code
    with torch.random.fork_rng():
        for block in code:
            names: dict[str, object] = {}
            exec(compile(block, "cfsm.md", "exec"), names)
            assert names["harder"].shape == names["images"].shape
    report = (ROOT / "docs/results/cfsm.md").read_text()
    file = tmp_path / "reported.toml"
    file.write_text(re.search(r"```toml\n(.*)```", report, re.DOTALL).group(1))
    assert load_config(file) == load_config()
    assert "`synface recipe cfsm --ablations`" in report


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, config):
    people = cfsm.read_people(config.data, config.seed)
    recognizer = nn.Sequential(nn.Flatten(), nn.Linear(256, 8))
    recognizer[1].weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="identity is nan at step 0 of dark: lower lr"):
        cfsm.learn_style(config, people, recognizer, "dark", tmp_path / "dark")


def test_a_parameter_that_is_not_finite_stops_the_run(tmp_path, config, monkeypatch):
    """All losses of a step may be finite and its gradient not: the last checkpoint stays whole."""
    people = cfsm.read_people(config.data, config.seed)
    recognizer = nn.Sequential(nn.Flatten(), nn.Linear(256, 8))
    descend, steps = style.descend, []

    def poisoned(optimizer, loss):
        steps.append(loss)
        descend(optimizer, loss)
        if len(steps) == 8:  # of two networks: the last one of step 3
            optimizer.param_groups[0]["params"][0].data[0] = float("inf")

    monkeypatch.setattr(style, "descend", poisoned)
    message = r"discriminator\..* is not finite after step 3 of dark: lower lr; earlier checkpoints"
    with pytest.raises(FloatingPointError, match=message):
        cfsm.learn_style(config, people, recognizer, "dark", tmp_path / "dark")
    monkeypatch.setattr(style, "descend", descend)
    _, history = cfsm.learn_style(
        config, people, recognizer, "dark", tmp_path / "dark", resume=True
    )
    _, whole = cfsm.learn_style(config, people, recognizer, "dark", tmp_path / "whole")
    assert history == whole


@pytest.mark.slow
@pytest.mark.usefixtures("quick_workers")
def test_workers_find_what_one_process_finds(tmp_path, config):
    config = replace(
        config,
        style=replace(config.style, steps=2, seeds=2),
        guided=replace(
            config.guided, steps=2, seeds=2, other_originals=(0.75,), other_epsilons=(0.1,)
        ),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = cfsm.run(config, tmp_path / "alone")
        together = cfsm.run(config, tmp_path / "together", workers=2)
    finally:
        torch.set_num_threads(threads)
    assert weights(tmp_path / "alone") == weights(tmp_path / "together")
    assert cfsm.measured(alone) == cfsm.measured(together)
    assert len(alone.found) == 2 + 3 + 12  # recognizers, style spaces, networks of stage 2

    found = cfsm.measured(alone)
    assert found["verification"].keys() == {
        "before",
        *cfsm.VARIANTS,
        "random, 75% originals",
        "guided, 75% originals",
        "guided, ε = 0.1",
    }
    assert found["verification"]["guided, ε = 0.1"] != found["verification"]["guided"]
    auc = {name: by["dark"]["auc"]["values"] for name, by in found["verification"].items()}
    gained = found["differences"]["guided − originals"]
    each = [a - b for a, b in zip(auc["guided"], auc["originals"], strict=True)]
    assert gained["dark"]["values"] == pytest.approx(each)
    both = [(gained["dark"]["values"][i] + gained["blurred"]["values"][i]) / 2 for i in range(2)]
    assert gained["mean over the domains"]["values"] == pytest.approx(both)
    assert list(found["differences"]) == [
        "originals − before",
        "random − originals",
        "guided − originals",
        "guided − random",
        "random, 75% originals − originals",
        "guided, 75% originals − originals",
        "guided, 75% originals − random, 75% originals",
        "guided, ε = 0.1 − originals",
        "guided, ε = 0.1 − random",
    ]
    # Seeds differ, and more of them can be added to a finished run.
    (second,) = found["further seeds"]
    assert second["controllability"] != found["style"]["dark"]["controllability"]
    more = replace(config, guided=replace(config.guided, seeds=3))
    again = cfsm.run(more, tmp_path / "alone", resume=True)
    assert (
        cfsm.measured(again)["verification"]["guided"]["dark"]["auc"]["values"][:2] == auc["guided"]
    )
    # A network is tied to the style space that it was trained with.
    fewer = replace(config, style=replace(config.style, seeds=1))
    with pytest.raises(CheckpointError, match=r"another run: its config's recipe.*space"):
        cfsm.run(fewer, tmp_path / "alone", resume=True)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        cfsm.run(config, tmp_path / "none", workers=0)


LACKED = {  # by version 0.1's checkpoints
    "generator": {"noise", "blend", "light", "awake"},
    "discriminator": {"residuals"},
    "style": {"seeds", "recovery_weight", "statistics_weight"},
    "guided": {"seeds", "other_originals", "other_epsilons"},
    "data": {"identities", "channels"},
    "recipe": {"fidelity", "space"},
}


@pytest.mark.slow
def test_a_checkpoint_without_the_added_keys_goes_on(tmp_path, config, whole):
    """Version 0.1 knew none of the additions: they are off in its runs."""

    def without(value):
        if not isinstance(value, dict):
            return value
        value = {key: without(each) for key, each in value.items()}
        for table, keys in LACKED.items():
            if isinstance(value.get(table), dict):
                value[table] = {k: v for k, v in value[table].items() if k not in keys}
        return value

    earlier(whole.folder, tmp_path / "old", without)
    before = weights(tmp_path / "old")
    resumed = cfsm.run(config, tmp_path / "old", resume=True)
    assert weights(tmp_path / "old") == before
    assert cfsm.measured(resumed) == cfsm.measured(whole.results)
    extended = replace(config, generator=replace(config.generator, noise=True))
    with pytest.raises(CheckpointError, match="another run: its config's generator is"):
        cfsm.run(extended, tmp_path / "old", resume=True)


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_all_additions_and_colors(tmp_path, config):
    """Generated faces in color, with everything that is not in the paper."""
    config = replace(
        config,
        data=replace(
            config.data, faces="heads", channels=3, identities=12, target_identities=3,
            held_out_identities=4,
        ),
        generator=replace(config.generator, noise=True, blend=True, light=2, awake=0.5),
        discriminator=replace(config.discriminator, residuals=True),
        style=replace(config.style, steps=2, recovery_weight=1.0, statistics_weight=1.0),
        guided=replace(config.guided, steps=2),
    )  # fmt: skip
    state = torch.get_rng_state()
    results = cfsm.run(config, tmp_path / "run", ablations=True)
    assert torch.equal(torch.get_rng_state(), state)
    added = {key for keys in ADDITIONS.values() for key in keys}
    assert results.ablations.keys() == added - {"adversarial_weight"} | {"all"}
    assert list(results.ablations)[-1] == "all"
    assert "recovery" not in results.ablations["recovery_weight"]["log"][0]
    assert "recovery" in results.ablations["noise"]["log"][0]
    assert (tmp_path / "run" / "style" / "dark-without-all" / "metrics.jsonl").exists()
    assert results.people.channels == 3
    torch.rand(3)
    other = cfsm.measured(cfsm.run(config, tmp_path / "other"))
    assert other == cfsm.measured(results) | {"without": {}}
    row = results.style("dark")["log"][0]
    assert {"recovery", "statistics"} <= row.keys()
    page = cfsm.write(results, tmp_path / "report", "synface recipe cfsm", 3.0)
    assert len(re.findall(r"!\[.*\]\(cfsm-.*\)", page.read_text())) == 10
    assert "## What each addition gains" in page.read_text()
    again = cfsm.run(config, tmp_path / "run", resume=True, ablations=True)
    assert cfsm.measured(again) == cfsm.measured(results)


def test_people_that_do_not_fit_are_named(config):
    people = cfsm.read_people(config.data, config.seed)

    def changed(part, images):
        faces = getattr(people, part)
        count = len(images)
        return replace(people, **{part: replace(faces, images=images, labels=faces.labels[:count])})

    images = people.target.images
    with pytest.raises(
        ValueError, match=r"target .* must have images of 16×16 and 1 channel.*15×16×1"
    ):
        changed("target", images[:, :15])
    with pytest.raises(
        ValueError, match=r"held .* must have images of 16×16 and 1 .*, got 16×16×3"
    ):
        changed("held", people.held.images.expand(-1, -1, -1, 3))
    with pytest.raises(ValueError, match=r"target .* must have two images or more, .*, got 1"):
        changed("target", images[:1])


def test_target_images_that_are_all_the_same(tmp_path, config):
    people = cfsm.read_people(config.data, config.seed)
    flat = replace(people.target, images=torch.full_like(people.target.images, 90))
    config = replace(
        config, style=replace(config.style, recovery_weight=1.0, statistics_weight=1.0)
    )
    recognizer = nn.Sequential(nn.Flatten(), nn.Linear(256, 8))
    generator, history = cfsm.learn_style(
        config, replace(people, target=flat), recognizer, "as_is", tmp_path / "run"
    )
    assert len(history) == config.style.steps
    assert all(torch.isfinite(p).all() for p in generator.parameters())
