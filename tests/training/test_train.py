"""Training: reproducible, resumable bitwise, and nothing lost when something fails."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import synface.common.files
import torch
from synface import checkpoint
from synface.checkpoint import STATE, TENSORS
from synface.common.files import CheckpointError, checksum, sealed
from synface.data import Faces, embedded_faces, read_folder
from synface.evaluation.embedding import embed, pixel_embeddings
from synface.evaluation.metrics import verify
from synface.models.iresnet import ChannelsLastConv2d
from synface.training.loop import TrainConfig, learning_rate, load_backbone, train

from tests.helpers.forked import finished, forked
from tests.helpers.processes import wait_for
from tests.helpers.training import SMALL, same, state

SMALL = replace(SMALL, epochs=4)
ORL = Path(__file__).parents[2] / ".." / "shared" / "data" / "orl"


@pytest.fixture(scope="module")
def faces() -> Faces:
    return embedded_faces(images_per_identity=4, size=16, identities=6)


def assert_same(a, b):
    assert same(state(a), state(b))


def test_two_runs_are_the_same_and_leave_global_generators_alone(faces, tmp_path, monkeypatch):
    torch.manual_seed(5)
    # What torch.manual_seed does to every GPU.
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("GPUs reseeded"))
    before = torch.get_rng_state()
    first = train(SMALL, faces, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(100)
    assert_same(first, train(SMALL, faces, tmp_path / "b"))
    other = train(replace(SMALL, seed=1), faces, tmp_path / "c")
    assert not torch.equal(other.head.weight, first.head.weight)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("stop_after", [4, 8])  # between checkpoints, and at one
def test_resuming_is_bitwise_the_uninterrupted_run(faces, tmp_path, optimizer, stop_after):
    config = replace(SMALL, optimizer=optimizer)
    whole = train(config, faces, tmp_path / "whole")
    train(config, faces, tmp_path / "cut", stop_after=stop_after)
    resumed = train(config, faces, tmp_path / "cut", resume=True)
    assert_same(whole, resumed)
    assert whole.history == resumed.history
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    again = train(config, faces, tmp_path / "cut", resume=True)  # nothing left to do
    assert_same(whole, again)


def test_resuming_is_bitwise_in_channels_last_order(faces, tmp_path):
    config = replace(SMALL, epochs=2, widths=(16, 32), depths=(1, 1), embedding_size=8)
    whole = train(config, faces, tmp_path / "whole")
    assert any(isinstance(each, ChannelsLastConv2d) for each in whole.backbone.modules())
    train(config, faces, tmp_path / "cut", stop_after=1)
    resumed = train(config, faces, tmp_path / "cut", resume=True)
    assert_same(whole, resumed)
    assert whole.history == resumed.history


def test_ctrl_c_loses_nothing(faces, tmp_path):
    class Impatient:
        def start(self, total_steps: int, step: int) -> None: ...

        def step(self, loss: float, accuracy: float, images: int) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    config = replace(SMALL, checkpoint_every=100)
    with pytest.raises(KeyboardInterrupt):
        train(config, faces, tmp_path / "run", progress=Impatient())
    assert signal.getsignal(signal.SIGINT) is handler
    found = checkpoint.find(tmp_path / "run")
    assert checkpoint.load_state(found)["step"] == 1
    resumed = train(config, faces, tmp_path / "run", resume=True)
    assert_same(train(config, faces, tmp_path / "whole"), resumed)


def test_a_run_can_be_resumed_from_before_its_first_epoch_ended(faces, tmp_path):
    train(SMALL, faces, tmp_path / "run", stop_after=0)
    resumed = train(SMALL, faces, tmp_path / "run", resume=True)
    assert_same(train(SMALL, faces, tmp_path / "whole"), resumed)


def test_a_lost_log_is_named(faces, tmp_path):
    train(SMALL, faces, tmp_path / "run", stop_after=4)
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(CheckpointError, match=r"metrics.jsonl does not fit .* 0 to 2, got 2 lines"):
        train(SMALL, faces, tmp_path / "run", resume=True)


def test_the_loss_falls(faces, tmp_path):
    result = train(replace(SMALL, epochs=15), faces, tmp_path / "run")
    losses = [row["loss"] for row in result.history]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_a_trained_network_is_read_back(faces, tmp_path):
    result = train(SMALL, faces, tmp_path / "run")
    backbone, about = load_backbone(tmp_path / "run")
    assert torch.equal(embed(backbone, faces.images), embed(result.backbone, faces.images))
    assert about["step"] == 12
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2  # the newest two


def test_an_existing_run_is_not_overwritten(faces, tmp_path):
    train(SMALL, faces, tmp_path / "run", stop_after=3)
    with pytest.raises(FileExistsError, match="holds a run already: resume it"):
        train(SMALL, faces, tmp_path / "run")


def test_resuming_another_run_is_refused(faces, tmp_path):
    train(SMALL, faces, tmp_path / "run", stop_after=3)
    with pytest.raises(CheckpointError, match=r"config's lr is 0.2, expected 0.1"):
        train(replace(SMALL, lr=0.1), faces, tmp_path / "run", resume=True)
    other = embedded_faces(images_per_identity=4, size=16, identities=6, seed=1)
    with pytest.raises(CheckpointError, match="data's fingerprint"):
        train(SMALL, other, tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        train(SMALL, faces, tmp_path / "nothing", resume=True)


def test_damaged_checkpoints_are_named(faces, tmp_path):
    train(SMALL, faces, tmp_path / "run", stop_after=3)
    good = checkpoint.find(tmp_path / "run")
    tensors, about = checkpoint.load(good)

    def damaged(change):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(good, copy)
        change(copy)
        return copy

    def cut(folder):
        data = (folder / TENSORS).read_bytes()
        (folder / TENSORS).write_bytes(data[: len(data) // 2])

    def write_state(folder, **changes):
        (folder / STATE).write_text(sealed(about | changes))

    def reshape(folder):
        from safetensors.torch import save_file

        renamed = {k: v[:-1].clone() if v.dim() == 2 else v for k, v in tensors.items()}
        save_file(renamed, folder / TENSORS)
        size = (folder / TENSORS).stat().st_size
        write_state(folder, bytes={TENSORS: size}, crc32={TENSORS: checksum(folder / TENSORS)})

    def garbage(folder):
        size = (folder / TENSORS).stat().st_size
        (folder / TENSORS).write_bytes(os.urandom(size))

    for change, message in (
        (cut, r"is missing, cut short .* expected size \d+, got \d+;"),
        (reshape, "is of another model: embed.3.weight: expected shape"),
        (garbage, "safetensors is damaged: its CRC-32 is"),
        (
            lambda f: (f / TENSORS).unlink(),
            f"{TENSORS} is missing, cut short .* expected size .*, got no file",
        ),
        (lambda f: (f / STATE).unlink(), "cannot be read: No such file"),
        (lambda f: (f / STATE).write_text('{"format": 1, "st'), "is not whole JSON"),
        (lambda f: (f / STATE).write_text("[]"), "expected format 3 or .* 1, got 'list'"),
        (lambda f: (f / STATE).write_text('{"format": 9}'), "expected format 3 or .* 1, got 9"),
        (
            lambda f: write_state(f, config={"epochs": 3}),
            "unknown or missing keys",
        ),
        (
            lambda f: write_state(f, config=[1]),
            r"config must be dict, got \[1\]",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_backbone(damaged(change))


def test_a_checkpoint_that_cannot_be_written_loses_nothing(faces, tmp_path, monkeypatch):
    train(SMALL, faces, tmp_path / "run", stop_after=3)
    folder = tmp_path / "run" / "checkpoints"
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synface.common.files, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        train(SMALL, faces, tmp_path / "run", resume=True)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    monkeypatch.undo()
    assert_same(
        train(SMALL, faces, tmp_path / "run", resume=True), train(SMALL, faces, tmp_path / "w")
    )


# In processes of their own: what tests did to torch's threads may change a result's last bits.
def train_long(faces, run, fused):
    train(replace(SMALL, epochs=400, fused_update=fused), faces, run)


def resume_and_compare(faces, run, other, step, fused):
    config = replace(SMALL, epochs=400, fused_update=fused)
    resumed = train(config, faces, run, resume=True, stop_after=step)
    whole = train(config, faces, other, stop_after=step)
    assert_same(resumed, whole)
    assert resumed.history == whole.history


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
@pytest.mark.slow
def test_kill_9_leaves_a_whole_checkpoint(faces, tmp_path, fused):
    run, shown = tmp_path / "run", tmp_path / "shown"

    def written() -> bool:
        assert child.is_alive(), shown.read_text()
        return len(checkpoint.checkpoints(run / "checkpoints")) >= 2

    with forked(shown, train_long, faces, run, fused) as child:
        wait_for(written, 120)
        child.kill()
    found = checkpoint.find(run)
    _, about = checkpoint.load(found)
    last = about["step"] + 3
    code, text = finished(shown, resume_and_compare, faces, run, tmp_path / "whole", last, fused)
    assert code == 0, text


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_loss_that_is_not_finite_stops_the_run(faces, tmp_path, precision, clip_norm):
    config = replace(
        SMALL,
        optimizer="sgd",
        lr=1e30,
        warmup_epochs=0.0,
        precision=precision,
        clip_norm=clip_norm,
    )
    with pytest.raises(FloatingPointError, match="lower lr"):
        train(config, faces, tmp_path / "run")
    tensors, _ = checkpoint.load(checkpoint.find(tmp_path / "run"))
    assert all(values.isfinite().all() for values in tensors.values())


def test_schedules():
    config = TrainConfig(epochs=10, warmup_epochs=2, lr=1.0)
    rates = [learning_rate(config, step, 5) for step in range(50)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] < 0.01
    assert rates[10:] == sorted(rates[10:], reverse=True)
    steps = [learning_rate(replace(config, schedule="step"), s, 5) for s in range(50)]
    assert sorted({round(r, 6) for r in steps[10:]}) == [0.01, 0.1, 1.0]
    assert learning_rate(replace(config, schedule="constant"), 30, 5) == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"optimizer": "lion"}, "optimizer must be one of .* got 'lion'"),
        ({"m2": 28.6}, "angle in radians"),
        ({"augment": 3.0}, r"strength must lie in \[0, 2\], got 3.0"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_configurations_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


def test_one_identity_is_too_few(tmp_path):
    images = torch.zeros(4, 16, 16, 1, dtype=torch.uint8)
    one = Faces(images, torch.zeros(4, dtype=torch.int64), ["a"], "one person")
    with pytest.raises(ValueError, match="two identities or more, got 1"):
        train(SMALL, one, tmp_path / "run")


@pytest.mark.skipif(not ORL.is_dir(), reason="../shared/data/orl (the ORL faces) is not there")
@pytest.mark.slow
def test_orl_people_never_trained_on(tmp_path):
    """A short run; docs/training.md has the full one."""
    faces, held = read_folder(ORL, (28, 24)).split(10)
    result = train(replace(TrainConfig(), epochs=12), faces, tmp_path / "run")
    trained = verify(embed(result.backbone, held.images), held.labels)
    assert trained.auc > verify(pixel_embeddings(held.images), held.labels).auc


def test_a_line_that_a_crash_cut_short_is_written_again(faces, tmp_path):
    options = {"verify": lambda backbone: {"auc": 0.5}, "verify_every": 1}
    whole = train(SMALL, faces, tmp_path / "whole", **options)
    train(SMALL, faces, tmp_path / "cut", stop_after=4, **options)
    for name in ("metrics.jsonl", "verification.jsonl"):
        with (tmp_path / "cut" / name).open("a") as log:
            log.write('{"step": 5, "lo')
    assert_same(whole, train(SMALL, faces, tmp_path / "cut", resume=True, **options))
    for name in ("metrics.jsonl", "verification.jsonl"):
        logs = [(tmp_path / run / name).read_text() for run in ("whole", "cut")]
        assert logs[0] == logs[1]


def test_checkpoints_and_verification_may_come_within_an_epoch(faces, tmp_path):
    """Every third of 4 steps an epoch writes a checkpoint; the newest 2 remain."""
    config = replace(SMALL, epochs=2, checkpoint_every=0.75, batch_size=-(-len(faces) // 4))
    options = {"verify": lambda backbone: {"auc": 0.5}, "verify_every": 0.5}
    train(config, faces, tmp_path / "run", stop_after=6, **options)
    found = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    assert sorted(checkpoint.load_state(path)["step"] for path in found) == [3, 6]
    lines = (tmp_path / "run" / "verification.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6]
