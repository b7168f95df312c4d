"""Class centers in memory-mapped files, with an undo log back to the last checkpoint."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...common.check import check_integer, check_memory, check_number
from ...common.files import CheckpointError, checksum, read_state, sealed, sync, verify, write_text
from .checksums import row_checksums
from .config import DTYPES, LAST_STEP, ROWS, CentersConfig

FORMAT = 2
EARLIER = 1  # without checksums
STATE, LOCK = "centers.json", "lock"
NUMBERED = ("undo-", "sums-", "shown-")  # prefixes of one checkpoint's files
STATE_BYTES = 2**16  # an upper bound of the JSON's size
FRAME_BYTES = 2**24  # of records, at most, in one frame of the log
ID_BYTES = 8 + 4  # of a row's index and last step in a frame
CHUNK_BYTES = 2**19  # of records whose checksums are computed at once, to stay in the cache
# Flags of a row: its content is in the log; it was verified, or written here.
LOGGED, TRUSTED = 1, 2


class CentersFiles:
    """A directory with the state (JSON), records, last steps, checksums and the undo log.

    The names of checksums and log hold the number of their checkpoint; those with another number
    are obsolete. The log is a header, then frames of some rows each: indices, last steps, records.
    The rows of a truncated last frame were not changed. An empty marker file with the same number
    tells that the caller may have written to the rows, so that their checksums may be invalid.

    Attributes:
        config: of the centers. records: (C, width) and last_step: (C,) int32, mapped.
        step, lr: of the last checkpoint. number: count of checkpoints before it.
        sums: (C,) uint32, each row's checksum as of the last checkpoint; None if there are none,
            or no valid ones.
    """

    HEADER = struct.Struct("<8sqq?40s")  # magic, number, bytes of a record, sync, boot id
    FRAME = struct.Struct("<4sII")  # magic, rows, CRC-32 of their indices and last steps
    MAGIC, FRAME_MAGIC = b"synfundo", b"rows"

    config: CentersConfig
    records: Tensor
    last_step: Tensor

    def __init__(self, directory: Path, sync: bool) -> None:
        self.directory, self.sync = directory, sync
        self.step, self.lr, self.number = 0, 0.0, 0
        self.sums: NDArray[np.uint32] | None = None
        self._flags = torch.empty(0, dtype=torch.uint8, device="cpu")  # (C,)
        self._descriptors: dict[str, int] = {}
        self._log: int | None = None
        self._made = False  # whether `create` made the directory

    # ---- creating, opening, closing --------------------------------------------------------------

    @classmethod
    def create(
        cls, directory: Path, config: CentersConfig, overwrite: bool, sync: bool
    ) -> CentersFiles:
        """Return files for new centers, with room on the disk; see `Centers.create`."""
        made = not directory.exists()
        entries = [] if made else sorted(directory.iterdir())
        own = [path for path in entries if _is_ours(path)]
        if len(own) < len(entries):
            names = ", ".join([path.name for path in entries if path not in own][:3])
            raise FileExistsError(f"{directory} holds other files: {names}")
        if own and not overwrite:
            raise FileExistsError(f"{directory} holds centers: open them, or overwrite them")
        needed = sum(config.bytes.values()) + 2 * 4 * config.num_classes  # two sets of checksums
        there = next(p for p in (directory, *directory.absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free + sum(path.stat().st_blocks * 512 for path in own)
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"{config.num_classes:,} centers take {needed / 2**30:.2f} GiB (and the log of "
                f"changed rows up to as much), but {free / 2**30:.2f} GiB are free",
                str(directory),
            )
        directory.mkdir(parents=True, exist_ok=True)
        files = cls(directory, sync)
        files.config, files._made = config, made
        files._lock()
        try:
            for path in sorted(own, key=lambda path: path.name != STATE):  # the state first
                if path.name != LOCK:
                    path.unlink()
            for name, size in config.bytes.items():
                descriptor = files._open(name, os.O_CREAT | os.O_EXCL)
                # Allocate now: a full disk under a mapped page would kill the process.
                os.posix_fallocate(descriptor, 0, size)
            files._map()
            files.sums = np.zeros(config.num_classes, np.uint32)
            files.number = -1
            files._flags = torch.full(
                (config.num_classes,), TRUSTED, dtype=torch.uint8, device="cpu"
            )
        except BaseException:
            files.remove()
            raise
        return files

    @classmethod
    def open(cls, directory: Path, sync: bool) -> CentersFiles:
        """Return the files in a directory; see `Centers.open`."""
        if not (directory / STATE).is_file():
            raise CheckpointError(
                f"{directory} holds no centers: {STATE} is missing (it is written when they are "
                "complete)"
            )
        files = cls(directory, sync)
        files._lock()
        try:
            crc = files._read_state()
            config = files.config
            for name, size in config.bytes.items():
                came = os.fstat(files._open(name)).st_size
                if came != size:
                    raise CheckpointError(
                        f"{directory / name} must have {size} bytes, for {config.num_classes} "
                        f"centers of {config.embedding_size} dimensions in {config.dtype} with "
                        f"{len(config.states)} optimizer states, got {came} bytes"
                    )
            check_memory(f"{directory}: the checksums", 5 * config.num_classes)
            if crc is not None and not files._marker(files.number).exists():
                files.sums = files._read_sums(crc)
            files._flags = torch.zeros(config.num_classes, dtype=torch.uint8, device="cpu")
            files._map()
        except BaseException:
            files.close()
            raise
        return files

    def _open(self, name: str, flags: int = 0) -> int:
        path = self.directory / name
        try:
            self._descriptors[name] = os.open(path, os.O_RDWR | flags, 0o666)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be opened: {error.strerror}") from error
        return self._descriptors[name]

    def _lock(self) -> None:
        """Lock the directory until `close`, or the end of the process."""
        try:
            fcntl.flock(self._open(LOCK, os.O_CREAT), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise BlockingIOError(
                errno.EWOULDBLOCK, "these centers are open already", str(self.directory)
            ) from None

    def _map(self) -> None:
        rows, steps = (
            mmap.mmap(self._descriptors[name], self.config.bytes[name])
            for name in (ROWS, LAST_STEP)
        )
        rows.madvise(mmap.MADV_RANDOM)  # no read-ahead of a row's neighbors
        records = torch.frombuffer(rows, dtype=DTYPES[self.config.dtype])
        self.records = records.view(self.config.num_classes, self.config.width)
        self.last_step = torch.frombuffer(steps, dtype=torch.int32)

    def close(self) -> None:
        """Close all files, and release the tensors."""
        self._close_log()
        self.records = self.last_step = torch.empty(0, dtype=torch.int32, device="cpu")
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def remove(self) -> None:
        """Close and remove all files, and the directory if `create` made it."""
        for path in self.directory.iterdir():
            if _is_ours(path):
                path.unlink()
        self.close()
        if self._made:
            self.directory.rmdir()

    # ---- the checkpoint --------------------------------------------------------------------------

    def commit(self, step: int, lr: float, everything: bool) -> None:
        """Make this step the one that `open` returns to.

        Args:
            everything: compute the checksums of all rows, not only of those in the log.
        """
        sums = self.sums
        changed: Tensor | None = self._flags.bitwise_and(LOGGED).nonzero()[:, 0]
        if everything or sums is None:
            changed, sums = None, np.empty(self.config.num_classes, np.uint32)
        for part, computed in self._computed(changed):
            sums[part] = computed
        number = self.number + 1
        path = self._sums_path(number)
        sums.tofile(path)
        sync(path)
        if everything:
            self.mark_exposed(number)  # the caller may write to its view again
        for name in (ROWS, LAST_STEP):
            os.fsync(self._descriptors[name])  # writes through the mapping, too
        state = {
            "format": FORMAT,
            "step": step,
            "lr": lr,
            "number": number,
            "sums_crc32": checksum(path),
            "config": asdict(self.config),
        }
        write_text(self.directory / STATE, sealed(state))
        # Not earlier: if this failed, rows are compared with the last checkpoint's checksums.
        self.sums = sums
        self.step, self.lr, self.number = step, lr, number
        self._flags.bitwise_and_(TRUSTED)
        self._close_log()
        self._remove_obsolete()

    def _remove_obsolete(self) -> None:
        """Remove logs, checksums and markers of other checkpoints."""
        present = (self._log_path, self._sums_path(self.number), self._marker(self.number))
        for path in self.directory.iterdir():
            if _is_numbered(path) and path not in present:
                path.unlink()

    def _read_state(self) -> str | None:
        """Read the configuration and step; return the CRC-32 of the checksums if there are any."""
        path = self.directory / STATE
        state = read_state(path, FORMAT, EARLIER, most=STATE_BYTES)
        try:
            self.config = CentersConfig.from_json(state["config"])
            step, lr = state["step"], state["lr"]
            check_integer("step", step, 0)
            check_number("step", step, 0, 2**31 - 1)
            check_number("lr", lr, 0)
            self.step, self.lr, self.number = step, lr, step
            if state["format"] == EARLIER and "number" not in state:
                return None
            check_integer("number", state["number"], 0)
            check_number("number", state["number"], 0, 2**62)
            self.number = state["number"]
            return str(state["sums_crc32"])
        except KeyError as error:
            raise CheckpointError(f"{path} has no {error}") from error
        except (ValueError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{path} is not the state of centers: {error}") from error

    # ---- rows to which the caller may have written -----------------------------------------------

    def _marker(self, number: int) -> Path:
        return self.directory / f"shown-{number}.bin"

    def mark_exposed(self, number: int) -> None:
        """Mark on the disk that rows may differ from a checkpoint's checksums."""
        self._marker(number).touch()
        sync(self.directory)

    def unmark_if_unchanged(self) -> None:
        """Remove the marker if all rows are those of the last checkpoint."""
        if self.sums is not None and self._log is None:
            with contextlib.suppress(CheckpointError):
                self.verify()
                self._marker(self.number).unlink()

    # ---- checksums -------------------------------------------------------------------------------

    def _sums_path(self, number: int) -> Path:
        return self.directory / f"sums-{number}.bin"

    def _read_sums(self, crc: str) -> NDArray[np.uint32]:
        path, size = self._sums_path(self.number), 4 * self.config.num_classes
        try:
            if path.stat().st_size != size:
                raise CheckpointError(
                    f"{path} must have {size} bytes, got {path.stat().st_size} bytes"
                )
            verify(path, crc)
            return np.fromfile(path, np.uint32)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Verify the checksums of all rows that did not change since the checkpoint.

        Raises:
            CheckpointError: naming the first row that differs.
        """
        if self.sums is not None:
            for part, sums in self._computed(None):
                unchanged = self._flags[part].numpy() & LOGGED == 0
                self._compare(np.arange(part.start, part.stop), sums, unchanged)
                if progress is not None:
                    progress(part.stop, len(self.records))
            self._flags.bitwise_or_(TRUSTED)

    def _compare(self, ids: NDArray[np.int64], sums: NDArray[np.uint32], which: Any = True) -> None:
        assert self.sums is not None
        wrong = (sums != self.sums[ids]) & which
        if wrong.any():
            raise CheckpointError(
                f"{self.directory / ROWS} (or {LAST_STEP} beside it) is damaged: row "
                f"{ids[wrong][0]} of {len(self.sums)} does not match its checksum; restore a copy "
                "of the folder"
            )

    def _computed(self, ids: Tensor | None) -> Iterator[tuple[Any, NDArray[np.uint32]]]:
        """Yield chunks of rows, as indices or a slice, with their checksums; multithreaded."""
        records, last_step, size = self.records, self.last_step, self.config.record_bytes
        count = len(records) if ids is None else len(ids)
        most = max(1, CHUNK_BYTES // size)

        def compute(start: int) -> tuple[Any, NDArray[np.uint32]]:
            stop = min(start + most, count)
            if ids is None:
                self._read_ahead(start, 4 * most, size)
                part = slice(start, stop)
                rows, steps, names = records[part], last_step[part], np.arange(start, stop)
                return part, row_checksums(names, steps, rows)
            chunk = ids[start:stop]
            first, last = int(chunk[0]), int(chunk[-1])
            if last - first < 8 * len(chunk):
                self._read_ahead(first, last - first + 1, size)
            else:
                for row in chunk.tolist():
                    self._read_ahead(row, 1, size)
            rows, steps = records.index_select(0, chunk), last_step.index_select(0, chunk)
            return chunk.numpy(), row_checksums(chunk.numpy(), steps, rows)

        starts = range(0, count, most)
        threads = min(torch.get_num_threads(), len(starts))
        if threads < 2:
            yield from map(compute, starts)
            return
        with ThreadPoolExecutor(threads) as pool:
            for batch in range(0, len(starts), 1024):  # bounds the results in memory
                yield from pool.map(compute, starts[batch : batch + 1024])

    def _read_ahead(self, row: int, count: int, size: int) -> None:
        """Start reading rows into the page cache, since the mapping does not read ahead."""
        os.posix_fadvise(self._descriptors[ROWS], row * size, count * size, os.POSIX_FADV_WILLNEED)

    # ---- the log ---------------------------------------------------------------------------------

    @property
    def _log_path(self) -> Path:
        return self.directory / f"undo-{self.number}.bin"

    def log(self, class_ids: Tensor) -> None:
        """Append the rows' content to the log, except of rows that it holds already.

        Raises:
            CheckpointError: for a row that is first used now, and is corrupted.
        """
        size = self.config.record_bytes
        # Request all pages before waiting for any.
        for row in class_ids.tolist():
            self._read_ahead(row, 1, size)
        new = class_ids[self._flags[class_ids].bitwise_and(LOGGED) == 0]
        if not len(new):
            return
        log = self._open_log()
        end = os.lseek(log, 0, os.SEEK_END)
        try:
            for ids in new.split(max(1, FRAME_BYTES // size)):
                steps, rows = (x.index_select(0, ids) for x in (self.last_step, self.records))
                if self.sums is not None:
                    unsure = self._flags[ids].bitwise_and(TRUSTED).logical_not()
                    some = ids[unsure].numpy()
                    self._compare(some, row_checksums(some, steps[unsure], rows[unsure]))
                head = ids.numpy().tobytes() + steps.numpy().tobytes()
                _write(log, self.FRAME.pack(self.FRAME_MAGIC, len(ids), zlib.crc32(head)) + head)
                _write(log, rows.view(torch.uint8).numpy())
            if self.sync:
                os.fsync(log)
        except BaseException:
            os.ftruncate(log, end)  # nothing may follow a truncated frame
            raise
        self._flags.index_fill_(0, new, LOGGED | TRUSTED)

    def _open_log(self) -> int:
        if self._log is None:
            size = self.config.record_bytes
            header = self.HEADER.pack(self.MAGIC, self.number, size, self.sync, _boot())
            log = os.open(self._log_path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            try:
                _write(log, header)
                # The log's existence is flushed before any row changes, with or without sync.
                os.fsync(log)
                sync(self.directory)
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

    def undo(self, progress: Callable[[int, int], None] | None) -> None:
        """Restore the rows in the log, and remove it."""
        path = self._log_path
        self._remove_obsolete()
        if path.exists():
            with path.open("rb") as log:
                frames = list(self._frames(log))
                # Backwards: if a row is logged twice, the earlier entry is the checkpoint's.
                for done, (start, count) in enumerate(reversed(frames), 1):
                    ids, steps, rows = self._read_frame(log, start, count)
                    self.records.index_copy_(0, ids, rows)
                    self.last_step.index_copy_(0, ids, steps)
                    if progress is not None:
                        progress(done, len(frames))
            for name in (ROWS, LAST_STEP):
                os.fsync(self._descriptors[name])
            path.unlink()

    def _frames(self, log: BinaryIO) -> Iterator[tuple[int, int]]:
        """Yield each complete frame's offset and number of rows."""
        size, record_bytes = os.fstat(log.fileno()).st_size, self.config.record_bytes
        if size < self.HEADER.size:
            return
        magic, number, of, sync, boot = self.HEADER.unpack(log.read(self.HEADER.size))
        if (magic, number, of) != (self.MAGIC, self.number, record_bytes):
            raise CheckpointError(
                f"{log.name} is not the log of these centers: expected number {self.number} and "
                f"records of {record_bytes} bytes, got {magic!r}, number {number}, {of} bytes"
            )
        if not sync and boot.rstrip(b"\0") != _boot():
            raise CheckpointError(
                f"{log.name}: the machine crashed between checkpoints, and these centers "
                "were not opened with sync=True: rows may be partly written"
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

    def _read_frame(self, log: BinaryIO, start: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        log.seek(start)
        _, _, crc = self.FRAME.unpack(log.read(self.FRAME.size))
        head = bytearray(log.read(count * ID_BYTES))
        ids = torch.frombuffer(head, dtype=torch.int64, count=count)
        steps = torch.frombuffer(head, dtype=torch.int32, offset=8 * count)
        rising = bool((ids[1:] > ids[:-1]).all())
        if zlib.crc32(head) != crc or not (rising and ids[0] >= 0 and ids[-1] < len(self.records)):
            raise CheckpointError(f"{log.name} is damaged at byte {start}")
        content = bytearray(log.read(count * self.config.record_bytes))
        rows = torch.frombuffer(content, dtype=self.records.dtype).view(count, -1)
        if self.sums is not None:  # the log holds the checkpoint's rows
            wrong = row_checksums(ids.numpy(), steps, rows) != self.sums[ids.numpy()]
            if wrong.any():
                raise CheckpointError(
                    f"{log.name} is damaged: row {int(ids[int(wrong.argmax())])}, in the frame at "
                    f"byte {start}, does not match its checksum"
                )
        return ids, steps, rows


def _is_ours(path: Path) -> bool:
    return _is_numbered(path) or path.name in (STATE, f"{STATE}.part", ROWS, LAST_STEP, LOCK)


def _is_numbered(path: Path) -> bool:
    return path.name.startswith(NUMBERED) and path.suffix == ".bin"


def _write(descriptor: int, data: Any) -> None:
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _boot() -> bytes:
    """Return the id of the machine's current boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_bytes().strip()
