"""A loader's worker process, which decodes images into memory that it shares with the trainer.

It only imports NumPy and Pillow (and pyarrow for Parquet and Arrow files), so it starts in a
fraction of a second and needs a few tens of megabytes. It ends when its connection is closed.
"""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from ...common.check import check_memory
from ..formats import decode
from ..formats.images import Store

STARTING, IDLE, MIXING = -3, -2, -1  # tickets without an image


class SharedArray:
    """An array in anonymous shared memory, freed with the last process that maps it.

    A child process that inherits the file descriptor maps it by unpickling this. The memory is
    freed with the last array over it, even without `close`. Pages are allocated when they are
    written, so a lack of memory shows only then.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DTypeLike, fd: int | None = None) -> None:
        count = int(np.prod(shape, dtype=object))
        size = max(1, count * np.dtype(dtype).itemsize)
        if fd is None:
            check_memory(f"an array of shape {shape}", size)
        self.fd = _anonymous_file(size) if fd is None else fd
        self.array: NDArray[Any] = np.frombuffer(
            mmap.mmap(self.fd, size), dtype, count=count
        ).reshape(shape)

    @classmethod
    def of(cls, values: NDArray[Any]) -> SharedArray:
        """Copy an array into shared memory."""
        shared = cls(values.shape, values.dtype)
        shared.array[...] = values
        return shared

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedArray, (self.array.shape, self.array.dtype.str, self.fd)

    def close(self) -> None:
        """Release this array; the memory stays while others map it."""
        os.close(self.fd)
        del self.array


def _anonymous_file(size: int) -> int:
    if hasattr(os, "memfd_create"):  # Linux; unlike /dev/shm, not limited in size
        fd = os.memfd_create("synface")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd


@dataclass(frozen=True)
class SharedStore:
    """A pickled `Store` whose arrays are in shared memory."""

    pickled: bytes
    arrays: list[SharedArray]

    @classmethod
    def of(cls, store: Store) -> SharedStore:
        """Share a store."""
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(store, protocol=5, buffer_callback=buffers.append)
        raw = [np.frombuffer(buffer.raw(), np.uint8) for buffer in buffers]
        return cls(pickled, [SharedArray.of(array) for array in raw])

    def store(self) -> Store:
        """Return the store, over the shared arrays."""
        return pickle.loads(self.pickled, buffers=[shared.array for shared in self.arrays])


class Setup(NamedTuple):
    """The first message to a worker.

    Attributes:
        worker: index of the worker.
        stores: that of one domain, or those of the synthetic and the real one.
        slots: (S, domains, B, H, W, C) uint8, or (S, B, C, H, W) float32 if the worker mixes.
        tickets: (workers,) int64, what each worker works on: an image, counted through all steps as
            (step·domains + its domain)·B + its index in the batch; or STARTING, IDLE or MIXING.
        shape: (B, H, W, C) of a domain's batch. mixing: (mean, std) if the worker mixes.
    """

    worker: int
    stores: list[SharedStore]
    slots: SharedArray
    tickets: SharedArray
    shape: tuple[int, int, int, int]
    mixing: tuple[Any, Any] | None


class Task(NamedTuple):
    """A batch to decode, into slot ``step % slots``.

    Attributes:
        rows: (domains, n) int64, indices of the images of each domain.
        psi: (n,) float64 if the worker mixes. flip: (2, n) bool if any are flipped.
    """

    step: int
    rows: NDArray[np.int64]
    psi: NDArray[np.float64] | None
    flip: NDArray[np.bool_] | None


class Done(NamedTuple):
    """The result of a task: seconds spent on decoding, and (ticket, problem) if an image failed."""

    step: int
    seconds: float
    problem: tuple[int, str] | None


def main(fd: int) -> None:
    """Serve the loader at the other end of a socket until that is closed."""
    for each in (signal.SIGINT, signal.SIGTERM):  # sent to a whole job; the trainer handles them
        signal.signal(each, signal.SIG_IGN)
    with Connection(fd) as loader:
        try:
            setup: Setup = loader.recv()
            stores = [shared.store() for shared in setup.stores]
            scratch = np.empty((len(stores), *setup.shape), np.uint8)
            tickets = setup.tickets.array
            while True:
                tickets[setup.worker] = IDLE
                task: Task = loader.recv()
                loader.send(_serve(setup, stores, task, scratch))
        except (EOFError, ConnectionError):  # the loader is gone
            return


def _serve(setup: Setup, stores: list[Store], task: Task, scratch: NDArray[np.uint8]) -> Done:
    """Decode a batch, and mix it if the task has a ψ."""
    batch, tickets = setup.shape[0], setup.tickets.array
    slot = setup.slots.array[task.step % len(setup.slots.array)]
    images = slot if task.psi is None else scratch
    count = task.rows.shape[1]
    began = time.perf_counter()
    for side, store in enumerate(stores):
        read = decode.attempt(store.read_into)
        for i, row in enumerate(task.rows[side]):
            ticket = (len(stores) * task.step + side) * batch + i
            tickets[setup.worker] = ticket
            _, problem = read(images[side, i], int(row))
            if problem:
                return Done(task.step, time.perf_counter() - began, (ticket, problem))
    seconds = time.perf_counter() - began
    if task.psi is not None and setup.mixing is not None:
        from synface_kernels.numpy import domain_mixup

        tickets[setup.worker] = MIXING
        domain_mixup(
            images[0, :count],
            images[1, :count],
            task.psi,
            mean=setup.mixing[0],
            std=setup.mixing[1],
            flip=None if task.flip is None else (task.flip[0], task.flip[1]),
            out=slot[:count],
        )
    return Done(task.step, seconds, None)
