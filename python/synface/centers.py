"""Class centres in memory or in memory-mapped files, trained by sampled rows.

With sampling a step touches only its rows, so that the number of identities is bounded by the disk.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

import synface_kernels as sk

from . import checkpoint
from .check import check_integer, check_number, describe
from .checkpoint import CheckpointError
from .randomness import generator, seeds

FORMAT = 1
STATE, ROWS, LAST_STEP, LOCK = "centers.json", "rows.bin", "last_step.bin", "lock"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STATE_BYTES = 2**16  # no longer is the JSON
FRAME_BYTES = 2**24  # of records, at most, in one frame of the log
ID_BYTES = 8 + 4  # a row's id and last step in a frame
Progress = Callable[[int, int], None]  # done, total


@dataclass(frozen=True)
class CentersConfig:
    """What centres are, and how their optimiser moves them.

    Attributes:
        num_classes: C, in [1, 2^31). embedding_size: D, in [1, 2^20].
        dtype: of the centres and of their optimiser's state: ``"bfloat16"``, stored with seeded
            random rounding, or ``"float32"``.
        optimizer: ``"sgd"`` (`sk.row_sgd_`) or ``"adamw"`` (`sk.row_adamw_`).
        momentum, nesterov: of SGD; without momentum there is no buffer.
        betas, eps: of AdamW.
        weight_decay: as the optimiser has it.
        catch_up: a row takes the steps that it missed when it is sampled next, before the loss sees
            it, as a dense optimiser would have taken them. False: rows that are not sampled stay.
        init_std: standard deviation of the initial values.
        seed: of the initial values, the sampled classes and the random rounding.
    """

    num_classes: int
    embedding_size: int
    dtype: str = "bfloat16"
    optimizer: str = "sgd"
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    catch_up: bool = True
    init_std: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name, most in (("num_classes", 2**31 - 1), ("embedding_size", 2**20)):
            check_integer(name, getattr(self, name), 1)
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most}, got {getattr(self, name)}")
        check_integer("seed", self.seed, 0)
        for name, allowed in (("dtype", tuple(DTYPES)), ("optimizer", ("sgd", "adamw"))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be {' or '.join(allowed)}, got {getattr(self, name)!r}"
                )
        for name in ("momentum", "eps", "weight_decay", "init_std"):
            check_number(name, getattr(self, name), 0)
        for name in ("nesterov", "catch_up"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {describe(getattr(self, name))}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum > 0, got 0")
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise TypeError(f"betas must be a pair of numbers, got {describe(self.betas)}")
        object.__setattr__(self, "betas", tuple(self.betas))
        for beta in self.betas:
            check_number("betas", beta, 0)
            if beta >= 1:
                raise ValueError(f"betas must be in [0, 1), got {self.betas}")

    @property
    def states(self) -> tuple[str, ...]:
        """The optimiser's state: one (C, D) matrix each."""
        if self.optimizer == "adamw":
            return "exp_avg", "exp_avg_sq"
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def width(self) -> int:
        """Numbers in a record: a centre, then its state."""
        return (1 + len(self.states)) * self.embedding_size

    @property
    def record_bytes(self) -> int:
        return self.width * DTYPES[self.dtype].itemsize

    @property
    def bytes(self) -> dict[str, int]:
        """Size of each file (or, in memory, tensor)."""
        return {ROWS: self.num_classes * self.record_bytes, LAST_STEP: 4 * self.num_classes}

    @classmethod
    def from_json(cls, values: Any) -> CentersConfig:
        """Raises ValueError or TypeError for values that a configuration cannot have."""
        if not isinstance(values, dict):
            raise TypeError(f"config must be an object, got {type(values).__name__}")
        wrong = values.keys() ^ {f.name for f in fields(cls)}
        if wrong:
            raise ValueError(f"config lacks, or should not have, {', '.join(sorted(wrong))[:200]}")
        return cls(**values)


