"""Worker processes for the training runs of a sweep.

Ctrl-C reaches this process alone, which stops the workers by SIGTERM: each finishes its step and
writes a checkpoint. A worker whose parent is gone stops in the same way.
"""

from __future__ import annotations

import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from ..common.interrupts import interruption, interrupts, sigterm_raises

POLL = 0.2  # seconds between updates of the progress


class Steps:
    """A progress display that counts the steps of a worker's training runs, for its parent.

    Args:
        counts: two numbers for each worker: steps done, and steps beyond those planned,
            less those that were resumed.
    """

    def __init__(self, counts: MutableSequence[int], worker: int = 0) -> None:
        self.counts, self.worker = counts, worker
        parent = parent_process()
        self.parent = None if parent is None else parent.pid

    def start(self, total_steps: int, step: int) -> None:
        self.counts[2 * self.worker + 1] -= step  # done before, and not to be done again

    def step(self, loss: float, accuracy: float, images: int) -> None:
        self.advance("")

    def advance(self, note: str) -> None:
        self.counts[2 * self.worker] += 1
        if self.parent is not None and os.getppid() != self.parent:
            signal.raise_signal(signal.SIGTERM)

    def extend(self, steps: int) -> None:
        self.counts[2 * self.worker + 1] += steps


Prepare = Callable[[Steps], Callable[[str], Any]]  # called once in a worker; returns its function


class _Worker(NamedTuple):
    process: Any  # multiprocessing.context.SpawnProcess
    name: str  # of its task


class _RemoteTraceback(Exception):
    """The traceback in a worker, as the cause of the error that it sent."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def run_named(
    names: Sequence[str],
    prepare: Prepare,
    workers: int,
    threads: int,
    update: Callable[[int, int, int], None],
) -> dict[str, Any]:
    """Return the results of a function by name, computed in worker processes.

    Args:
        prepare: picklable; returns the function, in each worker.
        workers: their number. threads: of torch, in each.
        update: called some times a second with the numbers of results, of steps done, and of steps
            beyond those planned.

    Raises:
        ChildProcessError: if a worker dies.
        KeyboardInterrupt, Terminated: on Ctrl-C and on SIGTERM, once all workers have ended.
        Exception: the first error of a worker, once all others have ended.
    """
    context = get_context("spawn")
    counts: Any = context.RawArray("q", 2 * workers)
    waiting, results = list(names), {}
    busy: dict[Connection, _Worker] = {}
    processes = []
    with interrupts() as signaled:
        try:
            with _no_ctrl_c():
                for number in range(min(workers, len(names))):
                    pipe, other = context.Pipe()
                    arguments = (other, prepare, threads, counts, number)
                    process = context.Process(target=_serve, args=arguments, daemon=True)
                    process.start()
                    other.close()  # so that the end of either process closes the pipe
                    processes.append(process)
                    _assign(pipe, process, waiting.pop(0), busy)
            while busy:
                ready: Sequence[Any] = wait(list(busy), POLL)
                if stop := signaled():  # before a worker's end, which it may have caused
                    raise interruption(stop)
                for pipe in ready:
                    process, name = busy.pop(pipe)
                    results[name] = _received(pipe, process, name)
                    if waiting:
                        _assign(pipe, process, waiting.pop(0), busy)
                    else:
                        pipe.close()
                update(len(results), sum(counts[::2]), sum(counts[1::2]))
        finally:
            _stop(processes, finished=len(results) == len(names))
    return results


def _assign(pipe: Connection, process: Any, name: str, busy: dict[Connection, _Worker]) -> None:
    with suppress(OSError):  # of a worker that has died: receiving says so
        pipe.send(name)
    busy[pipe] = _Worker(process, name)


def _received(pipe: Connection, process: Any, name: str) -> Any:
    """Return a worker's result, or raise its error."""
    try:
        result, error, text = pipe.recv()
    except (EOFError, OSError):
        process.join()
        if process.exitcode in (-signal.SIGTERM, 128 + signal.SIGTERM):
            raise interruption(signal.SIGTERM) from None  # sent to the whole group, or to it alone
        raise ChildProcessError(
            f"{name}: the worker process ended with exit code {process.exitcode}; if memory is "
            "short, use fewer workers"
        ) from None
    if error is not None:
        raise error from _RemoteTraceback(text)
    return result


@contextmanager
def _no_ctrl_c() -> Iterator[None]:
    """Block SIGINT, also in processes that are started meanwhile."""
    resource_tracker.ensure_running()  # starting it later would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(processes: Sequence[Any], finished: bool) -> None:
    """Wait until all processes have ended; unless they have finished, ask them to."""
    try:
        for process in processes:
            if not finished:
                process.terminate()
        for process in processes:
            process.join()
    except BaseException:  # a second signal
        for process in processes:
            process.kill()
            process.join()
        raise


@sigterm_raises()
def _serve(pipe: Connection, prepare: Prepare, threads: int, counts: Any, number: int) -> None:
    """Run tasks whose names come through the pipe until that is closed."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    torch.set_num_threads(threads)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        name = pipe.recv()
        try:
            run = prepare(Steps(counts, number))
        except Exception as error:
            pipe.send(_failed(error))
            return
        while True:
            try:
                message: tuple[Any, Exception | None, str] = run(name), None, ""
            except Exception as error:
                message = _failed(error)
            pipe.send(message)
            name = pipe.recv()


def _failed(error: Exception) -> tuple[None, Exception, str]:
    """Return the message of an error: itself, or its text where it cannot be pickled."""
    text = traceback.format_exc()
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return None, error, text
