"""Runs resume after they or their images moved, for more epochs, and initialize other runs."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from synface import checkpoint
from synface.common.files import CheckpointError
from synface.data import embedded_faces
from synface.heads import MarginHead
from synface.training import model as runs
from synface.training.loop import FacesSource, learning_rate, load_backbone, train

from tests.helpers.command_line import call, refused
from tests.helpers.ranks import on_ranks
from tests.helpers.training import SMALL, TINY, folder, same, score, state

pytestmark = pytest.mark.usefixtures("blank_figures")


def people(identities=6, **options):
    return embedded_faces(images_per_identity=4, size=16, identities=identities, **options)


def test_restoring_a_finished_run_touches_no_file(tmp_path):
    """Several processes may then restore one at a time, as the workers of a recipe do."""
    run = tmp_path / "run"

    def verify(network):
        return {"auc": 0.5}

    def files():
        stats = {each: each.stat() for each in run.rglob("*")}
        return {each: (now.st_ino, now.st_mtime_ns) for each, now in stats.items()}

    trained = train(SMALL, people(), run, verify=verify, best="auc")
    before = files()
    assert run / "verification.jsonl" in before
    restored = train(SMALL, people(), run, verify=verify, best="auc", resume=True)
    assert restored.history == trained.history
    assert files() == before


# -- another folder ------------------------------------------------------------------------------

TINY = [*TINY, "--widths", "4,8", "--depths", "1,1"]


@pytest.fixture
def there(tmp_path, monkeypatch):
    """Make a folder to work in, with images in "faces", and another one."""
    (tmp_path / "elsewhere").mkdir()
    folder(tmp_path / "here" / "faces")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.mark.parametrize("memory", ["1024", "0"], ids=["in memory", "streamed"])
@pytest.mark.slow
def test_a_run_goes_on_from_another_folder_and_with_images_that_moved(there, monkeypatch, memory):
    options = ["--data", "faces", "--holdout", "2", "--memory", memory, "--workers", "1"]
    found = score(call("train", *options, *TINY, "--output", "run"))
    run, moved = there / "here" / "run", there / "elsewhere" / "images"
    log = (run / "metrics.jsonl").read_text()
    monkeypatch.chdir(there / "elsewhere")
    for command in (["train", "--resume", run], ["eval", run]):
        assert score(call(*command)) == found

    (there / "here" / "faces").rename(moved)
    missing = r"its images \(--data\) are no longer at .*here/faces: give their path with --data"
    for command in (["train", "--resume", run], ["eval", run]):
        assert re.search(missing, refused(*command))
    shown = call("eval", run, "--data", "images")  # known by their fingerprint
    assert score(shown) == found
    assert "2 people never trained on" in shown
    assert "5 people (20 images)" in call("eval", run, "--data", "images", "--holdout", "0")
    other = folder(there / "other", seed=1)
    Image.new("L", (18, 20)).save(other / "p0" / "0.png")  # of another size in bytes
    shown = refused("train", "--resume", run, "--data", other)
    assert re.search("data's fingerprint is not that of .*other; give", shown)
    assert "5 people (20 images)" in call("eval", run, "--data", other)

    assert score(call("train", "--resume", run, "--data", "images")) == found
    assert json.loads((run / "config.json").read_text())["command"]["data"] == str(moved)
    assert score(call("eval", run)) == found
    assert (run / "metrics.jsonl").read_text() == log


@pytest.mark.slow
def test_both_domains_may_have_moved(there, monkeypatch):
    folder(there / "here" / "real", seed=2)
    options = ["--synthetic", "faces", "--real", "real", "--holdout", "2", "--workers", "1"]
    found = score(call("train", *options, *TINY, "--output", "run"))
    (there / "here").rename(there / "there")
    monkeypatch.chdir(there)
    shown = refused("train", "--resume", "there/run", "--real", "there/real")
    assert re.search(r"\(--synthetic\) are no longer at .*: give their path", shown)
    shown = refused("train", "--resume", "there/run", "--data", "there/real")
    assert re.search("--data .* differs from the run's None", shown)
    assert score(call("eval", "there/run", "--data", "there/real")) == found
    paths = ["--synthetic", "there/faces", "--real", "there/real"]
    assert score(call("train", "--resume", "there/run", *paths)) == found
    assert score(call("eval", "there/run")) == found


@pytest.mark.slow
def test_a_run_of_an_earlier_version_is_where_it_was(there, monkeypatch):
    """Earlier versions stored paths relative to the directory of the command."""
    call("train", "--data", "faces", "--holdout", "2", *TINY, "--output", "run")
    file = there / "here" / "run" / "config.json"
    started = json.loads(file.read_text())
    assert started["command"]["data"] == str(there / "here" / "faces")
    started["command"]["data"] = "faces"
    del started["command"]["init"]
    file.write_text(json.dumps(started))
    call("eval", "run")
    monkeypatch.chdir(there)
    shown = refused("train", "--resume", "here/run")
    assert re.search("no longer at .*/faces: give their path with --data", shown)
    call("train", "--resume", "here/run", "--data", "here/faces")
    call("eval", "here/run")


# -- more epochs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_a_finished_run_is_prolonged(tmp_path, schedule):
    short = replace(SMALL, schedule=schedule, warmup_epochs=1.0)
    long = replace(short, epochs=4)
    train(short, people(), tmp_path / "run")
    with pytest.raises(CheckpointError, match="config's epochs is 2, expected 4"):
        train(long, people(), tmp_path / "run", resume=True)
    shutil.copytree(tmp_path / "run", tmp_path / "cut")
    prolonged = train(long, people(), tmp_path / "run", resume=True, prolong=True)
    rates = [learning_rate(short, step, 3) for step in range(6)]
    rates += [learning_rate(long, step, 3) for step in range(6, 12)]
    assert [row["lr"] for row in prolonged.history] == rates
    if schedule == "constant":  # as if it had been so long from the start
        whole = train(long, people(), tmp_path / "whole")
        assert same(state(whole), state(prolonged))
    # before its first own checkpoint, and after
    for last in (6, 9):
        train(long, people(), tmp_path / "cut", resume=True, prolong=True, stop_after=last)
    resumed = train(long, people(), tmp_path / "cut", resume=True)
    assert same(state(resumed), state(prolonged))
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["config"]["epochs"] == 4
    with pytest.raises(CheckpointError, match="config's epochs is 4, expected 2"):
        train(short, people(), tmp_path / "cut", resume=True, prolong=True)


@pytest.mark.slow
def test_the_command_line_prolongs(there):
    call("train", "--data", "faces", "--holdout", "2", *TINY, "--output", "run")
    options = ["--epochs", "3", "--lr", "0.5"]
    assert "--lr 0.5 differs" in refused("train", "--resume", "run", *options)
    call("train", "--resume", "run", "--epochs", "3")
    assert len((there / "here/run/metrics.jsonl").read_text().splitlines()) == 3 * 2
    call("train", "--resume", "run")
    shown = refused("train", "--resume", "run", "--epochs", "2")
    assert re.search("--epochs 2 differs from the run's 3: .* more epochs", shown)


# -- the start of another run --------------------------------------------------------------------


def first(folder) -> dict[str, torch.Tensor]:
    """Return the model in the checkpoint that a run begins with."""
    tensors, _ = checkpoint.load(folder / "checkpoints" / "step-00000000")
    return {k: v for k, v in tensors.items() if k.startswith("model.")}


def test_a_run_begins_with_another(tmp_path):
    before = train(SMALL, people(), tmp_path / "a")
    trained = {f"model.{k}": v for k, v in state(before).items()}
    config = replace(SMALL, lr=0.01, seed=5)
    again = train(config, people(seed=1), tmp_path / "b", init=tmp_path / "a", stop_after=1)
    assert same(first(tmp_path / "b"), trained)
    assert again.init.startswith("starts from the backbone and the 6 class centers of")
    command = json.loads((tmp_path / "b" / "config.json").read_text())["command"]
    assert command == {"init": str(tmp_path / "a")}

    more = train(config, people(7), tmp_path / "c", init=tmp_path / "a", stop_after=1)
    assert "the head is new: that run has 6 identities, these data 7" in more.init
    found = first(tmp_path / "c")
    centers = found.pop("model.head.weight")
    assert same(found, {k: v for k, v in trained.items() if "backbone" in k})
    train(config, people(7), tmp_path / "plain", stop_after=1)
    assert torch.equal(centers, first(tmp_path / "plain")["model.head.weight"])

    shutil.rmtree(tmp_path / "a")  # what began with it needs it no more
    train(config, people(7), tmp_path / "c", resume=True)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        train(config, people(), tmp_path / "d", init=tmp_path / "a")
    with pytest.raises(ValueError, match="give either init"):
        train(config, people(7), tmp_path / "c", resume=True, init=tmp_path / "b")


@pytest.mark.parametrize(
    "change", [{"widths": (4, 16)}, {"depths": (1, 2)}, {"embedding_size": 8}], ids=str
)
def test_another_network_is_refused_before_the_run_begins(tmp_path, change):
    train(SMALL, people(), tmp_path / "a", stop_after=0)
    with pytest.raises(CheckpointError, match=r"of another model.* needs its widths, depths"):
        train(replace(SMALL, **change), people(), tmp_path / "b", init=tmp_path / "a")
    assert not (tmp_path / "b").exists()


class Begun:
    """Begin a run with another on each rank; return the head's rows and how many were read."""

    def __init__(self, init, output):
        self.init, self.output = init, output

    def __call__(self, rank, ranks):
        config = replace(SMALL, batch_size=12, lr=1e-30, weight_decay=0.0)
        options = {"init": self.init, "stop_after": 0}
        seen, before = [], runs.read

        def read(*arguments):
            found, tensors, about = before(*arguments)
            assert not [name for name in tensors if name.startswith("optimizer")]
            seen.append(len(tensors[runs.CENTERS]))
            return found, tensors, about

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(runs, "read", read)
            trained = train(config, people(), self.output, **options)
        return trained.head.weight.detach(), seen


