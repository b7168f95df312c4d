"""Processes forked from a server that has imported what takes a new interpreter seconds.

Each is a process of its own, with its own signals, session and exit code.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import runpy
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, process, resource_tracker
from pathlib import Path
from typing import Any

IMPORTED = [
    *("pytest", "torch._dynamo", "torch.distributed.checkpoint"),
    *("synface.training.loop", "synface.cli.commands"),
]


def start_server() -> Any:
    """Start the server unless it runs, and return multiprocessing's context of it."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    forkserver.ensure_running()  # now: it would keep signals that are blocked later
    return context


@contextmanager
def forked(
    output: Path, run: Callable[..., object], *arguments: object, **environment: str
) -> Iterator[Any]:
    """Yield a process that calls ``run(*arguments)`` in a session of its own; kill what is left.

    Args:
        output: the file of all that it prints.
        run: a function of a module, such as `command`.
        environment: variables that are added to this process's.
    """
    started = start_server().Process(target=_call, args=(output, environment, run, arguments))
    started.start()
    try:
        yield started
    finally:
        with suppress(ProcessLookupError):  # nobody is left
            os.killpg(started.pid, signal.SIGKILL)
        started.kill()  # if it has no session yet
        started.join()


def finished(
    output: Path, run: Callable[..., object], *arguments: object, **environment: str
) -> tuple[int, str]:
    """Return the exit code of `forked` and what it printed, once it has ended."""
    with forked(output, run, *arguments, **environment) as process:
        process.join(300)
        return process.exitcode, output.read_text()


def numbers_of(output: Path, run: Callable[..., object], *arguments: object) -> list[float]:
    """Return the numbers that `run` prints in a process of its own, such as a peak of memory."""
    code, shown = finished(output, _without_warnings, run, *arguments)
    assert code == 0, shown
    return [float(word) for word in shown.split()]


def _without_warnings(run: Callable[..., object], *arguments: object) -> None:
    warnings.simplefilter("ignore")  # they would stand among the numbers
    run(*arguments)


def command(*words: object) -> None:
    """Run the command line, as ``python -m synface`` does."""
    sys.argv = ["synface", *map(str, words)]
    runpy.run_module("synface", run_name="__main__", alter_sys=True)


def command_without_figures(*words: object) -> None:
    """Run the command line as `command` does, and save figures as empty files."""
    from tests.helpers.figures import blank  # others need no matplotlib

    with blank():
        command(*words)


def _call(
    output: Path, environment: dict[str, str], run: Callable[..., object], arguments: tuple
) -> None:
    os.setsid()
    gc.freeze()  # as in `on_ranks`
    process._parent_process = None  # as in a process that multiprocessing has not started
    resource_tracker._resource_tracker._fd = None
    os.environ.update(environment)
    with output.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    run(*arguments)
