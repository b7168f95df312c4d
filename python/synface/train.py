"""Training on one process: a backbone, a margin head, checkpoints that resume bitwise the same.

All randomness of a step is drawn from generators seeded by (seed, purpose, step). So a checkpoint
holds no generator's state, and a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import synface_kernels as sk

from . import checkpoint
from .backbone import IResNet
from .checkpoint import CheckpointError
from .data import Augment, DataError, Faces
from .heads import MarginHead
from .interrupts import interrupts
from .randomness import seeded, seeds
from .sources import Batch, FacesSource, Source

CONFIG, METRICS, TIMING = "config.json", "metrics.jsonl", "timing.jsonl"


@dataclass(frozen=True)
class TrainConfig:
    """What makes a run. Two runs of one configuration on one machine are bitwise the same.

    Attributes:
        epochs, batch_size: the last, shorter batch of an epoch is trained on too.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adamw"; lr, weight_decay: its settings.
        schedule: "cosine", "step" (÷10 after 60 % and 85 % of the steps) or "constant";
            warmup_epochs of linear warm-up come first.
        scale, m1, m2, m3: of the margin, m2 in radians.
        widths, depths, embedding_size, dropout: of the backbone.
        augment: strength of the augmentation, 0 for none.
        checkpoint_every: epochs between checkpoints.
        seed: of everything random.
    """

    epochs: int = 40
    batch_size: int = 32
    optimizer: str = "sgd"
    lr: float = 0.2
    weight_decay: float = 1e-3
    schedule: str = "cosine"
    warmup_epochs: float = 2.0
    scale: float = 32.0
    m1: float = 1.0
    m2: float = 0.3
    m3: float = 0.0
    widths: tuple[int, ...] = (16, 32, 64, 128)
    depths: tuple[int, ...] = (1, 1, 1, 1)
    embedding_size: int = 128
    dropout: float = 0.2
    augment: float = 1.0
    checkpoint_every: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("epochs", "batch_size", "lr", "embedding_size", "checkpoint_every")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_epochs", "augment", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for name, allowed in (
            ("optimizer", ("sgd", "adamw")),
            ("schedule", ("cosine", "step", "constant")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}")
        self.margin()
        Augment(self.augment)

    def margin(self) -> sk.CombinedMargin:
        return sk.CombinedMargin(self.scale, self.m1, self.m2, self.m3)

    @staticmethod
    def from_json(values: dict[str, Any]) -> TrainConfig:
        known = {f.name for f in fields(TrainConfig)}
        if values.keys() != known:
            different = sorted(values.keys() ^ known)
            raise CheckpointError(f"a configuration with unknown or missing keys: {different}")
        lists: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values.items()
        }
        return TrainConfig(**lists)


class Progress(Protocol):
    """What `train` tells while it runs."""

    def start(self, total_steps: int, step: int) -> None: ...

    def step(self, loss: float, accuracy: float, images: int) -> None: ...


@dataclass
class Trained:
    """A trained model, with what was logged at every step, and the timing of the reading if any."""

    backbone: IResNet
    head: MarginHead
    config: TrainConfig
    history: list[dict[str, float]]
    timing: dict[str, float] | None


def build_backbone(config: TrainConfig, image_shape: tuple[int, ...]) -> IResNet:
    """The backbone of a configuration for (H, W, C) images."""
    height, width, channels = image_shape
    return IResNet(
        (height, width),
        channels,
        config.widths,
        config.depths,
        config.embedding_size,
        config.dropout,
    )


def _optimizer(config: TrainConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, config.lr, 0.9, weight_decay=config.weight_decay, nesterov=True
        )
    return torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Of one step, counted from 0."""
    total = config.epochs * steps_per_epoch
    warmup = min(int(config.warmup_epochs * steps_per_epoch), total - 1)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "step":
        return config.lr * 0.1 ** ((done >= 0.6) + (done >= 0.85))
    return config.lr


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    return tensors


