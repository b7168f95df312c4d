"""Class centers in files equal those in memory to the bit; bad input is a clear error."""

import json
import os
from dataclasses import asdict, replace

import pytest
import torch
from synface.common.files import CHECKSUM, CheckpointError, sealed
from synface.optim.centers import Centers, CentersConfig, files
from synface.optim.centers.files import LAST_STEP, ROWS, STATE

import synface_kernels as sk
from tests.helpers.stored_centers import SMALL, assert_same, batch, snapshot, train

OPTIMIZERS = {
    "sgd": {},
    "sgd, no momentum": {"momentum": 0.0},
    "nesterov": {"nesterov": True, "weight_decay": 0.01},
    "adamw": {"optimizer": "adamw"},
}


# ---- what is trained -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_files_equal_memory_bitwise(tmp_path, dtype, options):
    config = replace(SMALL, dtype=dtype, **options)
    memory = Centers.create(config)
    with Centers.create(config, tmp_path / "new") as mapped:
        assert_same(snapshot(memory), snapshot(mapped))
        for until in (7, 20):  # a checkpoint on the way changes nothing
            train(memory, until)
            train(mapped, until)
            mapped.checkpoint()
        assert_same(snapshot(memory), snapshot(mapped))
    with Centers.open(tmp_path / "new") as mapped:
        assert mapped.config == config
        assert (mapped.step, mapped.lr) == (20, 0.05)
        train(memory, 30)
        train(mapped, 30)
        assert_same(snapshot(memory), snapshot(mapped))


@pytest.mark.parametrize(
    ("options", "dense"),
    [
        (
            {"momentum": 0.9, "weight_decay": 0.01},
            lambda w: torch.optim.SGD([w], 0.05, 0.9, weight_decay=0.01),
        ),
        (
            {"nesterov": True},
            lambda w: torch.optim.SGD([w], 0.05, 0.9, nesterov=True),
        ),
        (
            {"optimizer": "adamw", "weight_decay": 0.1},
            lambda w: torch.optim.AdamW([w], 0.05, weight_decay=0.1),
        ),
    ],
    ids=["sgd", "nesterov", "adamw"],
)
def test_equals_a_dense_optimizer(options, dense):
    """Sampled rows are stepped as by torch's dense optimizers on all rows."""
    centers = Centers.create(replace(SMALL, dtype="float32", **options))
    weight = torch.nn.Parameter(centers.weight.clone())
    optimizer = dense(weight)
    for step in range(12):
        embeddings, labels = batch(step)
        mine = embeddings.clone().requires_grad_()
        loss = centers.loss(mine, labels, num_sampled=40)
        class_ids, _ = centers._pending
        loss.backward()
        centers.update(0.05)

        theirs = embeddings.clone().requires_grad_()
        place = torch.searchsorted(class_ids, labels)
        expected = sk.margin_cross_entropy(theirs, weight[class_ids], place)
        optimizer.zero_grad(set_to_none=False)
        expected.backward()
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        torch.testing.assert_close(loss, expected, rtol=2e-4, atol=1e-5)
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=2e-3, atol=1e-5)
    rows = torch.arange(len(weight))
    centers._move(rows, None, centers.step, 0.05)  # all rows take the steps that they missed
    torch.testing.assert_close(centers.weight, weight.detach(), rtol=2e-3, atol=2e-5)


def test_without_catching_up_unsampled_rows_stay():
    centers = Centers.create(replace(SMALL, catch_up=False, weight_decay=0.1))
    train(centers, 5)
    before = snapshot(centers)
    embeddings, labels = batch(5)
    centers.loss(embeddings, labels, num_sampled=40).backward()
    class_ids, _ = centers._pending
    assert_same(before, snapshot(centers))
    centers.update(0.05)
    rest = torch.ones(200, dtype=torch.bool)
    rest[class_ids] = False
    assert torch.equal(centers.weight[rest], before["weight"][rest])
    assert (centers.last_step[class_ids] == 6).all()
    assert (centers.weight[class_ids] != before["weight"][class_ids]).any(1).all()


