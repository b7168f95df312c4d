"""Child processes of measurements on the CPU, so that none affects the others.

This module does not import the library, which may not be built yet.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ROUNDS = 7
# How long a process may exceed its own limit, to start and to stop, before it is killed.
GRACE_SECONDS = 15


# The file in which a child names the peer whose step begins, beside its result; empty at the end.
RUNNING = "running"
# A child's limit before its first step, to import torch and make the inputs, and after the last.
START_SECONDS = 120.0
POLL_SECONDS = 0.1


def run_child(
    arguments: list[str], seconds: float = float("inf"), step_seconds: float = float("inf")
) -> dict[str, Any]:
    """Run ``python -m arguments --output FILE`` and return the JSON that it wrote.

    Args:
        seconds: the time limit of the process.
        step_seconds: that of each step which it announces, see `RUNNING`; the first one must begin
            within `START_SECONDS`. A step that holds on inside a C++ call is ended too.

    Returns:
        The JSON. Where the process failed or was ended before it wrote that, or while a peer was
        running, also ``problem``, and ``running``, the peer that it had announced, if any.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, running = Path(folder) / "result.json", Path(folder) / RUNNING
        started = time.time()

        def peer() -> str:
            return running.read_text() if running.exists() else ""

        def overdue() -> str | None:
            limit = step_seconds if peer() else START_SECONDS
            began = running.stat().st_mtime if running.exists() else started
            what = "a step" if peer() else "starting or stopping"
            return None if time.time() - began < limit else f"{what} took more than {limit:.3g} s"

        command = [sys.executable, "-m", *arguments, "--output", str(output)]
        watch = overdue if step_seconds < float("inf") else None
        ended = run_limited(command, seconds, watch, stdout=sys.stderr)
        result = json.loads(output.read_text()) if output.exists() else None
        if peer() and ended is not None:
            return {**(result or {}), "problem": ended, "running": peer()}
        if result is not None:  # complete, also of a process that failed at its exit
            return dict(result)
        if ended is None:
            return {"not_measured": "the process wrote no result"}
        return {"not_measured": ended, "problem": ended}


def run_limited(
    command: list[str],
    seconds: float,
    watch: Callable[[], str | None] | None = None,
    **options: Any,
) -> str | None:
    """Run a command in a session of its own; return None, or how it failed.

    What the command started and left running is killed with it.

    Args:
        command: the program and its arguments.
        seconds: the time limit.
        watch: is called several times a second; the process is ended once it returns a reason.
        options: those of `subprocess.Popen`.
    """
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **options)
    end = time.monotonic() + seconds
    try:
        while True:
            left = max(0.0, end - time.monotonic())
            poll = left if watch is None else min(left, POLL_SECONDS)
            try:
                code = process.wait(None if poll == float("inf") else poll)
                return None if code == 0 else f"the process ended with status {code}"
            except subprocess.TimeoutExpired:
                if time.monotonic() >= end:
                    return f"the process was ended after {seconds:.0f} s"
                reason = None if watch is None else watch()
                if reason is not None:
                    return f"{reason}, and the process was ended"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Write a file atomically, so that a killed process leaves a complete one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    part.replace(path)


def partial(path: Path) -> Path:
    """Return the file that holds the results of a run until it ends and they replace ``path``."""
    return path.with_name(f"{path.name}.partial")


def check_output(path: Path) -> None:
    """Create a result file's folder; raise ValueError if the file cannot be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--output: the folder {path.parent} cannot be created: {error.strerror}"
        ) from None
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise ValueError(f"--output must be a file in a folder that can be written to, got {path}")


def command_line(module: str) -> str:
    """Return the command of this process as results name it, without the path of its output."""
    words = [word for word in sys.argv[1:] if not word.startswith("--output=")]
    while "--output" in words:
        place = words.index("--output")
        del words[place : place + 2]
    return shlex.join(["python", "-m", module, *words])


def slug(name: str) -> str:
    """Return a file name for the results of a machine or device."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
