"""Class centers, trained by sampled rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import synface_kernels as sk

from ...common.check import check_number
from ...common.labels import ignored_outside, labels_of
from ...common.rng import generator, seeds
from .checksums import row_checksums
from .config import DTYPES, CentersConfig
from .files import CentersFiles


class Centers:
    """Class centers, (C, D), with their optimizer's state; each step reads and writes some rows.

        with Centers.open("centers") as centers:          # or Centers.create(config, "centers")
            loss = centers.loss(embeddings, labels, num_sampled=100_000)
            loss.backward()
            centers.update(lr=0.1)
            centers.checkpoint()

    The center of an identity and its states are one record, so that a step touches few pages.

    **Crashes.** A step changes rows in place. Before the first change of a row since the last
    checkpoint, its content is appended to an undo log, from which `open` restores it: the last
    checkpoint survives the death of the process at any time. So a checkpoint copies nothing, and
    between checkpoints the files take up to twice their size. With ``sync=True`` it also survives
    a crash of the machine; without, `open` then raises, unless no step was taken since the last
    checkpoint.

    **Corruption.** The files hold a checksum of every row. `loss` verifies rows when they are first
    used, and the first access to `weight`, `states` or `last_step` verifies all rows: a corrupted
    row is an error that names it, never a wrong number. `open` reads no row, unless ``verify`` is
    set.

    **Writes by the caller** to `weight`, `states` or `last_step` are saved by the next checkpoint.
    The first access creates a marker file in the directory: if the process dies, `open` accepts the
    rows unverified, without checksums until the next checkpoint. `close` reads all rows, and
    removes the marker if none has changed since the last checkpoint.

    Attributes:
        config: a `CentersConfig`.
        step: number of steps taken. lr: of the last one; rows catch up with it.
        weight: (C, D) centers, a view of each record's first D values. After an access to it,
            checkpoints compute the checksums of all rows, since the caller may have written to it.
        states: the optimizer's states by name, (C, D) each, views too.
        last_step: (C,) int32: the step up to which a row is current; 0 for one never touched.
        seconds: durations of the last step's phases.

    Memory: in memory, (C, D) times one plus the number of states; with a directory, the page cache
    holds what fits of the files, and 5 bytes per row are held for checksums and flags. In addition,
    for a step of S rows, their gradient (S, D) and the memory of the ops.
    """

    def __init__(self, config: CentersConfig, records: Tensor, last_step: Tensor) -> None:
        """Wrap the tensors of `create` or `open`, which callers use instead."""
        self.config, self.step, self.lr = config, 0, 0.0
        self.seconds: dict[str, float] = {}
        self._records, self._last_step = records, last_step
        self._weight, *states = records.split(config.embedding_size, dim=1)
        self._states = dict(zip(config.states, states, strict=True))
        self._pending: tuple[Tensor, Tensor] | None = None
        self._files: CentersFiles | None = None
        self._exposed = False  # all rows were verified, and the caller may have written to them

    @classmethod
    def create(
        cls,
        config: CentersConfig,
        directory: Path | str | None = None,
        *,
        overwrite: bool = False,
        sync: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> Centers:
        """Return new centers with normal values, the same in memory and in files.

        Args:
            directory: of the files; None: in memory.
            overwrite: replace centers that are in the directory.
            sync: survive a crash of the machine, too: each step then waits until the log is on the
                disk.
            progress: called as progress(rows done, rows in total).

        Raises:
            FileExistsError: for a directory with other files, or with centers unless ``overwrite``.
            OSError: if the disk lacks room, before anything is written or replaced.
        """
        if directory is None:
            shape, dtype = (config.num_classes, config.width), DTYPES[config.dtype]
            records = torch.zeros(shape, dtype=dtype, device="cpu")
            last_step = torch.zeros(config.num_classes, dtype=torch.int32, device="cpu")
            centers = cls(config, records, last_step)
            _initialize(centers, progress, None)
            return centers
        files = CentersFiles.create(Path(directory), config, overwrite, sync)
        try:
            centers = cls(config, files.records, files.last_step)
            _initialize(centers, progress, files.sums)
            centers._files = files
            centers.checkpoint()
        except BaseException:
            files.remove()
            raise
        return centers

    @classmethod
    def open(
        cls,
        directory: Path | str,
        *,
        sync: bool = False,
        progress: Callable[[int, int], None] | None = None,
        verify: bool = False,
    ) -> Centers:
        """Return the centers in a directory, as of their last checkpoint.

        Args:
            sync: see `create`.
            progress: called as progress(done, total) while steps are undone.
            verify: verify the checksums of all rows now, which reads all of the files. False: rows
                are verified when they are first used.

        Raises:
            CheckpointError: if there are none, a file is corrupted or of the wrong size, or the
                machine crashed between checkpoints without ``sync``.
            BlockingIOError: if another process has them open.
        """
        files = CentersFiles.open(Path(directory), sync)
        try:
            centers = cls(files.config, files.records, files.last_step)
            centers.step, centers.lr, centers._files = files.step, files.lr, files
            files.undo(progress)
            if verify:
                centers.verify()
        except BaseException:
            files.close()
            raise
        return centers

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Verify the checksums of all rows, which reads all of the files.

        Centers in memory have no checksums. Nor, until their next checkpoint, have files of an
        earlier version, and those to which the caller may have written.

        Args:
            progress: called as progress(rows done, rows in total).

        Raises:
            CheckpointError: for a corrupted row, naming it.
        """
        self._check_open()
        if self._files is not None:
            self._files.verify(progress)

    @property
    def weight(self) -> Tensor:
        """The (C, D) centers, all rows verified."""
        self._expose()
        return self._weight

    @property
    def states(self) -> dict[str, Tensor]:
        """The optimizer's states by name, (C, D) each, all rows verified."""
        self._expose()
        return self._states

    @property
    def last_step(self) -> Tensor:
        """The (C,) steps up to which rows are current, all rows verified."""
        self._expose()
        return self._last_step

    def _expose(self) -> None:
        """Verify all rows before the first access, and mark that the caller may change them."""
        if not self._exposed and self._files is not None and self.step >= 0:
            self.verify()
            self._files.mark_exposed(self._files.number)
            self._exposed = True

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
        """Return the margin softmax loss over the classes of ``target`` and random others.

        The classes of each step are drawn from the seed and the step. With ``catch_up``, the
        drawn rows first take the steps that they missed (see `CentersConfig`).

        Args:
            embeddings: (N, D) floating, on the CPU.
            target: (N,), (N, 1) or (N, K) integer labels in [0, C), or ``ignore_index``.
            margin: default `sk.ArcFace()`.
            num_sampled: number of classes, in [1, C]; at least every class of ``target`` is used.
            options: of `sk.margin_cross_entropy` (``target_weight``, ``return_stats``, …).

        Returns:
            As `sk.margin_cross_entropy`: the mean loss, a scalar, unless ``reduction`` or
            ``return_stats`` asks for more.

        Memory: as `sk.margin_cross_entropy` with ``class_ids``, and after the backward pass the
        gradient of the S drawn rows, (S, D) in the rows' dtype. Files are read a row at a time.

        Raises:
            RuntimeError: if the gradient of an earlier loss awaits `update`.
            ValueError, TypeError: as `sk.sample_classes` and `sk.margin_cross_entropy`.
            OSError: if the log cannot be written (a full disk, say); no row was changed.
            CheckpointError: for a corrupted row, naming it; no row was changed.

        Source: An et al., "Killing Two Birds with One Stone: Efficient and Robust Training of Face
        Recognition CNNs by Partial FC", CVPR 2022.
        """
        self._check_open()
        if self._pending is not None and self._pending[1].grad is not None:
            raise RuntimeError(
                "a gradient awaits update(lr): take the step, or drop it with discard()"
            )
        self.discard()
        target = labels_of(target, keep_column=options.get("target_weight") is not None)
        target, ignore_index = ignored_outside(target, ignore_index, self.config.num_classes)
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
                self._files.log(class_ids)
        with self._timed("read"):
            if self.config.catch_up and self.step:
                self._move(class_ids, None, self.step, self.lr)
        weight = self._weight.detach()
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
        """Step the rows of the last `loss`, after its backward pass.

        Raises:
            RuntimeError: without a gradient.
            FloatingPointError: for a gradient that is not finite; no row was changed.
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
                    f"the centers' gradient is not finite at step {self.step + 1}: no row was "
                    "changed; discard() drops it"
                )
            self._move(class_ids, gradient, self.step + 1, lr)
            if not self.config.catch_up:
                self._last_step.index_fill_(0, class_ids, self.step + 1)
        self.step, self.lr = self.step + 1, lr
        self.discard()

    def discard(self) -> None:
        """Discard the last `loss` and its gradient, without a step."""
        self._pending = None

    def checkpoint(self) -> None:
        """Write a checkpoint of this step, flushed to the disk, to which `open` returns.

        Save a run's other state (a network, say) under this step *before* the call, and keep the
        one of the previous checkpoint's step until the call returns.

        Raises:
            ValueError: for centers in memory.
            OSError: if the disk fails; the previous checkpoint stays valid.
        """
        self._check_open()
        if self._files is None:
            raise ValueError("centers in memory have no checkpoint: create them in a directory")
        self._files.commit(self.step, self.lr, self._exposed)

    def close(self) -> None:
        """Release the tensors and files; steps since the last checkpoint are lost."""
        self.discard()
        if self._files is not None:
            try:
                if self._exposed and self.step >= 0:
                    self._files.unmark_if_unchanged()
            finally:
                self._files.close()
        self.step = -1
        self._records = self._weight = self._last_step = torch.empty(
            0, dtype=torch.float32, device="cpu"
        )
        self._states = {}

    def remove(self) -> None:
        """Close the centers, and remove their files and the directory if `create` made it."""
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
            raise ValueError("these centers are closed: open them again")

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - began

    def _move(self, class_ids: Tensor, gradient: Tensor | None, step: int, lr: float) -> None:
        """Step rows; without a gradient, apply only the steps that they missed."""
        config = self.config
        options: dict[str, Any] = {
            "lr": lr,
            "weight_decay": config.weight_decay,
            "step": step,
            "last_step": self._last_step if config.catch_up else None,
            "seed": seeds(config.seed, "rounding", 0) if config.dtype == "bfloat16" else None,
            **self._states,
        }
        if config.optimizer == "adamw":
            options |= {"betas": config.betas, "eps": config.eps}
            sk.row_adamw_(self._weight, gradient, class_ids, **options)
        else:
            options |= {"momentum": config.momentum, "nesterov": config.nesterov}
            sk.row_sgd_(self._weight, gradient, class_ids, **options)


def _initialize(
    centers: Centers, progress: Callable[[int, int], None] | None, sums: NDArray[np.uint32] | None
) -> None:
    """Draw normal values by Philox, by chunks of rows, and write their checksums to ``sums``.

    Each chunk has its own counter, so that the values do not depend on the number of threads.
    """
    config = centers.config
    key = seeds(config.seed, "centers", 0)
    chunk = max(1, 2**22 // config.embedding_size)

    def fill(start: int) -> int:
        rows = centers._weight[start : start + chunk]
        bits = np.random.Philox(key=key, counter=[0, 0, 0, start // chunk])
        values = np.random.Generator(bits).standard_normal(tuple(rows.shape), np.float32)
        rows.copy_(torch.from_numpy(values).mul_(config.init_std))
        if sums is not None:
            part = slice(start, start + len(rows))
            sums[part] = row_checksums(
                np.arange(start, part.stop), centers._last_step[part], centers._records[part]
            )
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