class Centers:
    """(C, D) class centres with their optimiser's state, of which each step touches some rows.

        with Centers.open("centers") as centers:          # or Centers.create(config, "centers")
            loss = centers.loss(embeddings, labels, num_sampled=100_000)
            loss.backward()
            centers.update(lr=0.1)
            centers.checkpoint()

    The centre of an identity and its state are one record, so that a step touches as few pages as
    it can.

    **What a kill leaves.** A step changes rows in place; before it does, what a row held at the
    last checkpoint is appended to a log, once per row. `open` puts it back: whenever the process
    dies, the last checkpoint is whole. So a checkpoint copies nothing, and between checkpoints the
    files take up to twice their size. With ``sync=True`` this holds where the machine goes down,
    too; without, `open` then says that the rows cannot be trusted, unless no step was taken since
    the last checkpoint.

    Attributes:
        config: a `CentersConfig`.
        step: how many steps were taken. lr: of the last one; rows catch up with it.
        weight: (C, D) centres; a view of each record's first D numbers.
        states: the optimiser's state by name, (C, D) each; views too.
        last_step: (C,) int32: the step after which a row is up to date; 0 for one never touched.
        seconds: what the last step spent on what, in seconds.

    Memory: in memory (C, D) times one plus the number of states; with a directory, the operating
    system keeps of the files what fits. Besides, per step of S rows, their gradient (S, D) and what
    the ops say.
    """

    def __init__(self, config: CentersConfig, records: Tensor, last_step: Tensor) -> None:
        """Use `create` or `open`."""
        self.config, self.step, self.lr = config, 0, 0.0
        self.seconds: dict[str, float] = {}
        self._records, self.last_step = records, last_step
        self.weight, *states = records.split(config.embedding_size, dim=1)
        self.states = dict(zip(config.states, states, strict=True))
        self._pending: tuple[Tensor, Tensor] | None = None
        self._files: _Files | None = None

    @classmethod
    def create(
        cls,
        config: CentersConfig,
        directory: Path | str | None = None,
        *,
        overwrite: bool = False,
        sync: bool = False,
        progress: Progress | None = None,
    ) -> Centers:
        """New centres with normal values, drawn chunk by chunk: the same in memory and in files.

        Args:
            directory: of the files; None: in memory.
            overwrite: replace centres that are in the directory.
            sync: survive that the machine goes down, not only the process: each step then waits for
                the log to be on the disk.
            progress: called with rows done and in all.

        Raises:
            FileExistsError: for a directory that holds anything, or without ``overwrite`` centres.
            OSError: where the disk has not enough room, before anything is written or replaced.
        """
        if directory is None:
            records = torch.zeros(config.num_classes, config.width, dtype=DTYPES[config.dtype])
            centers = cls(config, records, torch.zeros(config.num_classes, dtype=torch.int32))
            _initialise(centers, progress)
            return centers
        files = _Files.create(Path(directory), config, overwrite, sync)
        try:
            centers = cls(config, *files.map(config))
            _initialise(centers, progress)
            centers._files = files
            centers.checkpoint()
        except BaseException:
            files.remove()
            raise
        return centers

    @classmethod
    def open(
        cls, directory: Path | str, *, sync: bool = False, progress: Progress | None = None
    ) -> Centers:
        """The centres in a directory as they were at their last checkpoint.

        Args:
            sync: see `create`.
            progress: called with bytes done and in all, where steps have to be undone.

        Raises:
            CheckpointError: where there are none, a file is damaged or not of the size that it
                should have, or the machine went down in the midst of steps without ``sync``.
            BlockingIOError: where another process has them open.
        """
        files, config = _Files.open(Path(directory), sync)
        try:
            centers = cls(config, *files.map(config))
            centers.step, centers.lr, centers._files = files.step, files.lr, files
            files.undo(centers._records, centers.last_step, progress)
        except BaseException:
            files.close()
            raise
        return centers

    def loss(
        self,
        embeddings: Tensor,
        target: Tensor,
        margin: sk.CombinedMargin | None = None,
        *,
        num_sampled: int,
        ignore_index: int = -100,
        **options: Any,
    ) -> Any:
        """The margin softmax over the classes of ``target`` and random others.

        The classes are drawn anew at each step, from the seed and the step's number. Rows are
        caught up first (see `CentersConfig`).

        Args:
            embeddings: (N, D); gets its gradient from autograd.
            target: (N,) or (N, K) int64 labels in [0, C), or ``ignore_index``.
            margin: default `sk.ArcFace()`.
            num_sampled: how many classes take part, in [1, C]; more where the targets are more.
            options: of `sk.margin_cross_entropy` (``target_weight``, ``return_stats``, …).

        Raises:
            RuntimeError: where the gradient of an earlier loss awaits `update`.
            ValueError, TypeError: as `sk.sample_classes` and `sk.margin_cross_entropy`.
            OSError: where the log cannot be written (a full disk); no row was changed.
        """
        self._check_open()
        if self._pending is not None and self._pending[1].grad is not None:
            raise RuntimeError(
                "a gradient awaits update(lr): take the step, or drop it with discard()"
            )
        self.discard()
        with self._timed("sample"):
            class_ids, target = sk.sample_classes(
                target,
                self.config.num_classes,
                num_sampled,
                generator(self.config.seed, "sample", self.step),
                ignore_index=ignore_index,
            )
        if self._files is not None:
            with self._timed("log"):
                self._files.log(class_ids, self._records, self.last_step)
        with self._timed("read"):
            if self.config.catch_up and self.step:
                self._move(class_ids, None, self.step, self.lr)
        weight = self.weight.detach()
        if torch.is_grad_enabled():
            self._pending = class_ids, weight.requires_grad_()
        margin = sk.ArcFace() if margin is None else margin
        return sk.margin_cross_entropy(
            embeddings,
            weight,
            target,
            margin,
            class_ids=class_ids,
            ignore_index=ignore_index,
            **options,
        )

    def update(self, lr: float) -> None:
        """Takes the optimiser's step on the rows of the last `loss`, after its backward pass.

        Raises:
            RuntimeError: without such a gradient.
            FloatingPointError: for a gradient that is not finite; no row was changed by it.
        """
        self._check_open()
        check_number("lr", lr, 0)
        if self._pending is None or self._pending[1].grad is None:
            raise RuntimeError("update needs a gradient: call loss(…).backward() first")
        class_ids, weight = self._pending
        assert weight.grad is not None
        gradient = weight.grad._values()  # (S, D), in the order of class_ids
        with self._timed("update"):
            if not bool(torch.linalg.vector_norm(gradient, torch.inf).isfinite()):
                raise FloatingPointError(
                    f"the centres' gradient is not finite at step {self.step + 1}: no row was "
                    "changed; discard() drops it"
                )
            self._move(class_ids, gradient, self.step + 1, lr)
            if not self.config.catch_up:
                self.last_step.index_fill_(0, class_ids, self.step + 1)
        self.step, self.lr = self.step + 1, lr
        self.discard()

    def discard(self) -> None:
        """Forgets the last `loss`: its rows stay as they were."""
        self._pending = None

    def checkpoint(self) -> None:
        """Makes this step the one that `open` comes back to, flushed to the disk.

        What else a run holds (a network, say) should be written under this step *before*, and what
        was written under the step of the checkpoint before be kept until this returns.

        Raises:
            ValueError: for centres in memory.
            OSError: where the disk fails; the checkpoint before stays whole.
        """
        self._check_open()
        if self._files is None:
            raise ValueError("centres in memory have no checkpoint: create them in a directory")
        self._files.commit(self.config, self.step, self.lr)

    def close(self) -> None:
        """Lets go of all; to open them will undo the steps since the last checkpoint."""
        self.discard()
        if self._files is not None:
            self._files.close()
        self.step = -1
        self._records = self.weight = self.last_step = torch.empty(0)
        self.states = {}

    def remove(self) -> None:
        """Closes the centres and removes their files, and the directory if it was made for them."""
        if self._files is not None:
            self._files.remove()
            self._files = None
        self.close()

    def __enter__(self) -> Centers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.step < 0:
            raise ValueError("these centres are closed: open them again")

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began

    def _move(self, class_ids: Tensor, gradient: Tensor | None, step: int, lr: float) -> None:
        """The optimiser's step on rows; without a gradient only the steps that they missed."""
        config = self.config
        options: dict[str, Any] = {
            "lr": lr,
            "weight_decay": config.weight_decay,
            "step": step,
            "last_step": self.last_step if config.catch_up else None,
            "seed": seeds(config.seed, "rounding", 0) if config.dtype == "bfloat16" else None,
            **self.states,
        }
        if config.optimizer == "adamw":
            options |= {"betas": config.betas, "eps": config.eps}
            sk.row_adamw_(self.weight, gradient, class_ids, **options)
        else:
            options |= {"momentum": config.momentum, "nesterov": config.nesterov}
            sk.row_sgd_(self.weight, gradient, class_ids, **options)