def test_every_positive_is_moved():
    centers = Centers.create(SMALL)
    for step in range(5):
        embeddings, labels = batch(step)
        centers.loss(embeddings, labels, num_sampled=1).backward()  # fewer than the positives
        centers.update(0.05)
        assert (centers.last_step[labels] == step + 1).all()


def test_loss_falls_and_embeddings_get_their_gradient():
    centers = Centers.create(SMALL)
    embeddings, labels = batch(0)
    losses = []
    for _ in range(30):
        x = embeddings.clone().requires_grad_()
        loss, stats = centers.loss(x, labels, sk.CosFace(), num_sampled=50, return_stats=True)
        loss.backward()
        assert x.grad.abs().sum() > 0
        assert stats.top1.shape == (16,)
        centers.update(0.05)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_autocast(dtype):
    """GEMMs are in its dtype, as the definition has it; a step in float32 is another one."""
    embeddings, labels = batch(0)
    stepped = []
    for on, impl in ((True, "auto"), (True, "reference"), (False, "auto")):
        centers = Centers.create(replace(SMALL, dtype=dtype))
        with torch.autocast("cpu", torch.bfloat16, enabled=on):
            loss = centers.loss(embeddings, labels, num_sampled=150, impl=impl)
        loss.backward()
        before = centers.weight.float()
        centers.update(0.05)
        stepped.append((loss.detach(), centers.weight.float() - before))
    (loss, moved), (right, wanted), (plain, _) = stepped
    torch.testing.assert_close(loss, right, rtol=1e-5, atol=1e-5)
    assert (moved - wanted).norm() <= 2**-6 * wanted.norm()
    assert (loss - plain).abs() > 1e-5 * plain


def test_several_labels_and_ignored_ones():
    centers = Centers.create(SMALL)
    embeddings, labels = batch(0)
    target = torch.stack([labels, labels.flip(0)], 1)
    target[3] = -100
    weight = torch.tensor([0.7, 0.3]).expand(16, 2)
    column = centers.loss(embeddings, target[:, :1], num_sampled=60, target_weight=None)
    plain = centers.loss(embeddings, target[:, 0], num_sampled=60)
    assert torch.equal(column, plain)
    loss = centers.loss(embeddings, target, num_sampled=60, target_weight=weight, reduction="none")
    assert loss.shape == (16,)
    assert loss[3] == 0
    assert (loss[:3] > 0).all()


def test_initial_values():
    config = CentersConfig(70_000, 64, dtype="float32", init_std=0.5, momentum=0.0)  # two chunks
    weight = Centers.create(config).weight
    assert abs(weight.mean().item()) < 1e-3
    assert weight.std().item() == pytest.approx(0.5, rel=1e-2)
    assert len(weight[:, 0].unique()) > 69_900  # each chunk has numbers of its own
    assert torch.equal(weight, Centers.create(config).weight)
    assert not torch.equal(weight, Centers.create(replace(config, seed=1)).weight)


