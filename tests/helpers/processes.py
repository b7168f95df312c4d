"""Conditions to wait for, and the states of processes, in tests that start or end some."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block has not ended after the seconds."""

    def late(*_: object) -> None:
        raise AssertionError(f"not done within {seconds} s")

    handler = signal.signal(signal.SIGALRM, late)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, outer)
        signal.signal(signal.SIGALRM, handler)


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until a condition holds; fail if it does not within the seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def is_running(pid: str) -> bool:
    """Return whether a process exists and has not ended."""
    try:  # what nobody waits for stays as a zombie
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def children() -> list[int]:
    """Return the child processes, without the helpers of multiprocessing."""
    text = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    return [
        int(pid)
        for pid in text.split()
        if not re.search("resource_tracker|forkserver", Path(f"/proc/{pid}/cmdline").read_text())
    ]