def _initialise(centers: Centers, progress: Progress | None) -> None:
    """Normal values by Philox, whose counter starts anew at each chunk of rows."""
    config = centers.config
    key = seeds(config.seed, "centers", 0)
    chunk = max(1, 2**22 // config.embedding_size)

    def fill(start: int) -> int:
        rows = centers.weight[start : start + chunk]
        bits = np.random.Philox(key=key, counter=[0, 0, 0, start // chunk])
        values = np.random.Generator(bits).standard_normal(tuple(rows.shape), np.float32)
        rows.copy_(torch.from_numpy(values).mul_(config.init_std))
        return len(rows)

    done = 0
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        try:
            for count in pool.map(fill, range(0, config.num_classes, chunk)):
                done += count
                if progress is not None:
                    progress(done, config.num_classes)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _Files:
    """A directory: the state (JSON), records, last steps, and the log of what rows held.

    The log bears the step of the checkpoint that it leads back to; any other is of the past. It is
    a header, then frames, each of some rows: ids, last steps, records. Of a frame that is cut short
    no row was changed.
    """

    HEADER = struct.Struct("<8sqq?40s")  # magic, step, bytes of a record, sync, this machine's boot
    FRAME = struct.Struct("<4sII")  # magic, rows, CRC-32 of their ids and last steps
    MAGIC, FRAME_MAGIC = b"synfundo", b"rows"

    def __init__(self, directory: Path, sync: bool) -> None:
        self.directory, self.sync = directory, sync
        self.step, self.lr = 0, 0.0  # of the last checkpoint
        self._descriptors: dict[str, int] = {}
        self._log: int | None = None
        self._made = False  # the directory, too

    # ---- creating, opening, closing --------------------------------------------------------------

    @classmethod
    def create(cls, directory: Path, config: CentersConfig, overwrite: bool, sync: bool) -> _Files:
        made = not directory.exists()
        entries = [] if made else sorted(directory.iterdir())
        own = [path for path in entries if _is_ours(path)]
        if len(own) < len(entries):
            names = ", ".join([path.name for path in entries if path not in own][:3])
            raise FileExistsError(f"{directory} holds other files: {names}")
        if own and not overwrite:
            raise FileExistsError(f"{directory} holds centres: open them, or overwrite them")
        needed = sum(config.bytes.values())
        disk = os.statvfs(next(p for p in (directory, *directory.absolute().parents) if p.exists()))
        free = disk.f_bavail * disk.f_frsize + sum(path.stat().st_blocks * 512 for path in own)
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"{config.num_classes:,} centres take {needed / 2**30:.2f} GiB (and the log of "
                f"changed rows up to as much), but {free / 2**30:.2f} GiB are free",
                str(directory),
            )
        directory.mkdir(parents=True, exist_ok=True)
        files = cls(directory, sync)
        files._made = made
        files._lock()
        try:
            for path in sorted(own, key=lambda path: path.name != STATE):  # that one first
                if path.name != LOCK:
                    path.unlink()
            for name, size in config.bytes.items():
                descriptor = files._open(name, os.O_CREAT | os.O_EXCL)
                # Taken from the disk now: a full disk under a mapped page would kill the process.
                os.posix_fallocate(descriptor, 0, size)
        except BaseException:
            files.remove()
            raise
        return files

    @classmethod
    def open(cls, directory: Path, sync: bool) -> tuple[_Files, CentersConfig]:
        if not (directory / STATE).is_file():
            raise CheckpointError(
                f"{directory} holds no centres: {STATE} is missing (it is written when they are "
                "complete)"
            )
        files = cls(directory, sync)
        files._lock()
        try:
            config = files._read_state()
            for name, size in config.bytes.items():
                came = os.fstat(files._open(name)).st_size
                if came != size:
                    raise CheckpointError(
                        f"{directory / name} must have {size} bytes, for {config.num_classes} "
                        f"centres of {config.embedding_size} dimensions in {config.dtype} with "
                        f"{len(config.states)} optimiser states, got {came} bytes"
                    )
        except BaseException:
            files.close()
            raise
        return files, config

    def _open(self, name: str, flags: int = 0) -> int:
        path = self.directory / name
        try:
            self._descriptors[name] = os.open(path, os.O_RDWR | flags, 0o666)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
        return self._descriptors[name]

    def _lock(self) -> None:
        """Until it is closed, or its process dies."""
        try:
            fcntl.flock(self._open(LOCK, os.O_CREAT), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise BlockingIOError(
                errno.EWOULDBLOCK, "these centres are open already", str(self.directory)
            ) from None

    def map(self, config: CentersConfig) -> tuple[Tensor, Tensor]:
        """Records (C, width) and last steps (C,)."""
        tensors = []
        for name, dtype in ((ROWS, DTYPES[config.dtype]), (LAST_STEP, torch.int32)):
            mapping = mmap.mmap(self._descriptors[name], config.bytes[name])
            if name == ROWS:
                mapping.madvise(mmap.MADV_RANDOM)  # a row's neighbours are not wanted
            tensors.append(torch.frombuffer(mapping, dtype=dtype))
        return tensors[0].view(config.num_classes, config.width), tensors[1]

    def close(self) -> None:
        self._close_log()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def remove(self) -> None:
        for path in self.directory.iterdir():
            if _is_ours(path):
                path.unlink()
        self.close()
        if self._made:
            self.directory.rmdir()

    # ---- the checkpoint --------------------------------------------------------------------------

    def commit(self, config: CentersConfig, step: int, lr: float) -> None:
        for name in (ROWS, LAST_STEP):
            os.fsync(self._descriptors[name])  # what was written through the mapping, too
        state = {"format": FORMAT, "step": step, "lr": lr, "config": asdict(config)}
        checkpoint.write(self.directory / STATE, json.dumps(state, indent=1))
        self.step, self.lr = step, lr
        self._close_log()
        for path in self.directory.glob("undo-*.bin"):
            path.unlink()

    def _read_state(self) -> CentersConfig:
        path = self.directory / STATE
        try:
            with path.open("rb") as file:
                text = file.read(STATE_BYTES + 1)
            if len(text) > STATE_BYTES:
                raise ValueError(f"it is longer than {STATE_BYTES} bytes")
            state = json.loads(text)
            if not isinstance(state, dict) or state.get("format") != FORMAT:
                came = state.get("format") if isinstance(state, dict) else type(state).__name__
                raise ValueError(f"expected format {FORMAT}, got {came!r}")
            config = CentersConfig.from_json(state["config"])
            step, lr = state["step"], state["lr"]
            check_integer("step", step, 0)
            check_number("step", step, 0, 2**31 - 1)
            check_number("lr", lr, 0)
            self.step, self.lr = step, lr
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        except KeyError as error:
            raise CheckpointError(f"{path} has no {error}") from error
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{path} is not the state of centres: {error}") from error
        return config

    # ---- the log ---------------------------------------------------------------------------------

    @property
    def _log_path(self) -> Path:
        return self.directory / f"undo-{self.step}.bin"

    def log(self, class_ids: Tensor, records: Tensor, last_step: Tensor) -> None:
        """Appends what the rows hold, but for those that a frame holds already."""
        size = records.shape[1] * records.itemsize
        # All pages are asked for before any is waited for.
        for offset in (class_ids * size).tolist():
            os.posix_fadvise(self._descriptors[ROWS], offset, size, os.POSIX_FADV_WILLNEED)
        # The others were moved since the checkpoint.
        class_ids = class_ids[last_step.index_select(0, class_ids) <= self.step]
        if not len(class_ids):
            return
        log = self._open_log(size)
        end = os.lseek(log, 0, os.SEEK_END)
        try:
            for ids in class_ids.split(max(1, FRAME_BYTES // size)):
                head = ids.numpy().tobytes() + last_step.index_select(0, ids).numpy().tobytes()
                _write(log, self.FRAME.pack(self.FRAME_MAGIC, len(ids), zlib.crc32(head)) + head)
                _write(log, records.index_select(0, ids).view(torch.uint8).numpy())
            if self.sync:
                os.fsync(log)
        except BaseException:
            os.ftruncate(log, end)  # nothing may follow a frame that is cut short
            raise

    def _open_log(self, record_bytes: int) -> int:
        if self._log is None:
            header = self.HEADER.pack(self.MAGIC, self.step, record_bytes, self.sync, _boot())
            log = os.open(self._log_path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            try:
                _write(log, header)
                # With or without sync, that rows are being changed is on the disk before they are.
                os.fsync(log)
                checkpoint.sync(self.directory)
            except BaseException:
                os.close(log)
                self._log_path.unlink()
                raise
            self._log = log
        return self._log

    def _close_log(self) -> None:
        if self._log is not None:
            os.close(self._log)
            self._log = None

    def undo(self, records: Tensor, last_step: Tensor, progress: Progress | None) -> None:
        """Puts back what the log holds, and removes it."""
        path = self._log_path
        for other in self.directory.glob("undo-*.bin"):
            if other != path:
                other.unlink()
        if path.exists():
            with path.open("rb") as log:
                frames = list(self._frames(log, records))
                # Backwards: where a row is there twice, the earlier one is the checkpoint's.
                for done, (start, count) in enumerate(reversed(frames), 1):
                    ids, steps, rows = self._read_frame(log, start, count, records)
                    records.index_copy_(0, ids, rows)
                    last_step.index_copy_(0, ids, steps)
                    if progress is not None:
                        progress(done, len(frames))
            for name in (ROWS, LAST_STEP):
                os.fsync(self._descriptors[name])
            path.unlink()

    def _frames(self, log: BinaryIO, records: Tensor) -> Iterator[tuple[int, int]]:
        """Where the whole frames begin, and how many rows they hold."""
        size, record_bytes = os.fstat(log.fileno()).st_size, records.shape[1] * records.itemsize
        if size < self.HEADER.size:
            return
        magic, step, of, sync, boot = self.HEADER.unpack(log.read(self.HEADER.size))
        if (magic, step, of) != (self.MAGIC, self.step, record_bytes):
            raise CheckpointError(
                f"{log.name} is not the log of these centres: expected step {self.step} and "
                f"records of {record_bytes} bytes, got {magic!r}, step {step}, {of} bytes"
            )
        if not sync and boot.rstrip(b"\0") != _boot():
            raise CheckpointError(
                f"{self.directory}: the machine went down between checkpoints, and these centres "
                "were not opened with sync=True: rows may be neither old nor new"
            )
        at = self.HEADER.size
        while at + self.FRAME.size <= size:
            log.seek(at)
            magic, count, _ = self.FRAME.unpack(log.read(self.FRAME.size))
            most = max(1, FRAME_BYTES // record_bytes)
            if magic != self.FRAME_MAGIC or not 1 <= count <= most:
                raise CheckpointError(f"{log.name} is damaged at byte {at}")
            end = at + self.FRAME.size + count * (ID_BYTES + record_bytes)
            if end > size:
                return
            yield at, count
            at = end

    def _read_frame(
        self, log: BinaryIO, start: int, count: int, records: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        log.seek(start)
        _, _, crc = self.FRAME.unpack(log.read(self.FRAME.size))
        head = bytearray(log.read(count * ID_BYTES))
        ids = torch.frombuffer(head, dtype=torch.int64, count=count)
        steps = torch.frombuffer(head, dtype=torch.int32, offset=8 * count)
        rising = bool((ids[1:] > ids[:-1]).all())
        if zlib.crc32(head) != crc or not (rising and ids[0] >= 0 and ids[-1] < len(records)):
            raise CheckpointError(f"{log.name} is damaged at byte {start}")
        rows = bytearray(log.read(count * records.shape[1] * records.itemsize))
        return ids, steps, torch.frombuffer(rows, dtype=records.dtype).view(count, -1)


def _is_ours(path: Path) -> bool:
    return path.name in (STATE, f"{STATE}.part", ROWS, LAST_STEP, LOCK) or (
        path.name.startswith("undo-") and path.suffix == ".bin"
    )


def _write(descriptor: int, data: Any) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _boot() -> bytes:
    """Which start of the machine this is."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
