"""Options of training: precision, parts of a batch, clipping, sampling, schedules, logs."""

import json
import math
from dataclasses import replace

import pytest
import torch
from synface.common.files import CheckpointError
from synface.data import Faces, embedded_faces
from synface.heads import MarginHead
from synface.models.iresnet import IResNet
from synface.training import model
from synface.training.loop import learning_rate, train
from synface.training.model import _fused
from torch import nn

import synface_kernels as sk
from tests.helpers.command_line import call, refused
from tests.helpers.training import SMALL, folder, largest_difference

SMALL = replace(SMALL, dropout=0.0)
SAMPLED = {"sample_rate": 0.5}


@pytest.fixture(scope="module")
def faces() -> Faces:
    return embedded_faces(images_per_identity=2, size=16, identities=12)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bfloat16"},
        {"precision": "float16"},
        {"accumulate": 3},
        {"clip_norm": 0.5},
        {"schedule": "polynomial"},
        {"freeze_statistics": True},
        SAMPLED,
        SAMPLED | {"optimizer": "adamw"},
        SAMPLED | {"precision": "float16", "accumulate": 2, "clip_norm": 1.0},
        {"fused_update": True, "precision": "float16", "clip_norm": 1.0},
        SAMPLED | {"fused_update": True, "optimizer": "adamw"},
    ],
    ids=str,
)
def test_every_option_resumes_bitwise(faces, tmp_path, options):
    config = replace(SMALL, **options)
    whole = train(config, faces, tmp_path / "whole")
    train(config, faces, tmp_path / "cut", stop_after=3)
    resumed = train(config, faces, tmp_path / "cut", resume=True)
    assert largest_difference(whole, resumed) == 0
    assert whole.history == resumed.history
    assert all(math.isfinite(row["loss"]) for row in whole.history)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("options", [{}, SAMPLED, {"fused_update": True}], ids=str)
def test_the_head_multiplies_in_the_precision(faces, tmp_path, monkeypatch, precision, options):
    """float16 embeddings are float32 for the head, whose gradient is scaled before it is cast."""
    real, seen = sk.margin_cross_entropy, set()

    def spy(embeddings, *arguments, **keywords):
        on = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        seen.add((embeddings.dtype, on))
        return real(embeddings, *arguments, **keywords)

    monkeypatch.setattr(sk, "margin_cross_entropy", spy)
    train(replace(SMALL, precision=precision, **options), faces, tmp_path, stop_after=2)
    assert (
        seen
        == {
            "float32": {(torch.float32, False)},
            "bfloat16": {(torch.bfloat16, torch.bfloat16)},
            "float16": {(torch.float32, torch.float16)},
        }[precision]
    )


def test_every_option_is_another_run(faces, tmp_path):
    base = replace(SMALL, warmup_epochs=0)
    plain = train(base, faces, tmp_path / "plain")
    for name, value in (
        ("precision", "bfloat16"),
        ("clip_norm", 0.01),
        ("sample_rate", 0.5),
        ("schedule", "polynomial"),
        ("freeze_statistics", True),
    ):
        other = train(replace(base, **{name: value}), faces, tmp_path / name)
        assert largest_difference(plain, other) > 0, name
        with pytest.raises(CheckpointError, match=rf"config's {name} is"):
            train(base, faces, tmp_path / name, resume=True)


