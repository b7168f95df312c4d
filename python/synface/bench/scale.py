"""A benchmark of training class centers by the million: time, memory, and a loss that falls.

No network takes part. An embedding is its identity's own direction with noise, made when it is
asked for, so that nothing here grows with the number of identities but the centers.
"""

from __future__ import annotations

import contextlib
import json
import signal
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from synface_kernels import _env

from ..common.check import available_memory as available_memory  # public here
from ..common.check import check_integer, check_number
from ..common.files import write_text
from ..common.interrupts import interrupts
from ..common.rng import generator, normals, seeds
from ..optim.centers import Centers, CentersConfig
from ..reporting.plots import ACCENT, INK, figure, save

MEMORY = {"RssAnon": "anonymous", "RssFile": "file-backed", "VmRSS": "in all"}
PHASES = ("sample", "log", "read", "loss and gradient", "update")


@dataclass(frozen=True)
class ScaleConfig:
    """A benchmark: how the centers in ``centers`` are trained.

    Attributes:
        centers: what is trained.
        sample_rate: share of the identities that take part in a step, in (0, 1].
        batch: embeddings in a step.
        working_set: how many identities, drawn at random from all, the embeddings are of; the
            others are negatives only.
        noise: length of what is added to an identity's unit direction, on average; the cosine
            between an embedding and its direction is about 1/√(1 + noise²).
        lr: constant.
    """

    centers: CentersConfig
    sample_rate: float = 0.01
    batch: int = 256
    working_set: int = 4096
    noise: float = 0.75
    lr: float = 0.02

    def __post_init__(self) -> None:
        check_number("sample_rate", self.sample_rate, 0, 1)
        if not self.sample_rate:
            raise ValueError("sample_rate must be in (0, 1], got 0")
        for name in ("batch", "working_set"):
            check_integer(name, getattr(self, name), 1)
        if self.working_set > self.centers.num_classes:
            raise ValueError(
                f"working_set must be at most the {self.centers.num_classes:,} identities, "
                f"got {self.working_set:,}"
            )
        check_number("noise", self.noise, 0)
        check_number("lr", self.lr, 0)

    @property
    def num_sampled(self) -> int:
        return max(1, round(self.sample_rate * self.centers.num_classes))


class Clusters:
    """Embeddings of identities, each a seeded direction with noise; O(batch) time and memory."""

    def __init__(self, config: ScaleConfig) -> None:
        self.config, self._seed = config, config.centers.seed
        draw = np.random.Generator(np.random.Philox(key=seeds(self._seed, "working set", 0)))
        identities = draw.choice(
            config.centers.num_classes, config.working_set, replace=False, shuffle=False
        )
        self.identities = torch.from_numpy(np.sort(identities))  # (working_set,) int64

    def directions(self, identities: Tensor) -> Tensor:
        """(N, D) float32 unit vectors."""
        key, size = seeds(self._seed, "directions", 0), self.config.centers.embedding_size
        values = np.empty((len(identities), size), np.float32)
        for row, identity in zip(values, identities.tolist(), strict=True):
            bits = np.random.Philox(key=key, counter=[0, 0, 0, identity])
            np.random.Generator(bits).standard_normal(out=row, dtype=np.float32)
        return torch.nn.functional.normalize(torch.from_numpy(values))

    def embeddings(self, identities: Tensor, draw: torch.Generator) -> Tensor:
        directions = self.directions(identities)
        noise = normals(directions.shape, draw)
        return directions + noise * (self.config.noise / directions.shape[1] ** 0.5)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Embeddings (N, D) float32 and labels (N,) int64 of a step."""
        draw = generator(self._seed, "batch", step)
        chosen = torch.randint(
            len(self.identities), (self.config.batch,), generator=draw, device="cpu"
        )
        labels = self.identities[chosen]
        return self.embeddings(labels, draw), labels

    def strangers(self) -> tuple[Tensor, Tensor]:
        """A batch of identities outside the working set, where there are any."""
        draw = generator(self._seed, "strangers", 0)
        labels = torch.randint(
            self.config.centers.num_classes, (self.config.batch,), generator=draw, device="cpu"
        )
        labels = labels[~torch.isin(labels, self.identities)]
        return self.embeddings(labels, draw), labels


class MemoryWatch:
    """The largest resident memory while it runs, read from /proc 20 times a second.

    Anonymous memory is the process's own; file-backed memory is what it has mapped of files, which
    the system keeps while nobody else needs the room.
    """

    def __init__(self) -> None:
        self.peak: dict[str, int] = {}
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        status = Path("/proc/self/status")
        while status.exists():
            for line in status.read_text().splitlines():
                name, _, value = line.partition(":")
                if name in MEMORY:
                    kind = MEMORY[name]
                    self.peak[kind] = max(self.peak.get(kind, 0), int(value.split()[0]) * 1024)
            if self._end.wait(0.05):
                break


def _disk() -> dict[str, int]:
    """Bytes that this process has read from and written to disks, where it may know."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/io").read_text().splitlines()
        counts = dict(line.split(": ") for line in lines)
        return {name: int(counts[f"{name}_bytes"]) for name in ("read", "write")}
    return {}