def test_beyond_2_to_the_31(tmp_path):
    """Rows with offsets beyond 2^31 are trained in a sparse file."""
    config = CentersConfig(2**31 // 512 + 3000, 512, dtype="float32")
    folder = tmp_path / "sparse"
    folder.mkdir()
    for name, size in config.bytes.items():
        with (folder / name).open("wb") as file:
            file.truncate(size)
    state = {"format": files.EARLIER, "step": 0, "lr": 0.0, "config": asdict(config)}
    (folder / STATE).write_text(json.dumps(state))
    with Centers.open(folder) as centers:
        assert centers.weight.stride(0) * (len(centers.weight) - 1) > 2**32
        last = torch.tensor([5, 2**31 // 512 - 1, 2**31 // 512 + 1, len(centers.weight) - 1])
        values = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
        centers.weight[last] = values
        expected = Centers.create(replace(config, num_classes=4))
        expected.weight.copy_(values)
        x = torch.randn(4, 512, generator=torch.Generator().manual_seed(1))
        for _ in range(3):
            losses = (
                centers.loss(x, last, num_sampled=4),
                expected.loss(x, torch.arange(4), num_sampled=4),
            )
            assert torch.equal(*losses)
            for each, loss in zip((centers, expected), losses, strict=True):
                loss.backward()
                each.update(0.1)
        assert torch.equal(centers.weight[last], expected.weight)
        assert not torch.equal(centers.weight[last], values)
        assert centers.last_step.count_nonzero() == 4
    with Centers.open(folder) as centers:  # undone
        assert not centers.last_step.any()
        assert torch.equal(centers.weight[last], values)


# ---- bad input -----------------------------------------------------------------------------------


def test_directories(tmp_path):
    with Centers.create(SMALL, tmp_path / "c") as centers:
        with pytest.raises(BlockingIOError, match="open already"):
            Centers.open(tmp_path / "c")
        with pytest.raises(BlockingIOError, match="open already"):
            Centers.create(SMALL, tmp_path / "c", overwrite=True)
        train(centers, 2)
        centers.checkpoint()
    with pytest.raises(FileExistsError, match="holds centers"):
        Centers.create(SMALL, tmp_path / "c")
    with Centers.open(tmp_path / "c") as centers:
        assert centers.step == 2
    with Centers.create(replace(SMALL, seed=9), tmp_path / "c", overwrite=True) as centers:
        assert centers.step == 0
    (tmp_path / "c" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"other files: notes\.txt"):
        Centers.create(SMALL, tmp_path / "c", overwrite=True)
    with pytest.raises(CheckpointError, match=r"holds no centers: centers\.json is missing"):
        Centers.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        Centers.create(SMALL, tmp_path / "file")


def test_a_creation_that_fails_leaves_nothing(tmp_path):
    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Centers.create(SMALL, tmp_path / "c", progress=stop)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(("name", "change"), [(ROWS, -1), (ROWS, 1), (LAST_STEP, 4)])
def test_files_of_another_size(tmp_path, name, change):
    Centers.create(SMALL, tmp_path / "c").close()
    file = tmp_path / "c" / name
    size = file.stat().st_size
    os.truncate(file, size + change)
    with pytest.raises(
        CheckpointError, match=rf"{name} must have {size} bytes.*got {size + change} bytes"
    ):
        Centers.open(tmp_path / "c")
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{name} cannot be opened: No such file"):
        Centers.open(tmp_path / "c")
    file.mkdir()
    with pytest.raises(CheckpointError, match=f"{name} cannot be opened: Is a directory"):
        Centers.open(tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(format=3), "expected format 2 or 1, got 3"),
        (lambda s: s.pop("step"), "has no 'step'"),
        (lambda s: s.update(step=-1), "step must be at least 0"),
        (lambda s: s.update(step=True), "step must be an integer"),
        (lambda s: s.update(step=2**31), "step must be in"),
        (lambda s: s.update(lr=float("nan")), "lr must be finite"),
        (lambda s: s.update(config=[]), "config must be an object, got list"),
        (lambda s: s["config"].pop("seed"), "lacks, or should not have, seed"),
        (lambda s: s["config"].update(more=1), "lacks, or should not have, more"),
        (lambda s: s["config"].update(num_classes=10**30), "num_classes must be at most"),
        (lambda s: s["config"].update(num_classes=201), "must have 6432 bytes"),
        (lambda s: s["config"].update(embedding_size="8"), "embedding_size must be an integer"),
        (lambda s: s["config"].update(dtype="object"), "dtype must be float32 or bfloat16"),
        (lambda s: s["config"].update(dtype=["float32"]), "dtype must be float32 or bfloat16"),
        (lambda s: s["config"].update(betas=[0.9]), "betas must be a pair"),
        (lambda s: s["config"].update(betas=[0.9, 1]), "betas must be in"),
        (lambda s: s["config"].update(momentum=10**400), "is not the state of centers"),
        (lambda s: s["config"].update(catch_up=1), "catch_up must be a bool"),
        (lambda s: s["config"].update(nesterov=True, momentum=0), "nesterov needs momentum"),
    ],
)
def test_hostile_state(tmp_path, change, message):
    Centers.create(SMALL, tmp_path / "c").close()
    file = tmp_path / "c" / STATE
    state = json.loads(file.read_text())
    del state[CHECKSUM]
    change(state)
    file.write_text(sealed(state))
    with pytest.raises(CheckpointError, match=message):
        Centers.open(tmp_path / "c")


@pytest.mark.parametrize(
    "text", ["", "[" * 50_000, "7", '{"format": 1', b"\xff\xfe\x00", "9" * 60_000, " " * 70_000]
)
def test_a_state_that_is_no_json(tmp_path, text):
    Centers.create(SMALL, tmp_path / "c").close()
    file = tmp_path / "c" / STATE
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=STATE):
        Centers.open(tmp_path / "c")