def _restore(
    model: nn.Module, optimizer: torch.optim.Optimizer, file: Path, tensors: dict[str, Tensor]
) -> None:
    values = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    checkpoint.check_shapes(file, values, model.state_dict())
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            if not index.isdecimal() or int(index) >= len(parameters):
                raise CheckpointError(f"{file} is of another optimiser: {key}")
            shape = tuple(parameters[int(index)].shape)
            if value.dim() and tuple(value.shape) != shape:
                raise CheckpointError(
                    f"{file}: {key} must be of shape {shape}, got {tuple(value.shape)}"
                )
            state.setdefault(int(index), {})[name] = value
    model.load_state_dict(values)
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def train(
    config: TrainConfig,
    data: Faces | Source,
    output: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    stop_after: int | None = None,
    command: dict[str, Any] | None = None,
) -> Trained:
    """Trains a backbone and a margin head on a set of faces or another source, on the CPU.

    Args:
        config: what to do. data: at least two identities.
        output: the run's folder: config.json, metrics.jsonl (one line a step), checkpoints/, and
            for a source that reads files timing.jsonl (one line each time that it was run).
        resume: go on from the newest checkpoint in ``output``. The result is bitwise that of a run
            that was never interrupted.
        progress: is told about every step.
        stop_after: end early, after this step, as an interruption would (the last checkpoint is
            what remains).
        command: what else config.json is to remember of how the run was started.

    Raises:
        CheckpointError: for a checkpoint that is damaged, or of another configuration or data.
        ValueError: for data that cannot be trained on.
        FileExistsError: where ``output`` holds a run already and ``resume`` is not set.
        DataError: where the source cannot go on (a damaged file, a worker that died), once a
            checkpoint of the last step is written.
        FloatingPointError: once a loss or a parameter is not finite; the last checkpoint stays.
        KeyboardInterrupt: on Ctrl-C, once the step is done and a checkpoint of it is written.

    The global random state of torch is left as it was.
    """
    source: Source = FacesSource(data) if isinstance(data, Faces) else data
    if source.num_classes < 2:
        raise ValueError(f"training needs two identities or more, got {source.num_classes}")
    with interrupts() as interrupted:
        return _train(config, source, output, resume, progress, stop_after, command, interrupted)


