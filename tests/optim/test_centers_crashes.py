"""The last checkpoint of class centers survives kills, crashes and full disks."""

import errno
import os
import signal

import pytest
import torch
from synface.common.files import CheckpointError
from synface.optim.centers import Centers, CentersConfig, files
from synface.optim.centers.files import LAST_STEP, ROWS, STATE

from tests.helpers.forked import finished
from tests.helpers.stored_centers import SMALL, assert_same, batch, snapshot, train

# ---- kills ---------------------------------------------------------------------------------------


def take_steps(folder, until, kill, sync):
    """Print the first step, train up to another, and save what is then; or die within a write."""
    if (folder / STATE).exists():
        centers = Centers.open(folder, sync=sync)
    else:
        centers = Centers.create(CentersConfig(3000, 16, seed=3), folder, sync=sync)
    print(centers.step, flush=True)
    move, write = centers._move, files._write

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def half_a_move(class_ids, gradient, *rest):
        if gradient is not None:
            move(class_ids[:150], gradient[:150], *rest)
            die()
        move(class_ids, gradient, *rest)

    def half_a_write(descriptor, data):
        write(descriptor, memoryview(data).cast("B")[: memoryview(data).nbytes // 2])
        die()

    while centers.step < until:
        if kill and centers.step == until - 3:  # and not at a checkpoint
            if kill == "move":
                centers._move = half_a_move
            else:
                files._write = half_a_write
        train(centers, centers.step + 1, num_sampled=300)
        if centers.step % 10 == 0:
            centers.checkpoint()
    torch.save(snapshot(centers), folder.with_suffix(".pt"))


def run_child(folder, until, kill="", sync=False):
    """Return a process's first step and its exit code."""
    code, shown = finished(folder.with_suffix(".txt"), take_steps, folder, until, kill, sync)
    return int(shown.split()[0]), code  # warnings may follow


@pytest.mark.slow
def test_fifty_steps_twice_and_after_kill_9(tmp_path):
    """Equal seeds give equal bits, in a second run and after kills during writes of rows or log."""
    for name in ("once", "twice"):
        assert run_child(tmp_path / name, 50) == (0, 0)
    once = torch.load(tmp_path / "once.pt", weights_only=True)
    assert_same(once, torch.load(tmp_path / "twice.pt", weights_only=True))
    for kill, sync in (("move", False), ("write", True)):
        folder = tmp_path / kill
        assert run_child(folder, 20, kill, sync) == (0, -signal.SIGKILL)
        assert len(list(folder.glob("undo-1.bin"))) == 1
        assert run_child(folder, 50, sync=sync) == (10, 0)
        assert_same(once, torch.load(folder.with_suffix(".pt"), weights_only=True))


def test_open_goes_back_to_the_last_checkpoint(tmp_path):
    with Centers.create(SMALL, tmp_path / "c") as centers:
        train(centers, 4)
        centers.checkpoint()
        before = snapshot(centers)
        train(centers, 9)
        assert not torch.equal(centers.weight, before["weight"])
    told = []
    with Centers.open(tmp_path / "c", progress=lambda *x: told.append(x)) as centers:
        assert centers.step == 4
        assert_same(before, snapshot(centers))
        assert told[-1][0] == told[-1][1] > 0


def test_rows_that_are_logged_twice_come_back_as_the_first_says(tmp_path):
    """A loss without an update applies missed steps to rows, but takes no step."""
    with Centers.create(SMALL, tmp_path / "c") as centers:
        train(centers, 4)
        centers.checkpoint()
        before = snapshot(centers)
        with torch.no_grad():
            centers.loss(*batch(99), num_sampled=40)
            centers.loss(*batch(98), num_sampled=40)
        assert not torch.equal(centers.weight, before["weight"])
        train(centers, 8)
    with Centers.open(tmp_path / "c") as centers:
        assert_same(before, snapshot(centers))


def test_a_frame_that_is_cut_short_was_of_rows_that_did_not_change(tmp_path):
    with Centers.create(SMALL, tmp_path / "c") as centers:
        train(centers, 4)
        centers.checkpoint()
        before = snapshot(centers)
        train(centers, 5)
        after_one = centers._files._log_path.stat().st_size
        moved = snapshot(centers)
        with torch.no_grad():
            centers.loss(*batch(77), num_sampled=100)
        log = centers._files._log_path
        for name, tensor in moved.items():  # as if the kill had come before any row was moved
            target = (
                centers.last_step
                if name == "last_step"
                else (centers.weight if name == "weight" else centers.states[name])
            )
            target.copy_(tensor)
    for size in (after_one + 5, after_one + 40, log.stat().st_size - 1):
        data = log.read_bytes()
        copy = tmp_path / f"cut{size}"
        copy.mkdir()
        for file in (STATE, ROWS, LAST_STEP, "sums-1.bin"):
            (copy / file).write_bytes((tmp_path / "c" / file).read_bytes())
        (copy / log.name).write_bytes(data[:size])
        with Centers.open(copy) as centers:
            assert_same(before, snapshot(centers))
    (copy / log.name).write_bytes(b"syn")  # a header cut short: nothing was changed after it
    with Centers.open(copy) as centers:
        assert_same(before, snapshot(centers))


def test_a_log_of_the_past_is_not_replayed(tmp_path):
    """The process dies between writing the state and removing the old log."""
    with Centers.create(SMALL, tmp_path / "c") as centers:
        train(centers, 4)
        log = centers._files._log_path
        old = log.read_bytes()
        centers.checkpoint()
        before = snapshot(centers)
    log.write_bytes(old)
    with Centers.open(tmp_path / "c") as centers:
        assert_same(before, snapshot(centers))
    assert not log.exists()


def test_a_machine_that_went_down(tmp_path, monkeypatch):
    for sync in (False, True):
        with Centers.create(SMALL, tmp_path / str(sync), sync=sync) as centers:
            train(centers, 3)
    monkeypatch.setattr(files, "_boot", lambda: b"another")
    with pytest.raises(CheckpointError, match=r"machine crashed .* sync=True"):
        Centers.open(tmp_path / "False")
    with Centers.open(tmp_path / "True") as centers:
        assert centers.step == 0
        train(centers, 3)
        centers.checkpoint()
    monkeypatch.setattr(files, "_boot", lambda: b"a third")
    with Centers.open(tmp_path / "True") as centers:
        assert centers.step == 3


# ---- full disks ----------------------------------------------------------------------------------


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path):
    huge = CentersConfig(2**31 - 1, 2**20)
    with pytest.raises(
        OSError, match=r"2,147,483,647 centers take [\d.]+ GiB .* GiB are free"
    ) as e:
        Centers.create(huge, tmp_path / "deep" / "c")
    assert e.value.errno == errno.ENOSPC
    assert not (tmp_path / "deep").exists()
    with Centers.create(SMALL, tmp_path / "c") as centers:
        before = snapshot(centers)
    with pytest.raises(OSError, match="GiB are free"):
        Centers.create(huge, tmp_path / "c", overwrite=True)
    with Centers.open(tmp_path / "c") as centers:
        assert_same(before, snapshot(centers))


def test_a_log_that_cannot_be_written_changes_no_row(tmp_path, monkeypatch):
    with Centers.create(SMALL, tmp_path / "c") as centers:
        train(centers, 2)
        centers.checkpoint()
        for room in (0, 30, 400, 900):  # bytes: in the header, in a frame's head, in its records
            before = snapshot(centers)
            left, write = room, os.write

            def full(descriptor, data):
                nonlocal left
                if left == 0:
                    raise OSError(errno.ENOSPC, "No space left on device")
                wrote = write(descriptor, data[:left])  # noqa: B023
                left -= wrote
                return wrote

            with monkeypatch.context() as patched:
                patched.setattr(files.os, "write", full)
                with pytest.raises(OSError, match="No space left"):
                    centers.loss(*batch(7), num_sampled=40)
            assert_same(before, snapshot(centers))
        checkpointed = snapshot(centers)
        train(centers, 6)  # room again
    with Centers.open(tmp_path / "c") as centers:
        assert_same(checkpointed, snapshot(centers))
