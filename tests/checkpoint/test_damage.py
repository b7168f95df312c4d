"""Centers and checkpoints whose bytes were damaged give an error, or the same content."""

import json
import os
import random
import shutil
import signal
from unittest.mock import Mock

import pytest
import torch
from synface import checkpoint
from synface.checkpoint import STATE, TENSORS, load_model, save_model
from synface.common.files import CHECKSUM, CheckpointError
from synface.optim.centers import Centers, CentersConfig
from synface.optim.centers.checksums import row_checksums
from synface.optim.centers.files import LAST_STEP, ROWS
from torch import nn

from tests.helpers.forked import finished
from tests.helpers.fuzzed import mutated

MUTATIONS = 400
CONFIG = CentersConfig(200, 8, seed=3)


def batch(step):
    draw = torch.Generator().manual_seed(step)
    return torch.randn(16, 8, generator=draw), torch.randint(200, (16,), generator=draw)


def train(centers, until):
    while centers.step < until:
        centers.loss(*batch(centers.step), num_sampled=40).backward()
        centers.update(0.05)


def damage(folder, draw):
    """Change something in the folder, and return the file's name."""
    files = sorted(path for path in folder.iterdir() if path.stat().st_size)
    file, other = draw.choice(files), draw.choice(files)
    content = file.read_bytes()
    kind = draw.randrange(10)
    if kind == 0:
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == 1:
        file.unlink()
    elif kind == 2:  # two ranges change places
        size = draw.choice([1, 4, 16, 32, 64])
        a, b = (draw.randrange(max(1, len(content) // size)) * size for _ in range(2))
        swapped = bytearray(content)
        swapped[a : a + size], swapped[b : b + size] = (
            content[b : b + size],
            content[a : a + size],
        )
        file.write_bytes(swapped)
    elif kind == 3:
        at = draw.randrange(len(content))
        file.write_bytes(
            content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
        )
    else:
        file.write_bytes(mutated(content, draw))
    return file.name


def detected(sound, folder, read):
    """Count the mutations that are errors; assert that the others leave what is read as it was."""
    draw, problems = random.Random(0), []
    expected = read(sound, 0)
    for number in range(MUTATIONS):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(sound, folder)
        name = damage(folder, draw)
        try:
            came = read(folder, number)
        except CheckpointError as error:
            problems.append(f"{name}: {error}")
            continue
        assert came.keys() == expected.keys(), name
        for key, value in came.items():
            same = (
                torch.equal(value, expected[key])
                if torch.is_tensor(value)
                else (value == expected[key])
            )
            assert same, (number, name, key)
    assert all(str(folder) in problem for problem in problems)
    return len(problems)


def open_centers(folder, number):
    with Centers.open(folder, verify=number % 3 == 1) as centers:
        loss = centers.loss(*batch(99), num_sampled=200).detach() if number % 3 == 0 else None
        values = {"config": centers.config, "step": centers.step, "lr": centers.lr}
    with Centers.open(folder) as centers:
        values |= {"weight": centers.weight.clone(), "last_step": centers.last_step.clone()}
        values |= {name: value.clone() for name, value in centers.states.items()}
        again = centers.loss(*batch(99), num_sampled=200).detach()
    assert loss is None or torch.equal(loss, again)  # of rows compared one by one, and all at once
    return values


@pytest.mark.parametrize("log", [False, True], ids=["checkpointed", "with a log"])
def test_damaged_centers(tmp_path, log):
    with Centers.create(CONFIG, tmp_path / "sound") as centers:
        train(centers, 6)
        centers.checkpoint()
        train(centers, 9 if log else 6)
    shutil.copytree(tmp_path / "sound", tmp_path / "template")
    assert len(list((tmp_path / "template").glob("undo-*.bin"))) == log
    found = detected(
        tmp_path / "template",
        tmp_path / "copy",
        lambda path, number: open_centers(
            path if path.name == "copy" else shutil.copytree(path, tmp_path / "first"), number
        ),
    )  # opening undoes the log, so that it is done on copies
    assert found > 0.8 * MUTATIONS


def test_a_damaged_row_is_named(tmp_path):
    with Centers.create(CONFIG, tmp_path / "c") as centers:
        train(centers, 6)
        centers.checkpoint()
    file = tmp_path / "c" / ROWS
    content = bytearray(file.read_bytes())
    content[32 * 117 + 5] ^= 4
    file.write_bytes(content)
    message = rf"c/{ROWS} \(or {LAST_STEP} beside it\) is damaged: row 117 of 200"
    with pytest.raises(CheckpointError, match=message):
        Centers.open(tmp_path / "c", verify=True)
    with Centers.open(tmp_path / "c") as centers:  # which reads no row
        for look in ("weight", "states", "last_step"):
            with pytest.raises(CheckpointError, match=message):
                getattr(centers, look)
        labels = torch.tensor([3, 117])
        with pytest.raises(CheckpointError, match=message):
            centers.loss(torch.randn(2, 8), labels, num_sampled=2)
        centers.loss(torch.randn(1, 8), labels[:1], num_sampled=1).backward()
        centers.update(0.05)  # other rows go on


def test_checksums_of_rows():
    """Each bit, each swap and each number of a row counts."""
    row = torch.randn(1, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    row = row.to(torch.bfloat16)  # 24 bytes
    for width in (12, 11):  # whole words, and not
        data = row[:, :width].contiguous()
        bits = [data.view(torch.int16)[0].clone()]
        for place in range(width):
            for bit in range(16):
                changed = bits[0].clone()
                changed[place] ^= -(2**15) if bit == 15 else 1 << bit
                bits.append(changed)
                for second in range(place):  # the uppermost bits of two words, among others
                    twice = changed.clone()
                    twice[second] ^= -(2**15) if bit == 15 else 1 << bit
                    bits.append(twice)
        records = torch.stack(bits).view(torch.bfloat16)
        count = len(records)
        zero = torch.zeros(count, dtype=torch.int32)
        ids = torch.zeros(count, dtype=torch.int64).numpy()
        assert len(set(row_checksums(ids, zero, records).tolist())) == count
        same = records[:1].expand(300, -1).contiguous()
        numbers = torch.arange(300)
        assert len(set(row_checksums(numbers.numpy(), zero[:300], same).tolist())) == 300
        assert len(set(row_checksums(ids[:300], numbers.int(), same).tolist())) == 300


def test_what_is_written_by_hand_is_no_damage(tmp_path):
    values = torch.randn(200, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with Centers.create(CONFIG, tmp_path / "c") as centers:
        centers.weight.data.copy_(values)
        train(centers, 2)  # before a checkpoint, too
        centers.weight.copy_(values)
        centers.checkpoint()
    with Centers.open(tmp_path / "c", verify=True) as centers:
        assert torch.equal(centers.weight, values)
        before = centers.weight.clone()
        train(centers, 4)
    with Centers.open(tmp_path / "c", verify=True) as centers:
        assert torch.equal(centers.weight, before)


def write_and_die(folder, when):
    """Write rows by hand at the first access, or again after a checkpoint; then take a step."""
    centers = Centers.open(folder)
    if when == "again":
        assert len(centers.weight)
        centers.checkpoint()
    centers.weight.data.fill_(0.5)  # which no version counter sees
    centers.loss(torch.randn(4, 8), torch.tensor([3, 4, 5, 6]), num_sampled=10).backward()
    centers.update(0.1)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("when", ["first", "again"])
def test_rows_written_by_hand_outlive_a_kill(tmp_path, when):
    """Rows written at the first access, or by a view older than the last checkpoint, survive."""
    folder = tmp_path / "c"
    Centers.create(CONFIG, folder).close()
    code, shown = finished(tmp_path / "shown", write_and_die, folder, when)
    assert code == -signal.SIGKILL, shown
    with Centers.open(folder, verify=True) as centers:
        assert (centers.weight == 0.5).all()  # as the log says of those that then changed
        train(centers, 2)
        centers.checkpoint()
        after = centers.weight.clone()
    assert not list(folder.glob("shown-*"))
    with Centers.open(folder, verify=True) as centers:
        assert torch.equal(centers.weight, after)


def test_rows_written_by_hand_without_a_checkpoint(tmp_path):
    folder = tmp_path / "c"
    with Centers.create(CONFIG, folder) as centers:
        centers.weight[3] = 1.0
    assert [path.name for path in folder.glob("shown-*")] == ["shown-0.bin"]
    with Centers.open(folder) as centers:
        loss = centers.loss(*batch(0), num_sampled=200)
        assert loss.isfinite()
        centers.discard()
        assert (centers.weight[3] == 1.0).all()
    with Centers.open(folder) as centers:
        centers.checkpoint()  # of all rows, none of them looked at
    assert not list(folder.glob("shown-*"))
    with Centers.open(folder, verify=True) as centers:
        assert (centers.weight[3] == 1.0).all()


def test_rows_written_by_hand_outlive_a_checkpoint_that_fails(tmp_path, monkeypatch):
    folder = tmp_path / "c"
    with Centers.create(CONFIG, folder) as centers:
        train(centers, 1)
        centers.checkpoint()
    with Centers.open(folder) as centers:
        centers.weight[3] = 1.0
        with monkeypatch.context() as full:
            full.setattr(
                "synface.optim.centers.files.write_text",
                Mock(side_effect=OSError(28, "No space left")),
            )
            with pytest.raises(OSError, match="No space left"):
                centers.checkpoint()
    with Centers.open(folder, verify=True) as centers:
        assert (centers.weight[3] == 1.0).all()


def test_damage_is_found_after_rows_were_looked_at(tmp_path):
    folder = tmp_path / "c"
    with Centers.create(CONFIG, folder) as centers:
        train(centers, 2)
        centers.checkpoint()
        assert len(centers.weight) == len(centers.last_step) == 200
    assert not list(folder.glob("shown-*"))
    content = bytearray((folder / ROWS).read_bytes())
    content[32 * 117 + 5] ^= 4
    (folder / ROWS).write_bytes(content)
    with pytest.raises(CheckpointError, match="row 117 of 200"):
        Centers.open(folder, verify=True)


def test_centers_of_an_earlier_version_gain_checksums(tmp_path):
    with Centers.create(CONFIG, tmp_path / "c") as centers:
        before = centers.weight.clone()
        train(centers, 2)
    state = tmp_path / "c" / "centers.json"
    old = json.loads(state.read_text())
    old = {"format": 1} | {name: old[name] for name in ("step", "lr", "config")}
    state.write_text(json.dumps(old))
    (tmp_path / "c" / "sums-0.bin").unlink()
    with Centers.open(tmp_path / "c", verify=True) as centers:  # with the log of two steps
        assert torch.equal(centers.weight, before)
    with Centers.open(tmp_path / "c") as centers:
        train(centers, 3)
        centers.checkpoint()
        after = centers._weight.clone()
        train(centers, 5)
    assert {p.name for p in (tmp_path / "c").iterdir()} >= {"sums-1.bin", "undo-1.bin"}
    with Centers.open(tmp_path / "c", verify=True) as centers:
        assert torch.equal(centers.weight, after)


def test_a_checkpoint_of_the_same_step(tmp_path):
    """A kill after the state was written, before the earlier log was removed, loses nothing."""
    with Centers.create(CONFIG, tmp_path / "c") as centers:
        train(centers, 3)
        centers.checkpoint()
        with torch.no_grad():
            centers.loss(*batch(7), num_sampled=150)  # rows catch up, and no step is taken
        log = centers._files._log_path
        old = log.read_bytes()
        centers.checkpoint()
        after = centers._weight.clone()
    log.write_bytes(old)
    with Centers.open(tmp_path / "c", verify=True) as centers:
        assert torch.equal(centers.weight, after)


# ---- checkpoints ---------------------------------------------------------------------------------


def sound_checkpoint(folder):
    tensors = {"a.weight": torch.randn(7, 5), "b": torch.arange(3), "c": torch.tensor(2.5)}
    state = {"config": {"lr": 0.1, "wide": [1, 2]}, "data": {"images": 9}, "scaler": {}}
    return checkpoint.save(folder, 3, tensors, state)


def read_checkpoint(folder, number):
    tensors, state = checkpoint.load(folder)
    return tensors | {"state": state}


def test_damaged_checkpoints(tmp_path):
    sound = sound_checkpoint(tmp_path)
    assert detected(sound, tmp_path / "copy", read_checkpoint) > 0.8 * MUTATIONS


def test_damaged_sharded_checkpoints(tmp_path):
    model = nn.Linear(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    sound = save_model(tmp_path, 3, model, optimizer, {"config": {"lr": 0.1}})
    target = nn.Linear(6, 5)

    def read(folder, number):
        tensors, _ = checkpoint.load(folder)
        state = load_model(folder, target, torch.optim.SGD(target.parameters(), 0.1))
        assert torch.equal(tensors["model.weight"], target.weight)
        return tensors | {"state": state}

    assert detected(sound, tmp_path / "copy", read) > 0.8 * MUTATIONS


@pytest.mark.parametrize("kind", ["plain", "sharded"])
def test_checkpoints_of_an_earlier_version_load(tmp_path, kind):
    if kind == "plain":
        found = sound_checkpoint(tmp_path)
    else:
        found = save_model(tmp_path, 3, nn.Linear(6, 5), None, {})
    tensors, _ = checkpoint.load(found)
    file = found / STATE
    state = json.loads(file.read_text())
    del state[CHECKSUM], state["crc32"]
    if kind == "plain":
        earlier = {"format": 1, "tensor_bytes": state["bytes"][TENSORS]}
    else:
        earlier = {"format": "sharded-1"}
    file.write_text(json.dumps(state | earlier))
    for name, value in checkpoint.load(found)[0].items():
        assert torch.equal(value, tensors[name])
    for checked in (3, 2, "sharded-2"):
        file.write_text(json.dumps(state | earlier | {"format": checked}))
        with pytest.raises(CheckpointError, match=r"state\.json is damaged: .* it names None"):
            checkpoint.load(found)


def test_the_tensors_and_not_the_state_are_named(tmp_path):
    found = sound_checkpoint(tmp_path)
    content = bytearray((found / TENSORS).read_bytes())
    content[-1] ^= 1
    (found / TENSORS).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{TENSORS} is damaged: its CRC-32 is \w+, and was"):
        checkpoint.load(found)