@pytest.mark.slow
def test_ranks_begin_with_a_run_of_one_process_and_the_reverse(tmp_path):
    before = train(SMALL, people(), tmp_path / "a")
    for init, output in (("a", "b"), ("b", "d")):  # of one process, and of several
        begun = on_ranks(2, Begun(tmp_path / init, tmp_path / output), tmp_path / f"to {output}")
        assert [seen for _, seen in begun] == [[3], [3]]  # nobody read what is another's
        assert torch.equal(torch.cat([rows for rows, _ in begun]), before.head.weight)
    train(SMALL, people(), tmp_path / "c", init=tmp_path / "b", stop_after=0)
    assert torch.equal(first(tmp_path / "c")["model.head.weight"], before.head.weight)


class Damaged:
    """Return, on each rank, what is said of a damaged run to begin with."""

    def __init__(self, init, output):
        self.init, self.output = init, output

    def __call__(self, rank, ranks):
        with pytest.raises(CheckpointError, match=r"rank 0: .* is damaged: its CRC-32") as error:
            train(replace(SMALL, batch_size=12), people(), self.output, init=self.init)
        return str(error.value)


def test_all_ranks_hear_of_damage_that_one_of_them_looks_for(tmp_path):
    train(SMALL, people(), tmp_path / "a", stop_after=0)
    file = checkpoint.find(tmp_path / "a") / checkpoint.TENSORS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    said = on_ranks(2, Damaged(tmp_path / "a", tmp_path / "b"), tmp_path / "ranks")
    assert said[0] == said[1]