def test_parts_of_a_batch_are_the_batch_where_statistics_are_frozen(faces, tmp_path):
    config = replace(SMALL, freeze_statistics=True, lr=0.02)
    whole = train(config, faces, tmp_path / "whole")
    parts = train(replace(config, accumulate=4), faces, tmp_path / "parts")
    assert largest_difference(whole, parts) < 1e-5
    for a, b in zip(whole.history, parts.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["accuracy"] == pytest.approx(b["accuracy"])


@pytest.mark.slow
def test_all_classes_sampled_are_all_classes(faces, tmp_path):
    """Row optimizers on rows that all take part do as torch's own on the whole matrix."""
    config = replace(SMALL, sample_rate=0.999, freeze_statistics=True, lr=0.02)
    sampled = train(config, faces, tmp_path / "sampled")
    whole = train(replace(config, sample_rate=1.0), faces, tmp_path / "whole")
    assert largest_difference(sampled, whole) < 1e-4


@pytest.mark.parametrize("options", [SAMPLED | {"optimizer": "adamw"}, {}], ids=str)
def test_centers_stepped_in_the_backward_pass_are_those_stepped_after_it(faces, tmp_path, options):
    """They are the same to the last bit where both step row by row."""
    config = replace(SMALL, **options, epochs=1, lr=0.02, warmup_epochs=0, freeze_statistics=True)
    apart = train(config, faces, tmp_path / "apart")
    fused = train(replace(config, fused_update=True), faces, tmp_path / "fused")
    assert largest_difference(apart, fused) <= (0 if options else 1e-4)
    assert apart.head.weight.grad is not None
    assert fused.head.weight.grad is None


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_parameters_stepped_in_one_pass_are_those_of_torchs_own_steps(
    faces, tmp_path, monkeypatch, optimizer
):
    config = replace(SMALL, optimizer=optimizer, lr=0.01)
    fused = train(config, faces, tmp_path / "fused")
    chosen = []
    monkeypatch.setattr(
        model, "_fused", lambda config, module: chosen.append(_fused(config, module))
    )
    apart = train(config, faces, tmp_path / "apart")
    assert chosen == [True, True]  # of the head and of the backbone
    losses = [row["loss"] for row in apart.history]
    assert [row["loss"] for row in fused.history] == pytest.approx(losses, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_only_what_torchs_fused_steps_can_do_is_left_to_them():
    network = IResNet((16, 16), 1, (4, 8), (1, 1), 8)
    assert _fused(SMALL, network)
    assert _fused(replace(SMALL, precision="float16"), network) is None
    assert _fused(SMALL, network.to(memory_format=torch.channels_last)) is None
    assert _fused(SMALL, MarginHead(8, 4).to(torch.complex64)) is None
    with torch.device("meta"):
        assert _fused(SMALL, IResNet((16, 16), 1, (4, 8), (1, 1), 8)) is None
    assert _fused(SMALL, nn.Sequential(network)) is None  # a user's


class Alternating(nn.Module):
    """A backbone with a branch that is used, and so has gradients, in every other step."""

    def __init__(self):
        super().__init__()
        self.always, self.branch = nn.Linear(16 * 16, 16), nn.Linear(16, 16)
        self.calls = 0

    def forward(self, images):
        rows = self.always(images.flatten(1))
        self.calls += self.training
        return rows if self.calls % 2 else rows + self.branch(rows)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_branch_that_is_used_from_the_second_step_on_is_trained(faces, tmp_path, optimizer):
    backbone = Alternating()
    began = backbone.branch.weight.detach().clone()
    config = replace(SMALL, optimizer=optimizer)
    result = train(config, faces, tmp_path / "run", backbone=backbone, stop_after=2)
    assert [row["step"] for row in result.history] == [0, 1, 2]
    assert all(math.isfinite(row["loss"]) for row in result.history)
    assert not torch.equal(backbone.branch.weight, began)


def test_a_backbone_that_is_frozen_at_first_is_trained_by_fused_steps(faces, tmp_path):
    result = train(replace(SMALL, optimizer="sgd", freeze=1), faces, tmp_path / "run")
    assert _fused(SMALL, result.backbone)
    apart = train(replace(SMALL, optimizer="sgd", epochs=1, freeze=1), faces, tmp_path / "frozen")
    moved = result.backbone.stem[0].weight - apart.backbone.stem[0].weight
    assert moved.abs().max() > 0
    assert all(math.isfinite(row["loss"]) for row in result.history)


def test_clipping_bounds_the_gradient(faces, tmp_path):
    free = train(replace(SMALL, clip_norm=1e9), faces, tmp_path / "free")
    norms = [row["gradient_norm"] for row in free.history]
    cut = train(replace(SMALL, clip_norm=min(norms) / 10), faces, tmp_path / "cut")
    assert cut.history[0]["gradient_norm"] == pytest.approx(norms[0], rel=1e-5)
    assert largest_difference(free, cut) > 0


def test_frozen_statistics_stay_as_they_began(faces, tmp_path):
    result = train(replace(SMALL, freeze_statistics=True), faces, tmp_path / "run")
    for name, value in result.backbone.state_dict().items():
        if name.endswith("running_mean"):
            assert not value.any(), name
        if name.endswith("running_var"):
            assert bool((value == 1).all()), name


def test_polynomial_schedule():
    config = replace(SMALL, epochs=10, schedule="polynomial", power=2.0, warmup_epochs=0, lr=1.0)
    rates = [learning_rate(config, step, 3) for step in range(30)]
    assert rates == pytest.approx([(1 - step / 30) ** 2 for step in range(30)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accumulate": 12}, r"accumulate must be in \[1, batch_size = 11\], got 12"),
        ({"accumulate": 0}, "accumulate"),
        ({"sample_rate": 0.0}, r"sample_rate must be in \(0, 1\], got 0.0"),
        ({"sample_rate": 1.5}, "sample_rate"),
        ({"precision": "int8"}, "precision must be one of .*, got 'int8'"),
        ({"clip_norm": -1.0}, "clip_norm must not be negative"),
        ({"fused_update": True, "accumulate": 2}, "accumulate must be 1, got 2"),
        ({"power": 0.0}, "power must be positive"),
    ],
)
def test_bad_options_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_verification_is_logged_and_written_again_after_a_resume(faces, tmp_path):
    seen = []

    def verify(backbone):
        assert not backbone.training
        seen.append(1)
        return {"auc": len(seen) / 10}

    train(SMALL, faces, tmp_path / "run", verify=verify, verify_every=1)
    file = tmp_path / "run" / "verification.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["step"], row["auc"]) for row in rows] == [(3, 0.1), (6, 0.2)]

    train(SMALL, faces, tmp_path / "cut", verify=verify, verify_every=1, stop_after=3)
    train(SMALL, faces, tmp_path / "cut", verify=verify, verify_every=1, resume=True)
    file = tmp_path / "cut" / "verification.jsonl"
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [3, 6]
    plain = train(SMALL, faces, tmp_path / "plain")
    checked = train(SMALL, faces, tmp_path / "same", verify=verify, verify_every=1)
    assert largest_difference(plain, checked) == 0


def test_tensorboard_has_the_figures(faces, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = {"verify": lambda backbone: {"auc": 0.5}, "verify_every": 1, "tensorboard": True}
    train(SMALL, faces, tmp_path / "run", stop_after=3, **options)
    result = train(SMALL, faces, tmp_path / "run", resume=True, **options)
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    loss = {event.step: event.value for event in events.Scalars("training/loss")}
    assert loss == {row["step"]: pytest.approx(row["loss"]) for row in result.history}
    assert {event.step for event in events.Scalars("verification/auc")} == {2, 5}


@pytest.mark.slow
@pytest.mark.usefixtures("blank_figures")
def test_a_file_of_options(faces, tmp_path):
    file, data = tmp_path / "run.toml", folder(tmp_path / "faces", 8)
    file.write_text(
        f'data = "{data}"\nholdout = 3\n'
        'epochs = 2\nlr = 0.1\nwidths = [4, 8]\ndepths = [1, 1]\nsize = "16x16"\n'
        'schedule = "polynomial"\nfreeze_statistics = true\nverify_every = 1\nbatch_size = 7\n'
    )
    call("train", "--config", file, "--epochs", 1, "--output", tmp_path / "a")
    config = json.loads((tmp_path / "a" / "config.json").read_text())["config"]
    assert (config["epochs"], config["lr"], config["widths"]) == (1, 0.1, [4, 8])
    assert (config["schedule"], config["freeze_statistics"]) == ("polynomial", True)
    assert len((tmp_path / "a" / "verification.jsonl").read_text().splitlines()) == 1

    call("train", "--config", tmp_path / "a/config.toml", "--output", tmp_path / "b")
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in "ab"]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "unknown key 'epoch'; did you mean 'epochs'?"),
        ("zzz = 3", "unknown key 'zzz'; known are"),
        ("epochs = ", "is not TOML"),
        ('epochs = "many"', "epochs"),
        ("widths = [4, 0.5]", "--widths must be integers such as 16,32,64, got '4,0.5'"),
        ("precision = 3", "precision must be one of"),
    ],
)
def test_a_bad_file_of_options_is_refused(tmp_path, text, message):
    file = tmp_path / "run.toml"
    file.write_text(text)
    shown = refused("train", "--config", file, "--output", tmp_path / "run")
    assert message in " ".join(shown.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


def test_a_missing_file_of_options_is_named(tmp_path):
    shown = refused("train", "--config", tmp_path / "none.toml")
    assert "none.toml cannot be read: No such file" in shown