def _train(
    config: TrainConfig,
    source: Source,
    output: Path,
    resume: bool,
    progress: Progress | None,
    stop_after: int | None,
    command: dict[str, Any] | None,
    interrupted: Callable[[], bool],
) -> Trained:
    description = {
        "config": json.loads(json.dumps(asdict(config))),
        "data": source.description(),
    }
    with seeded(seeds(config.seed, "parameters", 0)):
        backbone = build_backbone(config, source.image_shape)
        head = MarginHead(config.embedding_size, source.num_classes, config.margin())
    model = nn.ModuleDict({"backbone": backbone, "head": head})
    optimizer = _optimizer(config, [p for p in model.parameters() if p.requires_grad])
    folder, log = output / "checkpoints", output / METRICS
    steps_per_epoch = -(-len(source) // config.batch_size)

    def save(steps: int) -> None:
        wrong = [name for name, p in model.named_parameters() if not p.isfinite().all()]
        if wrong:
            raise FloatingPointError(
                f"{wrong[0]} is not finite after {steps} steps: lower lr (now {config.lr:g}); "
                f"earlier checkpoints are in {folder}"
            )
        checkpoint.save(folder, steps, _tensors(model, optimizer), description)

    first = 0
    history: list[dict[str, float]] = []
    if resume:
        first = _resume(output, description, model, optimizer)
        history = _history(log, first)
        checkpoint.write(log, "".join(json.dumps(row) + "\n" for row in history))
    elif checkpoint.checkpoints(folder) or log.exists():
        raise FileExistsError(
            f"{output} holds a run already: resume it, or choose another output folder"
        )
    else:
        output.mkdir(parents=True, exist_ok=True)
        started = {"command": command or {}} | description
        checkpoint.write(output / CONFIG, json.dumps(started, indent=1))
        save(0)  # so that there always is one to resume from

    total = config.epochs * steps_per_epoch
    if progress:
        progress.start(total, first)
    model.train()
    with (
        log.open("a") as lines,
        closing(source.batches(config, first)) as batches,
        _timed(source, output / TIMING, first),
    ):

        def keep(steps: int) -> None:
            lines.flush()
            os.fsync(lines.fileno())
            save(steps)

        for step, batch in _kept(batches, first, keep):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step, steps_per_epoch)
            images, target, target_weight = batch
            with seeded(seeds(config.seed, "dropout", step)):
                loss, stats = head(backbone(images), target, target_weight, return_stats=True)
            row = {
                "step": step,
                "epoch": step / steps_per_epoch,
                "loss": loss.item(),
                "accuracy": stats.top1.float().mean().item(),
                "lr": optimizer.param_groups[0]["lr"],
            }
            if not math.isfinite(row["loss"]):
                raise FloatingPointError(
                    f"the loss is {row['loss']} at step {step}: lower lr (now {config.lr:g}); "
                    f"earlier checkpoints are in {folder}"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history.append(row)
            lines.write(json.dumps(row) + "\n")
            if progress:
                progress.step(row["loss"], row["accuracy"], len(images))
            epoch_ends = (step + 1) % steps_per_epoch == 0
            due = (step + 1) // steps_per_epoch % config.checkpoint_every == 0
            stop = interrupted()
            if (epoch_ends and due) or step + 1 == total or stop:
                keep(step + 1)
            if stop:
                raise KeyboardInterrupt
            if stop_after is not None and step >= stop_after:
                break
    model.eval()
    timing = source.timing.report() if source.timing else None
    return Trained(backbone, head, config, history, timing)


def _kept(
    batches: Iterator[tuple[int, Batch]], first: int, keep: Callable[[int], None]
) -> Iterator[tuple[int, Batch]]:
    """The batches; if they end in an error of the data, the steps that were done are kept."""
    done = first
    try:
        for step, batch in batches:
            yield step, batch
            done = step + 1
    except DataError:
        if done > first:
            keep(done)
        raise


@contextmanager
def _timed(source: Source, file: Path, first: int) -> Iterator[None]:
    """Adds a line on the source's timing to a file, however the run ends."""
    try:
        yield
    finally:
        if source.timing is not None:
            with file.open("a") as lines:
                lines.write(json.dumps({"first_step": first} | source.timing.report()) + "\n")


def _history(log: Path, steps: int) -> list[dict[str, float]]:
    """The log's first lines; those of steps after the checkpoint are done again."""
    try:
        rows = [json.loads(line) for line in log.read_text().splitlines()[:steps]]
        if [row["step"] for row in rows] != list(range(steps)):
            raise ValueError(f"expected steps 0 to {steps - 1}, got {len(rows)} lines")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{log} does not fit the checkpoint: {error}") from error
    return rows


def _resume(
    output: Path,
    description: dict[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> int:
    found = checkpoint.find(output)
    tensors, state = checkpoint.load(found)
    for part in ("config", "data"):
        came, wanted = state[part], description[part]
        changed = [k for k in wanted if came.get(k) != wanted[k]]
        if changed:
            key = changed[0]
            raise CheckpointError(
                f"{found} is of another run: its {part}'s {key} is {came.get(key)!r}, "
                f"expected {wanted[key]!r}"
            )
    _restore(model, optimizer, found / checkpoint.TENSORS, tensors)
    return state["step"]


def load_backbone(path: Path) -> tuple[IResNet, dict[str, Any]]:
    """The backbone of a run's newest checkpoint (or of one checkpoint), in evaluation mode.

    Returns:
        The backbone and the checkpoint's state: its configuration, data and step.

    Raises:
        CheckpointError: where there is none, or it is damaged.
    """
    found = checkpoint.find(path)
    tensors, state = checkpoint.load(found)
    try:
        config = TrainConfig.from_json(state["config"])
        backbone = build_backbone(config, tuple(state["data"]["image_shape"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{found / checkpoint.STATE}: {error}") from error
    prefix = "model.backbone."
    values = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    checkpoint.check_shapes(found / checkpoint.TENSORS, values, backbone.state_dict())
    backbone.load_state_dict(values)
    return backbone.eval(), state
