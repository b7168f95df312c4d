"""Centres as files: memory-mapped, and a log that leads back to the last checkpoint."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .. import checkpoint
from ..check import check_integer, check_number
from ..checkpoint import CheckpointError
from .config import DTYPES, LAST_STEP, ROWS, CentersConfig

FORMAT = 1
STATE, LOCK = "centers.json", "lock"
STATE_BYTES = 2**16  # no longer is the JSON
FRAME_BYTES = 2**24  # of records, at most, in one frame of the log
ID_BYTES = 8 + 4  # a row's id and last step in a frame
Progress = Callable[[int, int], None]  # done, total


class Files:
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
    def create(cls, directory: Path, config: CentersConfig, overwrite: bool, sync: bool) -> Files:
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
    def open(cls, directory: Path, sync: bool) -> tuple[Files, CentersConfig]:
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
