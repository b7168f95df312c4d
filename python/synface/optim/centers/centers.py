"""Class centers, trained by sampled rows."""

from __future__ import annotations

import time
from collections.abc import Iterator
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
from ...common.labels import labels_of
from ...common.rng import generator, seeds
from .checksums import row_checksums
from .config import DTYPES, CentersConfig
from .files import Files, Progress


class Centers:
    """(C, D) class centers with their optimizer's state, of which each step touches some rows.

        with Centers.open("centers") as centers:          # or Centers.create(config, "centers")
            loss = centers.loss(embeddings, labels, num_sampled=100_000)
            loss.backward()
            centers.update(lr=0.1)
            centers.checkpoint()

    The center of an identity and its state are one record, so that a step touches as few pages as
    it can.

    **What a kill leaves.** A step changes rows in place; before it does, what a row held at the
    last checkpoint is appended to a log, once per row. `open` puts it back: whenever the process
    dies, the last checkpoint is whole. So a checkpoint copies nothing, and between checkpoints the
    files take up to twice their size. With ``sync=True`` this holds where the machine goes down,
    too; without, `open` then says that the rows cannot be trusted, unless no step was taken since
    the last checkpoint.

    **What damage does.** Files hold a checksum of every row. `loss` compares the rows that it
    uses for the first time, and the first look at `weight`, `states` or `last_step`
    compares all rows: a damaged row is an error that names it, never a wrong number. `open` itself
    reads no row, unless ``verify`` is set.

    **What is written by hand** into `weight`, `states` or `last_step` lasts from the next
    checkpoint on. Before they are handed out, a file in the directory says so: should the process
    die, `open` trusts the rows as they are, without checksums until the next checkpoint. `close`
    removes that file where no row has changed since the last checkpoint, which reads all rows.

    Attributes:
        config: a `CentersConfig`.
        step: how many steps were taken. lr: of the last one; rows catch up with it.
        weight: (C, D) centers; a view of each record's first D numbers. Whoever has looked at it
            may have written to it: checkpoints then compute the checksums of all rows.
        states: the optimizer's state by name, (C, D) each; views too.
        last_step: (C,) int32: the step after which a row is up to date; 0 for one never touched.
        seconds: what the last step spent on what, in seconds.

    Memory: in memory (C, D) times one plus the number of states; with a directory, the operating
    system keeps of the files what fits, and 5 bytes per row are held for checksums and what was
    logged. Besides, per step of S rows, their gradient (S, D) and what the ops say.
    """

    def __init__(self, config: CentersConfig, records: Tensor, last_step: Tensor) -> None:
        """Use `create` or `open`."""
        self.config, self.step, self.lr = config, 0, 0.0
        self.seconds: dict[str, float] = {}
        self._records, self._last_step = records, last_step
        self._weight, *states = records.split(config.embedding_size, dim=1)
        self._states = dict(zip(config.states, states, strict=True))
        self._pending: tuple[Tensor, Tensor] | None = None
        self._files: Files | None = None
        self._shown = False  # all rows were verified, and may since have been written to

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
        """New centers with normal values, drawn chunk by chunk: the same in memory and in files.

        Args:
            directory: of the files; None: in memory.
            overwrite: replace centers that are in the directory.
            sync: survive that the machine goes down, not only the process: each step then waits for
                the log to be on the disk.
            progress: called with rows done and in all.

        Raises:
            FileExistsError: for a directory that holds anything, or without ``overwrite`` centers.
            OSError: where the disk has not enough room, before anything is written or replaced.
        """
        if directory is None:
            records = torch.zeros(
                config.num_classes, config.width, dtype=DTYPES[config.dtype], device="cpu"
            )
            centers = cls(
                config, records, torch.zeros(config.num_classes, dtype=torch.int32, device="cpu")
            )
            _initialize(centers, progress, None)
            return centers
        files = Files.create(Path(directory), config, overwrite, sync)
        try:
            centers = cls(config, *files.map(config))
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
        progress: Progress | None = None,
        verify: bool = False,
    ) -> Centers:
        """The centers in a directory as they were at their last checkpoint.

        Args:
            sync: see `create`.
            progress: called with what is done and in all, where steps have to be undone.
            verify: compare all rows with their checksums now, which reads all of the files. Else
                rows are compared when they are first used.

        Raises:
            CheckpointError: where there are none, a file is damaged or not of the size that it
                should have, or the machine went down in the midst of steps without ``sync``.
            BlockingIOError: where another process has them open.
        """
        files, config = Files.open(Path(directory), sync)
        try:
            centers = cls(config, *files.map(config))
            centers.step, centers.lr, centers._files = files.step, files.lr, files
            files.undo(centers._records, centers._last_step, progress)
            if verify:
                centers.verify()
        except BaseException:
            files.close()
            raise
        return centers

    def verify(self, progress: Progress | None = None) -> None:
        """Compares all rows with their checksums, which reads all of the files.

        Nothing to do for centers in memory, and, until their next checkpoint, for files of an
        earlier version and those that may have been written to by hand: they have no checksums.

        Args:
            progress: called with rows done and in all.

        Raises:
            CheckpointError: for a damaged row, naming it.
        """
        self._check_open()
        if self._files is not None:
            self._files.verify(self._records, self._last_step, progress)

    @property
    def weight(self) -> Tensor:
        """The (C, D) centers, all rows verified."""
        self._show()
        return self._weight

    @property
    def states(self) -> dict[str, Tensor]:
        """The optimizer's state by name, (C, D) each, all rows verified."""
        self._show()
        return self._states

    @property
    def last_step(self) -> Tensor:
        """The (C,) steps after which rows are up to date, all rows verified."""
        self._show()
        return self._last_step

    def _show(self) -> None:
        """Verifies all rows before the first look at them, and notes that they may change."""
        if not self._shown and self._files is not None and self.step >= 0:
            self.verify()
            self._files.mark_shown(self._files.number)
            self._shown = True

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

        The classes are drawn anew at each step, from the seed and the step's number. Rows are
        caught up first (see `CentersConfig`).

        Args:
            embeddings: (N, D) floating, on the CPU; gets its gradient from autograd.
            target: (N,), (N, 1) or (N, K) integer labels in [0, C), or ``ignore_index``.
            margin: default `sk.ArcFace()`.
            num_sampled: how many classes take part, in [1, C]; more where the targets are more.
            options: of `sk.margin_cross_entropy` (``target_weight``, ``return_stats``, …).

        Returns:
            As `sk.margin_cross_entropy`: the mean loss, a scalar, unless ``reduction`` or
            ``return_stats`` asks for more.

        Memory: as `sk.margin_cross_entropy` with ``class_ids``, and after the backward pass the
        gradient of the S drawn rows, (S, D) in the rows' dtype. Files are read a row at a time.

        Raises:
            RuntimeError: where the gradient of an earlier loss awaits `update`.
            ValueError, TypeError: as `sk.sample_classes` and `sk.margin_cross_entropy`.
            OSError: where the log cannot be written (a full disk); no row was changed.
            CheckpointError: where a row is damaged, naming it; no row was changed.

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
                self._files.log(class_ids, self._records, self._last_step)
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
        """Takes the optimizer's step on the rows of the last `loss`, after its backward pass.

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
                    f"the centers' gradient is not finite at step {self.step + 1}: no row was "
                    "changed; discard() drops it"
                )
            self._move(class_ids, gradient, self.step + 1, lr)
            if not self.config.catch_up:
                self._last_step.index_fill_(0, class_ids, self.step + 1)
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
            ValueError: for centers in memory.
            OSError: where the disk fails; the checkpoint before stays whole.
        """
        self._check_open()
        if self._files is None:
            raise ValueError("centers in memory have no checkpoint: create them in a directory")
        self._files.commit(
            self.config, self.step, self.lr, self._records, self._last_step, self._shown
        )

    def close(self) -> None:
        """Lets go of all; to open them will undo the steps since the last checkpoint."""
        self.discard()
        if self._files is not None:
            try:
                if self._shown and self.step >= 0:
                    self._files.unmark_if_same(self._records, self._last_step)
            finally:
                self._files.close()
        self.step = -1
        self._records = self._weight = self._last_step = torch.empty(
            0, dtype=torch.float32, device="cpu"
        )
        self._states = {}

    def remove(self) -> None:
        """Closes the centers and removes their files, and the directory if it was made for them."""
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
        """The optimizer's step on rows; without a gradient only the steps that they missed."""
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
    centers: Centers, progress: Progress | None, sums: NDArray[np.uint32] | None
) -> None:
    """Normal values by Philox, whose counter starts anew at each chunk of rows; their checksums
    go into ``sums``.
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