def check_length(steps: int | None, minutes: float | None) -> None:
    """Raises ValueError or TypeError unless just one is given, and can be."""
    if (steps is None) == (minutes is None):
        raise ValueError(f"give steps or minutes, got steps {steps} and minutes {minutes}")
    if steps is not None:
        check_integer("steps", steps, 1)
    if minutes is not None:
        check_number("minutes", minutes, 0)


def run(
    config: ScaleConfig,
    centers: Centers,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    checkpoint_every: int | None = None,
    progress: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Trains ``centers`` on `Clusters`, and returns what was measured, ready for JSON.

    Ctrl-C and SIGTERM end it after the step that it is in; "ended by" names the signal, else None.

    Args:
        centers: made by ``config.centers``.
        steps: up to which step (of all, with those before a checkpoint); minutes: or how long.
        checkpoint_every: steps; only for centers in files.
        progress: gets each step's row of the history.

    Raises:
        ValueError: for other centers, or where neither or both of steps and minutes are given.
        FloatingPointError, OSError: as `Centers.loss` and `Centers.update`.
    """
    if centers.config != config.centers:
        raise ValueError(f"the centers are of {centers.config}, not of {config.centers}")
    check_length(steps, minutes)
    if steps is not None and steps <= centers.step:
        raise ValueError(f"steps must be more than the {centers.step} taken before, got {steps}")
    clusters = Clusters(config)
    history: list[dict[str, Any]] = []
    disk = _disk()
    began = time.perf_counter()
    with MemoryWatch() as memory, interrupts() as interrupted:
        while not interrupted():
            row = _step(config, centers, clusters)
            history.append(row)
            progress(row)
            if checkpoint_every and centers.step % checkpoint_every == 0:
                start = time.perf_counter()
                centers.checkpoint()
                row["checkpoint"] = time.perf_counter() - start
            seconds = time.perf_counter() - began
            if centers.step == steps or (minutes is not None and seconds >= 60 * minutes):
                break
        signum = interrupted()
    written = {name: value - disk[name] for name, value in _disk().items()}
    with torch.no_grad():
        embeddings, labels = clusters.strangers()
        strangers = (
            float(centers.loss(embeddings, labels, num_sampled=config.num_sampled))
            if len(labels)
            else None
        )
    part = max(1, len(history) // 10)
    return {
        "machine": f"{_env.processor()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}",
        "config": asdict(config),
        "ended by": signal.Signals(signum).name if signum else None,
        "steps": len(history),
        "seconds": seconds,
        "steps_per_second": len(history) / seconds,
        "images_per_second": len(history) * config.batch / seconds,
        "median_step_seconds": statistics.median(row["seconds"] for row in history),
        "phases": {name: statistics.fmean(row[name] for row in history) for name in PHASES},
        "centers_bytes": sum(config.centers.bytes.values()),
        "peak_bytes": memory.peak,
        "disk_bytes": written,
        "loss": {
            "first": statistics.fmean(row["loss"] for row in history[:part]),
            "last": statistics.fmean(row["loss"] for row in history[-part:]),
            "steps_averaged": part,
            "identities never trained on": strangers,
        },
        "history": history,
    }


def _step(config: ScaleConfig, centers: Centers, clusters: Clusters) -> dict[str, Any]:
    embeddings, labels = clusters.batch(centers.step)
    began = time.perf_counter()
    loss, stats = centers.loss(
        embeddings.requires_grad_(), labels, num_sampled=config.num_sampled, return_stats=True
    )
    loss.backward()
    centers.update(config.lr)
    seconds = time.perf_counter() - began
    split = {name: centers.seconds.get(name, 0.0) for name in PHASES}
    split["loss and gradient"] = seconds - sum(split.values())
    return {
        "step": centers.step,
        "loss": float(loss.detach()),
        "accuracy": float(stats.top1.float().mean()),
        "seconds": seconds,
        **split,
    }


def summary(result: dict[str, Any]) -> str:
    """What a run measured, in a few lines."""

    def size(name: str, sizes: dict[str, int]) -> str:
        return f"{sizes[name] / 2**30:.2f} GiB" if name in sizes else "not measured"

    loss, peak, disk = result["loss"], result["peak_bytes"], result["disk_bytes"]
    phases = ", ".join(f"{name} {value:.3f}" for name, value in result["phases"].items())
    strangers = loss["identities never trained on"]
    return "\n".join(
        [
            result["machine"],
            f"{result['steps']} steps in {result['seconds']:.1f} s: "
            f"{result['steps_per_second']:.3f} steps/s, "
            f"{result['images_per_second']:.0f} embeddings/s; "
            f"median step {result['median_step_seconds']:.3f} s",
            f"seconds of a step: {phases}",
            f"centers and their state: {result['centers_bytes'] / 2**30:.2f} GiB; peak memory: "
            f"{size('anonymous', peak)} anonymous, {size('file-backed', peak)} file-backed, "
            f"{size('in all', peak)} in all",
            f"disk: {size('read', disk)} read, {size('write', disk)} written",
            f"loss: {loss['first']:.3f} (first {loss['steps_averaged']} steps), "
            f"{loss['last']:.3f} (last {loss['steps_averaged']}); identities never trained on: "
            + ("none" if strangers is None else f"{strangers:.3f}"),
        ]
    )


def write_report(result: dict[str, Any], folder: Path) -> None:
    """Writes scale.json and scale.png: the loss, and what a step's time goes to."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "scale.json", json.dumps(result, indent=1))
    history, centers = result["history"], result["config"]["centers"]
    step = [row["step"] for row in history]
    new, (left, right) = figure(11, 4.4, 1, 2)
    left.plot(step, [row["loss"] for row in history], color=ACCENT)
    left.set_ylabel("loss of the batch", color=ACCENT)
    left.set_ylim(bottom=0)
    accuracy = left.twinx()
    accuracy.plot(step, [row["accuracy"] for row in history], color=INK, linewidth=0.8)
    accuracy.set_ylabel("share nearest to their own center", color=INK)
    accuracy.set_ylim(0, 1.02)
    left.set_title(
        f"{centers['num_classes']:,} × {centers['embedding_size']} {centers['dtype']}, "
        f"{result['config']['working_set']:,} of them seen"
    )
    right.stackplot(
        step, [[row[name] for row in history] for name in PHASES], labels=PHASES, alpha=0.8
    )
    right.set_ylabel("seconds")
    right.set_title(f"Time of a step: {result['steps_per_second']:.2f} steps/s")
    right.legend(frameon=False, fontsize=8, loc="upper right")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
    save(new, folder / "scale.png")
