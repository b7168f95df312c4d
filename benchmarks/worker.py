"""A process that measures one thing after another, and is replaced when one hangs or crashes.

Starting Python, torch and a GPU takes seconds, so a process is kept from case to case; each result
is in a file as soon as it is known, so that an ended process leaves what it had.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .process import GRACE_SECONDS, ROOT, write_json

DONE = b"done\n"


class Worker:
    """A process that runs tasks of `TASKS`; use it in a ``with`` block.

    Args:
        device: the device that it measures, ``"cuda"`` or ``"cpu"``.
        environment: variables to set in the process.
    """

    def __init__(self, device: str, environment: Mapping[str, str] | None = None) -> None:
        self.device = device
        self.environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def run(self, task: str, seconds: float, **arguments: Any) -> dict[str, Any]:
        """Run a task; return its result, with ``problem`` where the process had to be ended.

        Args:
            task: a name of `TASKS`.
            seconds: its time limit, which it keeps itself; it is ended some seconds later.
            arguments: the task's own, JSON values.
        """
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "result.json"
            request = {"task": task, "seconds": seconds, "output": str(output), **arguments}
            problem = self._ask(request, seconds + GRACE_SECONDS)
            if output.exists():
                result = json.loads(output.read_text())
                return result if problem is None else {**result, "problem": problem}
            return {"not_measured": problem or "the process wrote no result"}

    def stop(self) -> None:
        """End the process and what it started."""
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def _ask(self, request: dict[str, Any], seconds: float) -> str | None:
        if self._process is None or self._process.poll() is not None:
            self.stop()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", self.device],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                bufsize=0,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            self.stop()
            return "the process ended before it was asked"
        ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, seconds))
        if ready and self._process.stdout.readline() == DONE:
            return None
        if not ready:
            self.stop()
            return f"the process was ended after {seconds:.0f} s"
        try:
            code = self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        self.stop()
        return f"the process ended with status {code}"


def main() -> None:
    # What a task prints goes to stderr; stdout is for this protocol.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    import torch

    from .pytest_results import without_folders
    from .tasks import TASKS

    device = torch.device(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        task, output = request.pop("task"), Path(request.pop("output"))

        def save(result: dict[str, Any], output: Path = output) -> None:
            write_json(output, result)

        began = time.monotonic()
        try:
            result = TASKS[task](device, save=save, **request)
            save(result | {"task_seconds": round(time.monotonic() - began, 1)})
        except Exception as error:
            message = f"{type(error).__name__}: {without_folders(str(error)).strip()[:400]}"
            print(f"{task} failed: {message}", file=sys.stderr)
            kept = json.loads(output.read_text()) if output.exists() else {}
            save({**kept, "not_measured": message})
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.synchronize()  # where a kernel failed, this raises and ends the process
        answers.write(DONE)


if __name__ == "__main__":
    main()
