"""Ctrl-C and SIGTERM wait for the end of a step."""

import os
import signal
import subprocess
import sys
import threading

import pytest
from synface.interrupts import Terminated, interruption, interrupts

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


def test_torchrun_may_pass_on_what_a_scheduler_sent_to_all(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    now = [100.0]
    monkeypatch.setattr("synface.interrupts.time.monotonic", lambda: now[0])
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


# The command line, which gets SIGTERM once a function was called so many times.
SENT = """
import os, signal, sys
from importlib import import_module
from synface import cli
module, name, times = import_module(sys.argv[1]), sys.argv[2], [int(sys.argv[3])]
before = getattr(module, name)
def counted(*arguments, **options):
    times[0] -= 1
    if not times[0]:
        os.kill(os.getpid(), signal.SIGTERM)
    return before(*arguments, **options)
setattr(module, name, counted)
sys.argv = ["synface", *sys.argv[4:]]
cli.main()
"""


def terminated(folder, where, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", SENT, *where, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 143, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout


def test_sigterm_ends_synthesize_and_convert_as_ctrl_c_does(tmp_path):
    """What is written is whole; nothing half done is left."""
    import numpy as np

    np.save(tmp_path / "points.npy", np.eye(3, 8, dtype=np.float32))
    where = ("synface.synthesize", "_generate", "2")
    options = ("synthesize", "--packed", "points.npy", "--output", "faces", "--size", "16x16")
    options += ("--images-per-identity", "2", "--batch-size", "2")
    shown = terminated(tmp_path, where, *options)
    assert "terminated: the same command with --resume makes the rest" in shown
    done = subprocess.run(
        [sys.executable, "-m", "synface", *options, "--resume"], cwd=tmp_path, check=True
    )
    assert done.returncode == 0
    assert len(list((tmp_path / "faces").glob("*/*.png"))) == 6

    where = ("synface.data.decode", "header", "3")
    shown = terminated(tmp_path, where, "convert", "faces", "shards", "--to", "webdataset")
    assert shown.strip().endswith("terminated")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["faces", "points.npy"]
