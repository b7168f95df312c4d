"""Batches of images, decoded by worker processes into memory that is used again and again.

The workers are started as programs of their own, not by `multiprocessing`: that would have each of
them import the trainer's main module, and torch with it.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from synface.common.rng import generator
from synface.data.mixing import DomainMixup, Mixed

from ..formats import decode
from ..formats.decode import DataError
from ..formats.folder import Faces
from ..formats.images import ImageSet, open_images
from .sampler import WHOLE, CycledOrder, Order, Part, ShuffledOrder
from .worker import IDLE, MIXING, STARTING, Done, Pixels, Setup, SharedArray, Stored, Task

if TYPE_CHECKING:
    from typing_extensions import Self

Domain = Faces | ImageSet


class WorkerDied(DataError):
    """A worker process that ended by itself; the message says how, and what it was on."""


class Images(NamedTuple):
    """A batch of n images.

    Attributes:
        images: (n, H, W, C) uint8. labels: (n,) int64.
    """

    images: Tensor
    labels: Tensor


class Pairs(NamedTuple):
    """A batch of n pairs of images, ready for a call ``mixup(*pairs, generator=...)``.

    Attributes:
        synthetic, real: (n, H, W, C) uint8.
        synthetic_labels, real_labels: (n,) int64, each from 0.
    """

    synthetic: Tensor
    synthetic_labels: Tensor
    real: Tensor
    real_labels: Tensor


@dataclass
class Timing:
    """What a loader did so far.

    Attributes:
        samples: handed out: images, or pairs of them.
        seconds: since the loader was made, to the last batch.
        decoding: seconds that the workers spent on reading files, all together.
        waiting: seconds that whoever takes the batches waited for them.
        workers: how many.
    """

    workers: int
    samples: int = 0
    seconds: float = 0.0
    decoding: float = 0.0
    waiting: float = 0.0

    def report(self) -> dict[str, float]:
        """The attributes; samples_per_s; decode_share, of the workers' time; wait_share, of all."""
        seconds = max(self.seconds, 1e-9)
        return asdict(self) | {
            "samples_per_s": self.samples / seconds,
            "decode_share": self.decoding / (self.workers * seconds),
            "wait_share": self.waiting / seconds,
        }


@dataclass
class _Worker:
    index: int
    process: subprocess.Popen[bytes]
    connection: Connection
    tasks: int = 0


@dataclass
class _Resources:
    """All that has to be given back, apart from the loader so that a finalizer can hold it."""

    workers: list[_Worker] = field(default_factory=list)
    shared: list[SharedArray] = field(default_factory=list)
    pinned: list[int] = field(default_factory=list)
    owner: int = field(default_factory=os.getpid)

    def release(self) -> None:
        if os.getpid() != self.owner:  # a fork of the trainer, to which nothing of this belongs
            return
        for worker in self.workers:
            worker.process.kill()  # it holds nothing that could be lost
            worker.connection.close()
        for worker in self.workers:
            worker.process.wait()
        for address in self.pinned:
            torch.cuda.cudart().cudaHostUnregister(address)
        for shared in self.shared:
            shared.close()


BatchT = TypeVar("BatchT")


