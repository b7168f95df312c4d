"""Handling of Ctrl-C and SIGTERM at the end of a step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process


class Terminated(SystemExit):
    """Exception for SIGTERM; unhandled, the process exits with 143 and no traceback."""

    code = 128 + signal.SIGTERM

    def __init__(self) -> None:
        super().__init__(self.code)


def interruption(signum: int) -> BaseException:
    """Return the exception to raise after a signal has ended a loop."""
    return Terminated() if signum == signal.SIGTERM else KeyboardInterrupt()


def _terminate(*_: object) -> None:
    raise Terminated


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Make SIGTERM raise `Terminated`, as Ctrl-C raises KeyboardInterrupt, so that cleanup runs.

    Afterwards SIGTERM is ignored, and Ctrl-C ends the process at once: it is about to end, and an
    exception in Python's own cleanup would be printed, not raised.

    Only processes of commands call it; a library must not change its caller's signal handlers.
    """
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) == _terminate:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def interrupts() -> Iterator[Callable[[], int]]:
    """Defer Ctrl-C and SIGTERM to the end of a step; a second signal raises at once.

    SIGTERM is sent by SLURM, containers and `kill`. A caller's own handler for it is not replaced.

    Yields a function that returns the number of the first signal, or 0 before there is one. A
    signal that came after the last call is raised at the end, unless an error is being raised.
    Outside the main thread, which alone receives signals, the function always returns 0.
    """
    came, returned, at = 0, 0, 0.0
    # torchrun, or the parent of worker processes, repeats a SIGTERM that the scheduler has sent to
    # all processes already: one request
    repeated = "TORCHELASTIC_RUN_ID" in os.environ or parent_process() is not None
    patience = 1.0 if repeated else 0.0

    def on_signal(signum: int, _: object) -> None:
        nonlocal came, at
        if came and time.monotonic() - at >= patience:
            raise interruption(signum)
        if not came:
            came, at = signum, time.monotonic()

    def first_signal() -> int:
        nonlocal returned
        returned = came
        return returned

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    caught = [signal.SIGINT]
    if signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, _terminate):
        caught.append(signal.SIGTERM)
    before = {each: signal.signal(each, on_signal) for each in caught}
    try:
        yield first_signal
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if came != returned:
        raise interruption(came)