@pytest.mark.parametrize("at", [2, 9, 17, "frame", "count", "ids"])
def test_a_damaged_log(tmp_path, at):
    with Centers.create(SMALL, tmp_path / "c") as centers:
        train(centers, 2)
        log = centers._files._log_path
    header = files.CentersFiles.HEADER.size
    place = {"frame": header, "count": header + 7, "ids": header + 20}.get(at, at)
    data = bytearray(log.read_bytes())
    data[place] ^= 0x40
    log.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is not the log of|is damaged at byte"):
        Centers.open(tmp_path / "c")
    assert log.exists()


def test_steps_out_of_turn(tmp_path):
    centers = Centers.create(SMALL)
    embeddings, labels = batch(0)
    with pytest.raises(RuntimeError, match="update needs a gradient"):
        centers.update(0.1)
    loss = centers.loss(embeddings, labels, num_sampled=40)
    with pytest.raises(RuntimeError, match="update needs a gradient"):
        centers.update(0.1)
    loss.backward()
    with pytest.raises(RuntimeError, match="a gradient awaits"):
        centers.loss(embeddings, labels, num_sampled=40)
    with pytest.raises(ValueError, match="lr must be finite"):
        centers.update(float("nan"))
    centers.discard()
    assert centers.step == 0
    with pytest.raises(ValueError, match="in memory have no checkpoint"):
        centers.checkpoint()
    centers.close()
    with pytest.raises(ValueError, match="are closed"):
        centers.loss(embeddings, labels, num_sampled=40)


def test_bad_batches_change_nothing(tmp_path):
    with Centers.create(SMALL, tmp_path / "c") as centers:
        train(centers, 2)
        embeddings, labels = batch(2)
        before = snapshot(centers)
        with pytest.raises(ValueError, match="target must be in"):
            centers.loss(embeddings, labels + 200, num_sampled=40)
        with pytest.raises(ValueError, match="num_sampled must be in"):
            centers.loss(embeddings, labels, num_sampled=201)
        assert_same(before, snapshot(centers))
        embeddings[3, 2] = torch.nan
        loss = centers.loss(embeddings, labels, num_sampled=40, reduction="none")
        caught_up = snapshot(centers)
        assert loss.isnan().tolist() == [i == 3 for i in range(16)]
        loss.mean().backward()
        with pytest.raises(FloatingPointError, match="not finite at step 3: no row was changed"):
            centers.update(0.05)
        assert_same(caught_up, snapshot(centers))
        assert centers.step == 2
        centers.discard()
        train(centers, 4)
        assert centers.weight.isfinite().all()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1"),
        ({"num_classes": 2**31}, ValueError, "num_classes must be at most"),
        ({"num_classes": 1.5}, TypeError, "num_classes must be an integer"),
        ({"embedding_size": 0}, ValueError, "embedding_size must be at least 1"),
        ({"dtype": "float16"}, ValueError, "dtype must be float32 or bfloat16, got 'float16'"),
        ({"optimizer": "adam"}, ValueError, "optimizer must be sgd or adamw"),
        ({"momentum": -0.1}, ValueError, "momentum must be finite and ≥ 0"),
        ({"betas": 0.9}, TypeError, "betas must be a pair"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"init_std": "1"}, TypeError, "init_std must be a number"),
    ],
)
def test_configurations(options, error, message):
    with pytest.raises(error, match=message):
        CentersConfig(**{"num_classes": 10, "embedding_size": 4, **options})
