"""Ctrl-C and SIGTERM wait for the end of a step."""

import atexit
import os
import signal
import subprocess
import sys
import threading
from importlib import import_module
from itertools import count

import pytest
import torch
from synface.common.interrupts import Terminated, interruption, interrupts
from synface.recipes.workers import run_named

from tests.helpers.command_line import call
from tests.helpers.forked import command, finished
from tests.helpers.ranks import on_ranks

ENDS = [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]


def press(signum=signal.SIGINT):
    os.kill(os.getpid(), signum)


@pytest.mark.parametrize(("sent", "error"), ENDS, ids=["Ctrl-C", "SIGTERM"])
def test_the_first_one_is_told_and_the_second_one_raises(sent, error):
    before = [signal.getsignal(each) for each, _ in ENDS]
    with interrupts() as pressed:
        assert not pressed()
        press(sent)
        assert pressed() == sent
        with pytest.raises(error):
            press(sent)
        assert isinstance(interruption(pressed()), error)
    assert [signal.getsignal(each) for each, _ in ENDS] == before
    assert Terminated().code == 143


def test_a_handler_of_the_caller_stays():
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append("theirs"))
    try:
        with interrupts() as pressed:
            press(signal.SIGTERM)
            assert not pressed()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == ["theirs"]


@pytest.mark.parametrize(("sent", "error"), ENDS, ids=["Ctrl-C", "SIGTERM"])
def test_one_that_nobody_was_told_of_is_raised_at_the_end(sent, error):
    before = [signal.getsignal(each) for each, _ in ENDS]

    def ends(own_error=None):
        with interrupts() as pressed:
            assert not pressed()
            press(sent)
            if own_error is not None:
                raise own_error

    with pytest.raises(error):
        ends()
    assert [signal.getsignal(each) for each, _ in ENDS] == before
    with pytest.raises(ValueError, match="theirs"):
        ends(ValueError("theirs"))


def test_a_training_that_is_told_while_it_writes_its_last_checkpoint(tmp_path, monkeypatch):
    """The checkpoint is complete, and the training ends after it."""
    from synface import checkpoint
    from synface.data import embedded_faces
    from synface.training.loop import TrainConfig, train

    faces = embedded_faces(3, 16, identities=6)
    config = TrainConfig(1, 6, widths=(4, 8), depths=(1, 1), embedding_size=16)
    before = checkpoint.save_model

    def save(folder, step, *rest):
        if step == 3:
            press(signal.SIGTERM)
        return before(folder, step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save_model", save)
        with pytest.raises(Terminated):
            train(config, faces, tmp_path)
    assert len(train(config, faces, tmp_path, resume=True).history) == 3


class ToldAtLast:
    """A training ends on each rank, whichever of them gets the signal in its last save."""

    def __init__(self, output):
        self.output = output

    def __call__(self, rank, ranks):
        from synface import checkpoint
        from synface.data import embedded_faces
        from synface.training.loop import TrainConfig, train

        faces = embedded_faces(3, 16, identities=6)
        config = TrainConfig(1, 6, widths=(4, 8), depths=(1, 1), embedding_size=16)
        before = checkpoint.save_model

        def save(folder, step, *rest):
            if rank == 1 and step == 3:
                press(signal.SIGTERM)
            return before(folder, step, *rest)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(checkpoint, "save_model", save)
            with pytest.raises(Terminated):
                train(config, faces, self.output)
        return len(train(config, faces, self.output, resume=True).history)


def test_all_ranks_end_where_one_is_told_in_its_last_checkpoint(tmp_path):
    assert on_ranks(2, ToldAtLast(tmp_path / "run"), tmp_path / "ranks") == [3, 3]


def test_a_packing_that_is_told_while_it_writes_its_last_checkpoint(tmp_path, monkeypatch):
    """The packing of further objectives does not begin."""
    from synface.synthesis.packing import PackConfig, Packer, packer

    config = PackConfig(12, 3, steps=4, restarts=1)
    before = packer.checkpoint.save

    def save(*arguments):
        press(signal.SIGTERM)
        return before(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(packer.checkpoint, "save", save)
        with pytest.raises(Terminated):
            Packer(config).run(tmp_path)
    resumed = Packer(config).run(tmp_path, resume=True)
    assert torch.equal(resumed.points, Packer(config).run().points)


def test_torchrun_may_pass_on_what_a_scheduler_sent_to_all(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    now = [100.0]
    monkeypatch.setattr("synface.common.interrupts.time.monotonic", lambda: now[0])
    with interrupts() as pressed:
        for seconds in (0, 0.5):
            now[0] = 100.0 + seconds
            press(signal.SIGTERM)
            assert pressed() == signal.SIGTERM
        now[0] = 101.0
        with pytest.raises(Terminated):
            press(signal.SIGTERM)


def test_another_thread_is_never_told():
    before, told = signal.getsignal(signal.SIGINT), []

    def look():
        with interrupts() as pressed:
            told.extend([pressed(), signal.getsignal(signal.SIGINT) is before])

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert told == [False, True]


def get_sigterm(folder, module, name, times, *words):
    """Run the command line, which gets SIGTERM once a function was called so many times."""
    os.chdir(folder)
    module = import_module(module)
    before, calls = getattr(module, name), count(1)

    def counted(*arguments, **options):
        if next(calls) == times:
            press(signal.SIGTERM)
        return before(*arguments, **options)

    setattr(module, name, counted)
    command(*words)


def terminated(folder, where, *words):
    code, shown = finished(folder.with_suffix(".txt"), get_sigterm, folder, *where, *words)
    assert code == 143, shown
    assert "Traceback" not in shown
    return shown


@pytest.mark.slow
def test_sigterm_ends_synthesize_and_convert_as_ctrl_c_does(tmp_path, monkeypatch):
    """Files written before a signal are whole, and nothing half done is left."""
    import numpy as np

    np.save(tmp_path / "points.npy", np.eye(3, 8, dtype=np.float32))
    where = ("synface.synthesis.dataset", "_generate", 2)
    options = ("synthesize", "--packed", "points.npy", "--output", "faces", "--size", "16x16")
    options += ("--images-per-identity", "2", "--batch-size", "2")
    shown = terminated(tmp_path, where, *options)
    assert "terminated: run the same command with --resume to continue" in shown
    monkeypatch.chdir(tmp_path)
    call(*options, "--resume")
    assert len(list((tmp_path / "faces").glob("*/*.png"))) == 6

    where = ("synface.data.formats.decode", "header", 3)
    shown = terminated(tmp_path, where, "convert", "faces", "shards", "--to", "webdataset")
    assert shown.strip().endswith("terminated")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces", "points.npy"]


# The command line, or a worker, which gets a signal in Python's own cleanup at the end.
LATE = """
import atexit, os, signal, sys
from synface import cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored: nohup, a shell's "&"
atexit.register(os.kill, os.getpid(), int(sys.argv[1]))
sys.argv = ["synface", *sys.argv[2:]]
cli.main()
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 0)])
def test_a_signal_at_the_end_of_a_command_prints_nothing(sent, code):
    command = [sys.executable, "-c", LATE, str(int(sent)), "pack", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")
    assert "Usage" in done.stdout


def prepare_a_late_sigterm(steps):
    atexit.register(signal.raise_signal, signal.SIGTERM)
    return str.upper


@pytest.mark.slow
def test_a_signal_at_the_end_of_a_worker_prints_nothing(capfd):
    found = run_named(["a", "b"], prepare_a_late_sigterm, 2, 1, lambda *_: None)
    assert found == {"a": "A", "b": "B"}
    assert capfd.readouterr().err == ""