class OnDevice:
    """Return what a rank's centers on a device are held against."""

    def __init__(self, device):
        self.device = device

    def __call__(self, rank, ranks):
        asked = []
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(runs, "check_memory", lambda what, needed: asked.append(needed))
            source = FacesSource(people())
            model = runs.build_model(SMALL, source, False, torch.device(self.device))
        assert model.head.weight.device.type == self.device
        return asked


def test_centers_that_are_not_made_on_the_cpu_need_none_of_its_memory(tmp_path):
    assert on_ranks(2, OnDevice("cpu"), tmp_path / "cpu") == [[4 * 16 * 3]] * 2
    assert on_ranks(2, OnDevice("meta"), tmp_path / "meta") == [[], []]


@pytest.mark.parametrize("content", ["{", "[]", '{"config": {}}', "\udcff"])
def test_how_a_run_was_started_is_not_overwritten_where_it_is_damaged(tmp_path, content):
    train(SMALL, people(), tmp_path, command={"holdout": 2}, stop_after=0)
    file = tmp_path / "config.json"
    whole, bad = file.read_bytes(), content.encode("utf-8", "surrogateescape")
    file.write_bytes(bad)
    for command in (None, {"holdout": 3}):
        with pytest.raises(CheckpointError, match=r"config\.json .*; restore a copy, or move it"):
            train(SMALL, people(), tmp_path, resume=True, command=command)
        assert file.read_bytes() == bad
    file.unlink()
    train(SMALL, people(), tmp_path, resume=True, command={"holdout": 2}, stop_after=1)
    assert file.read_bytes() == whole


@pytest.mark.slow
def test_the_command_line_begins_with_a_run(there):
    call("train", "--data", "faces", "--holdout", "2", *TINY, "--output", "a")
    shown = call("train", "--data", "faces", "--holdout", "2", *TINY, "--init", "a",
                    "--output", "b")  # fmt: skip
    assert "the run starts from the backbone and the 3 class centers of" in shown
    backbone, _ = load_backbone(there / "here" / "a")
    values = first(there / "here" / "b")
    assert torch.equal(values["model.backbone.stem.0.weight"], backbone.stem[0].weight)
    call("train", "--resume", "b", "--init", "a")
    shown = refused("train", "--resume", "b", "--init", "b")
    assert re.search("--init .* differs from the run's", shown)
    file = there / "here" / "faces" / "p0" / "0.png"
    file.write_bytes(b"no image")  # never read
    shown = refused("train", "--data", "faces", "--init", "a", "--output", "c")
    assert "of another model" in shown


def test_a_head_of_other_centers_is_damage(tmp_path):
    train(SMALL, people(), tmp_path / "a", stop_after=0)
    found = checkpoint.find(tmp_path / "a")
    tensors, about = checkpoint.load(found)
    tensors["model.head.weight"] = MarginHead(8, 6).weight.detach()
    checkpoint.save(found.parent, 9, tensors, {k: about[k] for k in ("config", "data", "scaler")})
    with pytest.raises(CheckpointError, match=r"must be of shape \(C, 16\), got \(6, 8\)"):
        train(SMALL, people(), tmp_path / "b", init=tmp_path / "a")
