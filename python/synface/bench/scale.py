"""A benchmark of training millions of class centers: time, memory and loss.

There is no network. An embedding is its identity's random direction plus noise, generated on
demand, so that only the centers' memory grows with the number of identities.
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
from ..common.check import check_integer, check_integers, check_number
from ..common.files import write_text
from ..common.interrupts import interrupts
from ..common.rng import generator, normals, seeds
from ..optim.centers import Centers, CentersConfig
from ..reporting.plots import colors, figure, finish, loss_and_accuracy, save, styled

MEMORY = {"RssAnon": "anonymous", "RssFile": "file-backed", "VmRSS": "in all"}
PHASES = ("sample", "log", "read", "loss and gradient", "update")


@dataclass(frozen=True)
class ScaleConfig:
    """The settings of the benchmark.

    Attributes:
        centers: configuration of the trained centers.
        sample_rate: share of the identities that are sampled in a step, in (0, 1].
        batch: embeddings in a step.
        working_set: number of random identities that have embeddings; the others are negatives
            only.
        noise: mean length of the noise that is added to an identity's unit direction; the cosine
            between an embedding and its direction is about 1/√(1 + noise²).
        lr: constant learning rate.
    """

    centers: CentersConfig
    sample_rate: float = 0.01
    batch: int = 256
    working_set: int = 4096
    noise: float = 0.75
    lr: float = 0.02

    def __post_init__(self) -> None:
        check_number("sample_rate", self.sample_rate, 0, 1, above=True)
        check_integers(self, batch=1, working_set=1)
        if self.working_set > self.centers.num_classes:
            raise ValueError(
                f"working_set must be at most the {self.centers.num_classes:,} identities, "
                f"got {self.working_set:,}"
            )
        check_number("noise", self.noise, 0)
        check_number("lr", self.lr, 0)

    @property
    def num_sampled(self) -> int:
        """Number of classes in a step."""
        return max(1, round(self.sample_rate * self.centers.num_classes))


class Clusters:
    """Embeddings of identities, seeded directions with noise, in O(batch) time and memory."""

    def __init__(self, config: ScaleConfig) -> None:
        self.config, self._seed = config, config.centers.seed
        draw = np.random.Generator(np.random.Philox(key=seeds(self._seed, "working set", 0)))
        identities = draw.choice(
            config.centers.num_classes, config.working_set, replace=False, shuffle=False
        )
        self.identities = torch.from_numpy(np.sort(identities))  # (working_set,) int64

    def directions(self, identities: Tensor) -> Tensor:
        """Return the identities' directions, (N, D) float32 unit vectors."""
        key, size = seeds(self._seed, "directions", 0), self.config.centers.embedding_size
        values = np.empty((len(identities), size), np.float32)
        for row, identity in zip(values, identities.tolist(), strict=True):
            bits = np.random.Philox(key=key, counter=[0, 0, 0, identity])
            np.random.Generator(bits).standard_normal(out=row, dtype=np.float32)
        return torch.nn.functional.normalize(torch.from_numpy(values))

    def embeddings(self, identities: Tensor, draw: torch.Generator) -> Tensor:
        """Return the identities' directions with noise, (N, D) float32."""
        directions = self.directions(identities)
        noise = normals(directions.shape, draw)
        return directions + noise * (self.config.noise / directions.shape[1] ** 0.5)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return a step's embeddings (N, D) float32 and labels (N,) int64."""
        draw = generator(self._seed, "batch", step)
        chosen = torch.randint(
            len(self.identities), (self.config.batch,), generator=draw, device="cpu"
        )
        labels = self.identities[chosen]
        return self.embeddings(labels, draw), labels

    def strangers(self) -> tuple[Tensor, Tensor]:
        """Return a batch of identities outside the working set, if there are any."""
        draw = generator(self._seed, "strangers", 0)
        labels = torch.randint(
            self.config.centers.num_classes, (self.config.batch,), generator=draw, device="cpu"
        )
        labels = labels[~torch.isin(labels, self.identities)]
        return self.embeddings(labels, draw), labels


class MemoryWatch:
    """A monitor of peak resident memory, which reads /proc 20 times a second.

    Anonymous memory is the process's own; file-backed memory is that of mapped files, which the
    system evicts when other memory is needed.
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
    """Return the bytes that this process read from and wrote to disks, if the system tells."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/io").read_text().splitlines()
        counts = dict(line.split(": ") for line in lines)
        return {name: int(counts[f"{name}_bytes"]) for name in ("read", "write")}
    return {}


def check_length(steps: int | None, minutes: float | None) -> None:
    """Raise ValueError or TypeError unless exactly one is given, and valid."""
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
    """Train ``centers`` on `Clusters`, and return the measurements, ready for JSON.

    Ctrl-C and SIGTERM end it after the current step; "ended by" is the signal's name, or None.

    Args:
        centers: of the configuration ``config.centers``.
        steps: last step, counted from the centers' first. minutes: the duration, instead of
            ``steps``.
        checkpoint_every: in steps; only for centers in files.
        progress: called with each step's row of the history.

    Raises:
        ValueError: for other centers, or unless exactly one of steps and minutes is given.
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
    """Return a run's measurements as a few lines of text."""

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


@styled()
def write_report(result: dict[str, Any], folder: Path) -> None:
    """Write scale.json, and scale.png with the loss and the duration of a step's phases."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "scale.json", json.dumps(result, indent=1))
    history, centers = result["history"], result["config"]["centers"]
    new, axes = figure(7.2, 7.5, 3, 1, sharex=True)
    loss_and_accuracy(axes[:2], history, "step")
    step, phases = [row["step"] for row in history], [[row[p] for row in history] for p in PHASES]
    axes[2].stackplot(step, phases, labels=PHASES, colors=colors(len(PHASES)))
    finish(
        axes[0],
        f"{centers['num_classes']:,} centers of size {centers['embedding_size']} in "
        f"{centers['dtype']}, {result['config']['working_set']:,} of them in batches",
    )
    title = f"Time of a step: {result['steps_per_second']:.2f} steps/s"
    finish(axes[2], title, "step", "seconds of a step")
    save(new, folder / "scale.png")