class _Loader(Generic[BatchT]):
    """What loaders of one domain and of two share."""

    def __init__(
        self,
        domains: tuple[Domain, ...],
        order: Order,
        batch_size: int,
        image_shape: tuple[int, int, int],
        *,
        seed: int,
        first_step: int,
        last_step: int | None,
        workers: int,
        prefetch: int,
        mixup: DomainMixup | None,
        pin: bool | None,
        part: Part,
    ) -> None:
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("first_step", first_step, 0),
            ("workers", workers, 1),
            ("prefetch", prefetch, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.domains, self.order, self.batch_size = domains, order, batch_size
        self.image_shape = image_shape
        self.steps_per_epoch = order.batches(batch_size)
        self.timing = Timing(workers)
        self._mixup, self._seed, self._part = mixup, seed, part
        self._labels = [
            labels if isinstance(labels, Tensor) else torch.from_numpy(labels)
            for labels in (domain.labels for domain in domains)
        ]
        self._next = self._ahead = first_step  # to hand out; to give to a worker
        self._last = last_step
        self._done: dict[int, Done] = {}
        self._slot_of: dict[int, int] = {}
        self._prefetch = prefetch
        slots = workers * prefetch + 1  # one is with whoever takes the batches
        self._free = list(range(slots))

        self._resources = resources = _Resources()
        self.close = weakref.finalize(self, resources.release)
        height, width, channels = self.image_shape
        try:
            if mixup is None:
                shape = (slots, len(domains), batch_size, *image_shape)
                self._slots = self._share(shape, np.uint8)
            else:
                self._slots = self._share((slots, batch_size, channels, height, width), np.float32)
            if torch.cuda.is_available() if pin is None else pin:
                self._pin()
            self._tickets = self._share((workers,), np.int64)
            self._tickets.array[:] = STARTING
            stored = tuple(self._stored(domain) for domain in domains)
            for index in range(workers):
                worker = _start(index, [shared.fd for shared in resources.shared])
                resources.workers.append(worker)
                setup = Setup(
                    index,
                    stored,
                    self._slots,
                    self._tickets,
                    self.image_shape,
                    batch_size,
                    mixup.mean if mixup else 0.5,
                    mixup.std if mixup else 0.5,
                )
                self._send(worker, setup)
            self._began = time.perf_counter()
            self._give()
        except BaseException:
            self.close()
            raise

    def _named(self, slot: Tensor, labels: list[Tensor], step: int) -> BatchT:
        """A step's batch, of what its slot holds and the labels of each domain."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[int, BatchT]:
        if not self.close.alive:
            raise ValueError("the loader is closed")
        if self._last is not None and self._next >= self._last:
            raise StopIteration
        try:
            return self._batch()
        except BaseException:  # an interrupt may leave half a message behind
            self.close()
            raise

    def _batch(self) -> tuple[int, BatchT]:
        """The next batch."""
        asked = time.perf_counter()
        step = self._next
        if step - 1 in self._slot_of:
            self._free.append(self._slot_of.pop(step - 1))
        self._give()
        while self._receive(0.0):  # a worker that died is told of even where this batch is there
            pass
        while step not in self._done:
            self._receive(None)
        done = self._done.pop(step)
        if done.problem is not None:
            ticket, problem = done.problem
            raise DataError(
                f"{self._image(ticket)} cannot be used; expected a readable, complete image: "
                f"{problem}"
            )
        self._next += 1
        rows = torch.from_numpy(self._rows(step))
        count, slot = rows.shape[1], torch.from_numpy(self._slots.array[self._slot_of[step]])
        labels = [of[index] for of, index in zip(self._labels, rows, strict=True)]
        batch = self._named(slot[..., :count, :, :, :], labels, step)
        now = time.perf_counter()
        self.timing.samples += count
        self.timing.waiting += now - asked
        self.timing.seconds = now - self._began
        return step, batch

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.process.pid for worker in self._resources.workers]

    def _share(self, shape: tuple[int, ...], dtype: Any) -> SharedArray:
        self._resources.shared.append(shared := SharedArray(shape, dtype))
        return shared

    def _stored(self, domain: Domain) -> Pixels | Stored:
        if isinstance(domain, Faces):
            pixels = Pixels(SharedArray.of(domain.images.numpy()))
            self._resources.shared.append(pixels.images)
            return pixels
        stored = Stored.of(domain.store)
        self._resources.shared += stored.arrays
        return stored

    def _pin(self) -> None:
        address, size = self._slots.array.ctypes.data, self._slots.array.nbytes
        error = torch.cuda.cudart().cudaHostRegister(address, size, 0)
        if int(error):
            warnings.warn(
                f"{size:,} bytes of slots cannot be page-locked ({error}); copies "
                "to the GPU will be slower",
                stacklevel=3,
            )
        else:
            self._resources.pinned.append(address)

    def _rows(self, step: int) -> np.ndarray:
        """(domains, n): the images of a step."""
        return np.stack(self.order.batch(step, self.batch_size, self._part))

    def _drawn(self, step: int, count: int) -> tuple[Tensor, Tensor | None]:
        """ψ and flips of a step."""
        assert self._mixup is not None
        return self._mixup.draw(count, generator(self._seed, self._part.purpose("mixup"), step))

    def _send(self, worker: _Worker, message: Setup | Task) -> None:
        try:
            worker.connection.send(message)
        except OSError:
            self._raise_died(worker)

    def _give(self) -> None:
        """Hands tasks to the workers that have fewest, as far as slots and steps go."""
        while self._free and (self._last is None or self._ahead < self._last):
            worker = min(self._resources.workers, key=lambda w: w.tasks)
            if worker.tasks == self._prefetch:
                return
            step, slot = self._ahead, self._free.pop()
            rows = self._rows(step)
            psi = flip = None
            if self._mixup is not None:
                drawn, flips = self._drawn(step, rows.shape[1])
                psi, flip = drawn.numpy(), None if flips is None else flips.numpy()
            self._send(worker, Task(step, slot, rows, psi, flip))
            self._slot_of[step] = slot
            worker.tasks += 1
            self._ahead += 1

    def _receive(self, timeout: float | None) -> bool:
        """Takes a batch of each worker that has one; without a timeout, waits for the first.

        Returns whether there was any.
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
                hint = "; so ends a process when memory runs out" if code == -signal.SIGKILL else ""
            else:
                how = f"exited with status {code}"
        ticket = int(self._tickets.array[worker.index])
        states = {STARTING: "while it started", IDLE: "while idle", MIXING: "while mixing"}
        where = states.get(ticket) or f"while on {self._image(ticket)}"
        raise WorkerDied(
            f"loader worker {worker.index + 1} of {self.timing.workers} "
            f"(process {worker.process.pid}) {how} {where}{hint}"
        )

    def _image(self, ticket: int) -> str:
        """The file that a ticket stands for, or the number of the image in memory."""
        step, place = divmod(ticket, len(self.domains) * self.batch_size)
        side, i = divmod(place, self.batch_size)
        row, domain = int(self._rows(step)[side, i]), self.domains[side]
        if isinstance(domain, ImageSet):
            return domain.name(row)
        return f"image {row} of {domain.source}"


class TwoDomainLoader(_Loader[Pairs | Mixed]):
    """Iterates over batches of synthetic and real images, from any step on.

    Yields (step, `Pairs`), or with ``mix_in_workers`` (step, `Mixed`); steps are counted through
    all epochs. The images are a view of a slot: they hold until the next batch is asked for (wait
    for copies to a GPU before).

    The order is a `CycledOrder`: a function of (seed, epoch, position). So a loader that starts at
    a step yields bit for bit what one that started at 0 yields from there, with any number of
    workers. The last batch of an epoch is shorter where the batch size does not divide it.

    Args:
        synthetic, real: a `Faces` in memory, an `ImageSet`, or a path for `open_images`. An epoch
            is one pass over the synthetic set.
        batch_size: pairs of images in a batch.
        size: (H, W) in pixels, to which files are resized; None is the size of the domain in
            memory, else that of the first synthetic file.
        grayscale: True for one channel, False for RGB; None is what the domain in memory has, else
            grayscale when every file of both domains is.
        seed: of the order, and of what is drawn in ``mix_in_workers``.
        first_step, last_step: the steps to yield, last excluded; None is without end.
        workers: processes, at least 1. prefetch: batches that each has in hand at most.
        mix_in_workers: the workers mix by this, each on one thread. A step draws from
            ``generator(seed, "mixup", step)``: what the same mixup makes of the `Pairs` with that
            generator are the same bits.
        pin: page-locks the slots for copies to a GPU; None does where CUDA is at hand.
        part: of every batch, for one rank of several.

    Use it in a ``with`` statement, or call `close`: it ends the workers and frees the memory. Needs
    a POSIX system.

    Raises (also while iterating):
        DataError: for paths that `open_images` refuses, and compressed shards, which can be read in
            order only; for an image that is unreadable or truncated, named when its batch is due.
        WorkerDied: a `DataError`: within a second of the death of any worker if a batch is waited
            for, else when the next batch is asked for.
        ValueError: for domains of different size or channels, a number out of range, a mixup for
            fewer identities than there are, or whose result is not contiguous float32, and for a
            loader that is closed.

    Memory: (workers·prefetch + 1) slots of 2·B·H·W·C bytes (4·B·C·H·W if the workers mix, which
    then hold 2·B·H·W·C each), a copy of the domains that are in memory, and the names of the files.
    """

    def __init__(
        self,
        synthetic: Domain | str | Path,
        real: Domain | str | Path,
        batch_size: int,
        *,
        size: tuple[int, int] | None = None,
        grayscale: bool | None = None,
        seed: int = 0,
        first_step: int = 0,
        last_step: int | None = None,
        workers: int = 2,
        prefetch: int = 2,
        mix_in_workers: DomainMixup | None = None,
        pin: bool | None = None,
        part: Part = WHOLE,
    ) -> None:
        domains = opened(synthetic=synthetic, real=real)
        if mix_in_workers is not None:
            _check_mixup(mix_in_workers, domains)
        super().__init__(
            domains,
            CycledOrder(len(domains[0]), len(domains[1]), seed),
            batch_size,
            common_shape(domains, size, grayscale),
            seed=seed,
            first_step=first_step,
            last_step=last_step,
            workers=workers,
            prefetch=prefetch,
            mixup=mix_in_workers,
            pin=pin,
            part=part,
        )

    def _named(self, slot: Tensor, labels: list[Tensor], step: int) -> Pairs | Mixed:
        if self._mixup is None:
            return Pairs(slot[0], labels[0], slot[1], labels[1])
        psi = self._drawn(step, len(slot))[0]
        return Mixed(slot, *self._mixup.label(labels[0], labels[1], psi))


class ImageLoader(_Loader[Images]):
    """Iterates over batches of one set of images, from any step on; see `TwoDomainLoader`.

    Yields (step, `Images`). An epoch is one pass over the set, in the `ShuffledOrder` of the seed.

    Args:
        images: a `Faces` in memory, an `ImageSet`, or a path for `open_images`.
        size: (H, W) in pixels, to which files are resized; None is the first file's.
        grayscale: True for one channel, False for RGB; None is grayscale when every file is.
        batch_size, seed, first_step, last_step, workers, prefetch, pin, part: see there.

    Raises: as `TwoDomainLoader` does.

    Memory: (workers·prefetch + 1) slots of B·H·W·C bytes, 16 bytes per image for the order, and
    twice what `open_images` says.
    """

    def __init__(
        self,
        images: Domain | str | Path,
        batch_size: int,
        *,
        size: tuple[int, int] | None = None,
        grayscale: bool | None = None,
        seed: int = 0,
        first_step: int = 0,
        last_step: int | None = None,
        workers: int = 2,
        prefetch: int = 2,
        pin: bool | None = None,
        part: Part = WHOLE,
    ) -> None:
        domains = opened(images=images)
        super().__init__(
            domains,
            ShuffledOrder(len(domains[0]), seed),
            batch_size,
            common_shape(domains, size, grayscale),
            seed=seed,
            first_step=first_step,
            last_step=last_step,
            workers=workers,
            prefetch=prefetch,
            mixup=None,
            pin=pin,
            part=part,
        )

    def _named(self, slot: Tensor, labels: list[Tensor], step: int) -> Images:
        return Images(slot[0], labels[0])


def opened(**sources: Domain | str | Path) -> tuple[Domain, ...]:
    """Named sets of images, listed where they are paths.

    Raises:
        DataError: for what `open_images` refuses, and for what can be read in order only.
        ValueError: for a set without images.
    """
    domains = tuple(
        source if isinstance(source, Faces | ImageSet) else open_images(source)
        for source in sources.values()
    )
    for name, domain in zip(sources, domains, strict=True):
        if not len(domain):
            raise ValueError(f"{name} holds no images ({domain.source})")
        if isinstance(domain, ImageSet) and domain.store.streams:
            raise DataError(
                f"{domain.source} can be read in order only, and training shuffles; "
                "convert it first (synface convert)"
            )
    return domains


def _check_mixup(mixup: DomainMixup, domains: Sequence[Domain]) -> None:
    wanted = (torch.float32, torch.contiguous_format, "NHWC")
    if (mixup.dtype, mixup.memory_format, mixup.layout) != wanted:
        raise ValueError(
            "mix_in_workers must make contiguous float32 images from NHWC ones, "
            f"got dtype {mixup.dtype}, {mixup.memory_format} and layout {mixup.layout!r}"
        )
    counts = [len(domain.identities) for domain in domains]
    if mixup.num_synthetic < counts[0] or mixup.num_real < counts[1]:
        raise ValueError(
            f"mix_in_workers is for {mixup.num_synthetic} synthetic and {mixup.num_real} real "
            f"identities, the domains hold {counts[0]} and {counts[1]}"
        )


def common_shape(
    domains: Sequence[Domain], size: tuple[int, int] | None, grayscale: bool | None
) -> tuple[int, int, int]:
    """(H, W, C) of the images of all domains, as `TwoDomainLoader` says.

    Raises:
        DataError: if no file tells.
        ValueError: if a domain in memory is of another shape.
    """
    in_memory = [domain for domain in domains if isinstance(domain, Faces)]
    on_disk = [domain for domain in domains if isinstance(domain, ImageSet)]
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size must be (height, width) in pixels, both at least 1, got {size}")
    if size is None:
        if in_memory:
            size = (in_memory[0].images.shape[1], in_memory[0].images.shape[2])
        else:
            size = on_disk[0].store.image_size or _attempted(
                on_disk[0], on_disk[0].store.size_of, 0
            )
    if grayscale is None:
        if in_memory:
            grayscale = in_memory[0].images.shape[3] == 1
        else:
            every = ((domain, i) for domain in on_disk for i in range(len(domain)))
            grayscale = all(_mode(domain, i) in decode.GRAYSCALE for domain, i in every)
    shape = (*size, 1 if grayscale else 3)
    for domain in in_memory:
        if tuple(domain.images.shape[1:]) != shape:
            raise ValueError(
                "the images of both domains must have one shape (height, width, channels): "
                f"expected {shape}, got {tuple(domain.images.shape[1:])} from {domain.source}"
            )
    return shape


def _attempted(images: ImageSet, function: Callable[[int], Any], index: int) -> Any:
    result, problem = decode.attempt(function)(index)
    if problem:
        decode.raise_if({images.name(index): problem}, "image", "a readable, complete image")
    return result


def _mode(images: ImageSet, index: int) -> str:
    def mode(row: int) -> str:
        with images.store.open(row) as file:
            return decode.mode(file)

    return _attempted(images, mode, index)


def _start(index: int, descriptors: list[int]) -> _Worker:
    """A worker that finds what this process would import, and shares some descriptors with it."""
    ours, theirs = Pipe()
    code = (  # sys.path first: it would begin with the current folder
        f"import sys; sys.path[:] = {json.dumps([str(p) for p in sys.path])}; "
        f"from {__package__}.worker import main; main({theirs.fileno()})"
    )
    # One thread each: the workers themselves are what runs in parallel.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env=environment,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno(), *descriptors],
            start_new_session=True,  # Ctrl-C is for the trainer alone
        )
    return _Worker(index, process, ours)
