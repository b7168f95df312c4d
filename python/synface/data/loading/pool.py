"""Worker processes that decode batches into reusable slots of shared memory.

The workers are started as programs, not by `multiprocessing`, which would import the trainer's main
module, and torch with it, in each of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

import numpy as np
import torch

from ...common.check import check_least
from ..formats.decode import DataError
from ..formats.images import Store
from .worker import IDLE, MIXING, STARTING, Done, Setup, SharedArray, SharedStore, Task

if TYPE_CHECKING:
    from typing_extensions import Self


class WorkerDied(DataError):
    """Error for a worker that ended unexpectedly; the message says how, and names its current
    image.
    """


@dataclass
class Timing:
    """Counts and times of a loader's work so far.

    Attributes:
        samples: number of images, or pairs of them, returned.
        seconds: from the loader's creation to the last batch.
        decoding: seconds of decoding, summed over the workers.
        waiting: seconds that the caller waited for batches.
        workers: number of workers.
    """

    workers: int
    samples: int = 0
    seconds: float = 0.0
    decoding: float = 0.0
    waiting: float = 0.0

    def report(self) -> dict[str, float]:
        """Return the attributes, samples_per_s, decode_share (of workers' time) and wait_share."""
        seconds = max(self.seconds, 1e-9)
        return asdict(self) | {
            "samples_per_s": self.samples / seconds,
            "decode_share": self.decoding / (self.workers * seconds),
            "wait_share": self.waiting / seconds,
        }


class Copied(Protocol):
    """The end of copies to a GPU: a `torch.cuda.Event` that was recorded behind them."""

    def query(self) -> bool:
        """Return whether they are done."""
        ...

    def synchronize(self) -> object:
        """Wait for them."""
        ...


@dataclass
class _Worker:
    index: int
    process: subprocess.Popen[bytes]
    connection: Connection
    tasks: int = 0


@dataclass
class _Resources:
    """Processes and memory to release, apart from the pool, so that a finalizer can hold them."""

    workers: list[_Worker] = field(default_factory=list)
    shared: list[SharedArray] = field(default_factory=list)
    pinned: list[int] = field(default_factory=list)
    copies: dict[int, Copied] = field(default_factory=dict)  # out of slots, by their index
    owner: int = field(default_factory=os.getpid)

    def release(self) -> None:
        if os.getpid() != self.owner:  # a fork of the trainer owns none of this
            return
        for worker in self.workers:
            worker.process.kill()  # a worker has no state to lose
            worker.connection.close()
        for worker in self.workers:
            worker.process.wait()
        for copied in self.copies.values():  # a GPU may still read the memory
            with suppress(RuntimeError):  # it has failed, and reads nothing
                copied.synchronize()
        for address in self.pinned:
            torch.cuda.cudart().cudaHostUnregister(address)
        for shared in self.shared:
            shared.close()

    def share(self, shape: tuple[int, ...], dtype: Any) -> SharedArray:
        self.shared.append(shared := SharedArray(shape, dtype))
        return shared

    def pin(self, array: np.ndarray) -> None:
        """Page-lock an array for copies to a GPU; warn if that fails."""
        address, size = array.ctypes.data, array.nbytes
        error = torch.cuda.cudart().cudaHostRegister(address, size, 0)
        if int(error):
            warnings.warn(
                f"{size:,} bytes of slots cannot be page-locked ({error}); copies "
                "to the GPU will be slower",
                stacklevel=5,
            )
        else:
            self.pinned.append(address)


class Schedule(NamedTuple):
    """A pool's steps and settings of its workers; see `TwoDomainLoader`."""

    first_step: int
    last_step: int | None
    workers: int
    prefetch: int
    pin: bool | None


class WorkerPool(ABC):
    """Worker processes that decode the batches of consecutive steps, each into a slot.

    The batch of a step is in slot ``step % slots`` until the caller requests the next one, and the
    copies that it told `hold` of are done.

    Args:
        stores: the images, one store for each domain.
        image_shape: (H, W, C) of all images.
        mixing: (mean, std) with which the workers mix the domains; None: they do not mix.
    """

    def __init__(
        self,
        stores: Sequence[Store],
        image_shape: tuple[int, int, int],
        batch_size: int,
        mixing: tuple[Any, Any] | None,
        schedule: Schedule,
    ) -> None:
        first_step, self._last, workers, prefetch, pin = schedule
        check_least("batch_size", batch_size, 1)
        check_least("first_step", first_step, 0)
        check_least("workers", workers, 1)
        check_least("prefetch", prefetch, 1)
        self.image_shape, self.batch_size, self.timing = image_shape, batch_size, Timing(workers)
        self._next = self._ahead = first_step  # the next to return; to assign
        self._prefetch = prefetch
        self._done: dict[int, Done] = {}
        height, width, channels = image_shape
        shape: tuple[int, ...] = (len(stores), batch_size, *image_shape)
        if mixing is not None:
            shape = (batch_size, channels, height, width)

        self._resources = resources = _Resources()
        self.close = weakref.finalize(self, resources.release)
        try:
            # One slot more than the workers can fill: the caller holds the last batch.
            kind = np.uint8 if mixing is None else np.float32
            self._slots = resources.share((workers * prefetch + 1, *shape), kind)
            if torch.cuda.is_available() if pin is None else pin:
                resources.pin(self._slots.array)
            self._tickets = resources.share((workers,), np.int64)
            self._tickets.array[:] = STARTING
            shared: list[SharedStore] = []
            for store in stores:
                shared.append(SharedStore.of(store))
                resources.shared += shared[-1].arrays
            setup = Setup(0, shared, self._slots, self._tickets, (batch_size, *image_shape), mixing)
            for index in range(workers):
                worker = _start(index, [array.fd for array in resources.shared])
                resources.workers.append(worker)
                self._send(worker, setup._replace(worker=index))
            self._began = time.perf_counter()
            self._give()
        except BaseException:
            self.close()
            raise

    @abstractmethod
    def _task(self, step: int) -> Task:
        """Return a step's task for a worker."""

    @abstractmethod
    def _image(self, ticket: int) -> str:
        """Return the name of a ticket's image."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.process.pid for worker in self._resources.workers]

    def _slot(self, step: int) -> np.ndarray:
        """Return the slot of the next step once its batch is decoded.

        Raises:
            DataError: for an image that cannot be decoded. WorkerDied: if any worker died.
        """
        self._give()
        while self._receive(0.0):  # a worker's death is reported even if this batch is ready
            pass
        while step not in self._done:
            self._receive(None)
        problem = self._done.pop(step).problem
        if problem is not None:
            raise DataError(
                f"{self._image(problem[0])} cannot be used; expected a readable, complete image: "
                f"{problem[1]}"
            )
        self._next += 1
        return self._slots.array[step % len(self._slots.array)]

    def hold(self, copied: Copied) -> None:
        """Keep the last batch's slot until copies out of it are done.

        The next batch may be requested before: no worker writes to the slot meanwhile.
        """
        self._resources.copies[(self._next - 1) % len(self._slots.array)] = copied

    def sent(self, device: torch.device) -> None:
        """Call `hold` for the copies to a device that are queued on its current stream."""
        if device.type == "cuda":
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream(device))
            self.hold(event)

    def _is_free(self, slot: int) -> bool:
        """Return whether no copy reads a slot; wait for it if workers have nothing else to do."""
        copied = self._resources.copies.get(slot)
        if copied is not None and not copied.query():
            if self._ahead > self._next:
                return False
            copied.synchronize()
        self._resources.copies.pop(slot, None)
        return True

    def _send(self, worker: _Worker, message: Setup | Task) -> None:
        try:
            worker.connection.send(message)
        except OSError:
            self._raise_died(worker)

    def _give(self) -> None:
        """Assign tasks to the least loaded workers, while slots are free and steps remain."""
        slots = len(self._slots.array)
        end = self._next + slots
        while self._ahead < (end if self._last is None else min(end, self._last)):
            worker = min(self._resources.workers, key=lambda w: w.tasks)
            if worker.tasks == self._prefetch or not self._is_free(self._ahead % slots):
                return
            self._send(worker, self._task(self._ahead))
            worker.tasks += 1
            self._ahead += 1

    def _receive(self, timeout: float | None) -> bool:
        """Receive a batch from each worker that has one, and return whether any had.

        Args:
            timeout: in seconds; None waits for the first batch.
        """
        workers = {worker.connection: worker for worker in self._resources.workers}
        ready = wait(list(workers), timeout)
        for connection in ready:
            worker = workers[connection]  # type: ignore[index]
            try:
                done: Done = worker.connection.recv()
            except (EOFError, OSError):
                self._raise_died(worker)
            worker.tasks -= 1
            self._done[done.step] = done
            self.timing.decoding += done.seconds
        self._give()
        return bool(ready)

    def _raise_died(self, worker: _Worker) -> NoReturn:
        hint = ""
        try:
            code = worker.process.wait(1.0)
        except subprocess.TimeoutExpired:
            how = "closed its connection"
        else:
            if code < 0:
                how = f"was killed by signal {-code} ({signal.strsignal(-code)})"
                hint = (
                    "; the system does this when memory runs out" if code == -signal.SIGKILL else ""
                )
            else:
                how = f"exited with status {code}"
        ticket = int(self._tickets.array[worker.index])
        states = {STARTING: "while it started", IDLE: "while idle", MIXING: "while mixing"}
        where = states.get(ticket) or f"while on {self._image(ticket)}"
        raise WorkerDied(
            f"loader worker {worker.index + 1} of {self.timing.workers} "
            f"(process {worker.process.pid}) {how} {where}{hint}"
        )


def _start(index: int, descriptors: list[int]) -> _Worker:
    """Start a worker with this process's import path and the given file descriptors."""
    ours, theirs = Pipe()
    code = (  # set sys.path first: it begins with the current folder
        f"import sys; sys.path[:] = {json.dumps([str(p) for p in sys.path])}; "
        f"from {__package__}.worker import main; main({theirs.fileno()})"
    )
    # One thread each: parallelism comes from the number of workers.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), *descriptors],
            start_new_session=True,  # so that only the trainer gets Ctrl-C
        )
    return _Worker(index, process, ours)
