"""Training on one process: a backbone, a margin head, checkpoints that resume bitwise the same.

All randomness of a step is drawn from generators seeded by (seed, purpose, step). So a checkpoint
holds no generator's state, and a resumed run draws what the uninterrupted one would have drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
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
from .optim import RowAdamW, RowSGD
from .randomness import generator, seeded, seeds
from .settings import write_toml
from .sources import Batch, FacesSource, Source

CONFIG, METRICS, TIMING = "config.json", "metrics.jsonl", "timing.jsonl"
VERIFICATION = "verification.jsonl"
# What configurations had no name for at first; it then was as it now is by default.
LATER = {"accumulate", "precision", "power", "clip_norm", "freeze_statistics", "sample_rate"}
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TrainConfig:
    """What makes a run. Two runs of one configuration on one machine are bitwise the same.

    Attributes:
        epochs, batch_size: the last, shorter batch of an epoch is trained on too.
        accumulate: in how many parts a batch goes through the network, whose gradients are added
            up: less memory, and batch statistics of a part each.
        precision: of the network's arithmetic, by autocast: "float32", "bfloat16", or "float16"
            with a scaled loss. Parameters, head and loss stay float32.
        optimizer: "sgd" (Nesterov momentum 0.9) or "adamw"; lr, weight_decay: its settings.
        schedule: "cosine", "polynomial" ((1 − t)^power), "step" (÷10 after 60 % and 85 % of the
            steps) or "constant"; warmup_epochs of linear warm-up come first.
        clip_norm: the network's gradient is cut to this norm; 0 leaves it.
        freeze_statistics: normalise by the running statistics, not by a batch's.
        sample_rate: share of the classes that take part in a step (Partial FC). Below 1 the
            centres take their optimiser's steps row by row: `synface.optim`.
        scale, m1, m2, m3: of the margin, m2 in radians.
        widths, depths, embedding_size, dropout: of the backbone.
        augment: strength of the augmentation, 0 for none.
        checkpoint_every: epochs between checkpoints.
        seed: of everything random.
    """

    epochs: int = 40
    batch_size: int = 32
    accumulate: int = 1
    precision: str = "float32"
    optimizer: str = "sgd"
    lr: float = 0.2
    weight_decay: float = 1e-3
    schedule: str = "cosine"
    power: float = 2.0
    warmup_epochs: float = 2.0
    clip_norm: float = 0.0
    freeze_statistics: bool = False
    sample_rate: float = 1.0
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
        positive = ("epochs", "batch_size", "lr", "power", "embedding_size", "checkpoint_every")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "warmup_epochs", "clip_norm", "augment", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 1 <= self.accumulate <= self.batch_size:
            raise ValueError(
                f"accumulate must be in [1, batch_size = {self.batch_size}], got {self.accumulate}"
            )
        if not 0 < self.sample_rate <= 1:
            raise ValueError(f"sample_rate must be in (0, 1], got {self.sample_rate}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        for name, allowed in (
            ("optimizer", ("sgd", "adamw")),
            ("schedule", ("cosine", "polynomial", "step", "constant")),
            ("precision", tuple(PRECISIONS)),
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
        different = sorted((values.keys() ^ known) - (LATER - values.keys()))
        if different:
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


@dataclass
class _Model:
    """What trains, and all that a checkpoint holds of it."""

    backbone: IResNet
    head: MarginHead
    optimizers: dict[str, torch.optim.Optimizer]
    scaler: torch.amp.GradScaler

    @property
    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"backbone": self.backbone, "head": self.head})

    def tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{name}": value for name, value in self.modules.state_dict().items()}
        for prefix, optimizer in self.optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                for name, value in state.items():
                    tensors[f"{prefix}.{index}.{name}"] = torch.as_tensor(value)
        for name, value in self.scaler.state_dict().items():
            tensors[f"scaler.{name}"] = torch.tensor(value)
        return tensors

    def restore(self, file: Path, tensors: dict[str, Tensor]) -> None:
        """Takes over a checkpoint's tensors.

        Raises:
            CheckpointError: for tensors of another model or optimiser, naming the first.
        """
        kinds: dict[str, dict[str, Tensor]] = {"model": {}, "scaler": {}}
        kinds |= {prefix: {} for prefix in self.optimizers}
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            if kind not in kinds:
                raise CheckpointError(f"{file} is of another model: {key} is unknown")
            kinds[kind][name] = value
        checkpoint.check_shapes(file, kinds["model"], self.modules.state_dict())
        states = {
            prefix: _states(optimizer, file, prefix, kinds[prefix])
            for prefix, optimizer in self.optimizers.items()
        }
        scaler = self.scaler.state_dict()
        if kinds["scaler"].keys() != scaler.keys():
            raise CheckpointError(f"{file} is of a run of another precision")
        self.modules.load_state_dict(kinds["model"])
        for prefix, optimizer in self.optimizers.items():
            optimizer.load_state_dict(optimizer.state_dict() | {"state": states[prefix]})
        if scaler:
            self.scaler.load_state_dict({k: v.item() for k, v in kinds["scaler"].items()})


def _states(
    optimizer: torch.optim.Optimizer, file: Path, prefix: str, values: dict[str, Tensor]
) -> dict[int, dict[str, Tensor]]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states: dict[int, dict[str, Tensor]] = {}
    for key, value in values.items():
        index, _, name = key.partition(".")
        if not index.isdecimal() or int(index) >= len(parameters):
            raise CheckpointError(f"{file} is of another optimiser: {prefix}.{key}")
        shape = tuple(parameters[int(index)].shape)
        if value.dim() and tuple(value.shape) not in (shape, shape[:1]):  # one value a row, or all
            raise CheckpointError(
                f"{file}: {prefix}.{key} must be of shape {shape}, got {tuple(value.shape)}"
            )
        states.setdefault(int(index), {})[name] = value
    return states


def _model(config: TrainConfig, source: Source) -> _Model:
    with seeded(seeds(config.seed, "parameters", 0)):
        backbone = build_backbone(config, source.image_shape)
        head = MarginHead(config.embedding_size, source.num_classes, config.margin())
    sgd = {"momentum": 0.9, "nesterov": True} if config.optimizer == "sgd" else {}
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay} | sgd
    dense = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.AdamW
    learned = [p for p in backbone.parameters() if p.requires_grad]
    centers = list(head.parameters())
    optimizers: dict[str, torch.optim.Optimizer]
    if config.sample_rate == 1:
        optimizers = {"optimizer": dense(learned + centers, **settings)}
    else:
        by_row = RowSGD if config.optimizer == "sgd" else RowAdamW
        optimizers = {"optimizer": dense(learned, **settings)}
        optimizers["centers"] = by_row(centers, **settings)
    return _Model(
        backbone,
        head,
        optimizers,
        torch.amp.GradScaler("cpu", enabled=config.precision == "float16"),
    )


def learning_rate(config: TrainConfig, step: int, steps_per_epoch: int) -> float:
    """Of one step, counted from 0."""
    total = config.epochs * steps_per_epoch
    warmup = min(int(config.warmup_epochs * steps_per_epoch), total - 1)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    if config.schedule == "cosine":
        return config.lr * 0.5 * (1 + math.cos(math.pi * done))
    if config.schedule == "polynomial":
        return config.lr * (1 - done) ** config.power
    if config.schedule == "step":
        return config.lr * 0.1 ** ((done >= 0.6) + (done >= 0.85))
    return config.lr


def train(
    config: TrainConfig,
    data: Faces | Source,
    output: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    stop_after: int | None = None,
    command: dict[str, Any] | None = None,
    verify: Callable[[nn.Module], Mapping[str, float]] | None = None,
    verify_every: int = 0,
    tensorboard: bool = False,
) -> Trained:
    """Trains a backbone and a margin head on a set of faces or another source, on the CPU.

    Args:
        config: what to do. data: at least two identities.
        output: the run's folder: config.json, config.toml (the same, for ``synface train
            --config``), metrics.jsonl (one line a step), checkpoints/, and
            for a source that reads files timing.jsonl (one line each time that it was run).
        resume: go on from the newest checkpoint in ``output``. The result is bitwise that of a run
            that was never interrupted.
        progress: is told about every step.
        stop_after: end early, after this step, as an interruption would (the last checkpoint is
            what remains).
        command: what else config.json is to remember of how the run was started.
        verify: is given the backbone, in evaluation mode, after every ``verify_every`` epochs (0:
            never); what it returns goes into verification.jsonl, a line each time.
        tensorboard: also write loss, accuracy, learning rate and verification to
            ``output``/tensorboard; needs the package of that name.

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
    run = _Run(config, source, output)
    with ExitStack() as stack:
        interrupted = stack.enter_context(interrupts())
        first = run.resume() if resume else run.start(command or {})
        writer = stack.enter_context(_tensorboard(output, first)) if tensorboard else None
        if progress:
            progress.start(run.total_steps, first)
        stack.enter_context(_timed(source, output / TIMING, first))
        batches = stack.enter_context(closing(source.batches(config, first)))
        for step, batch in _kept(batches, first, run.save):
            row = run.step(step, batch)
            done = step + 1
            if writer:
                writer(step, row)
            if progress:
                progress.step(row["loss"], row["accuracy"], len(batch.images))
            epoch, rest = divmod(done, run.steps_per_epoch)
            if verify and verify_every and rest == 0 and epoch % verify_every == 0:
                figures = run.verify(done, verify)
                if writer:
                    writer(step, {f"verification/{k}": v for k, v in figures.items()})
            due = rest == 0 and epoch % config.checkpoint_every == 0
            stop = interrupted()
            if due or done == run.total_steps or stop:
                run.save(done)
            if stop:
                raise KeyboardInterrupt
            if stop_after is not None and step >= stop_after:
                break
    run.backbone.eval()
    timing = source.timing.report() if source.timing else None
    return Trained(run.backbone, run.head, config, run.history, timing)


class _Run:
    """One run: its model, its folder, and what a step does."""

    def __init__(self, config: TrainConfig, source: Source, output: Path) -> None:
        self.config, self.output = config, output
        self.folder = output / "checkpoints"
        self.description = {
            "config": json.loads(json.dumps(asdict(config))),
            "data": source.description(),
        }
        self.model = _model(config, source)
        self.backbone, self.head = self.model.backbone, self.model.head
        self.num_classes = source.num_classes
        self.steps_per_epoch = -(-len(source) // config.batch_size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.history: list[dict[str, float]] = []
        self.lines = Lines(output / METRICS)
        self.verified = Lines(output / VERIFICATION)
        self._train_mode()

    def start(self, command: dict[str, Any]) -> int:
        """Writes how the run begins; 0, the first step."""
        if checkpoint.checkpoints(self.folder) or self.lines.file.exists():
            raise FileExistsError(
                f"{self.output} holds a run already: resume it, or choose another output folder"
            )
        self.output.mkdir(parents=True, exist_ok=True)
        started = {"command": command} | self.description
        checkpoint.write(self.output / CONFIG, json.dumps(started, indent=1))
        write_toml(self.output / "config.toml", command | self.description["config"])
        self.lines.rewrite([])
        self.save(0)  # so that there always is one to resume from
        return 0

    def resume(self) -> int:
        """Takes up the newest checkpoint; the first step that is still to do."""
        found = checkpoint.find(self.output)
        tensors, state = checkpoint.load(found)
        # what a configuration does not name, because it is older, was as it is by default
        state["config"] = asdict(TrainConfig.from_json(state["config"]))
        state["config"] = json.loads(json.dumps(state["config"]))
        for part in ("config", "data"):
            came, wanted = state[part], self.description[part]
            changed = [k for k in wanted if came.get(k) != wanted[k]]
            if changed:
                key = changed[0]
                raise CheckpointError(
                    f"{found} is of another run: its {part}'s {key} is {came.get(key)!r}, "
                    f"expected {wanted[key]!r}"
                )
        self.model.restore(found / checkpoint.TENSORS, tensors)
        first = state["step"]
        # the lines of steps after the checkpoint are written again
        self.history = self.lines.read()[:first]
        if [row["step"] for row in self.history] != list(range(first)):
            raise CheckpointError(
                f"{self.lines.file} does not fit the checkpoint: expected steps 0 to {first - 1}, "
                f"got {len(self.history)} lines"
            )
        self.lines.rewrite(self.history)
        if self.verified.file.exists():
            self.verified.rewrite([row for row in self.verified.read() if row["step"] <= first])
        return first

    def save(self, steps: int) -> None:
        """Writes a checkpoint after so many steps, and sees the log on the disk."""
        self.lines.flush()
        for name, parameter in self.model.modules.named_parameters():
            if not parameter.isfinite().all():
                raise FloatingPointError(
                    f"{name} is not finite after {steps} steps: lower lr (now "
                    f"{self.config.lr:g}); earlier checkpoints are in {self.folder}"
                )
        checkpoint.save(self.folder, steps, self.model.tensors(), self.description)

    def step(self, step: int, batch: Batch) -> dict[str, float]:
        """One step of training, and its line in the log."""
        config, optimizers, scaler = self.config, self.model.optimizers, self.model.scaler
        rate = learning_rate(config, step, self.steps_per_epoch)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate
        target, class_ids = batch.target, None
        if config.sample_rate < 1:
            drawn = generator(config.seed, "classes", step)
            sampled = math.ceil(config.sample_rate * self.num_classes)
            class_ids, target = sk.sample_classes(target, self.num_classes, sampled, drawn)
        count = len(batch.images)
        loss, hits = torch.zeros(()), torch.zeros(())
        with seeded(seeds(config.seed, "dropout", step)):
            for part in torch.arange(count).tensor_split(min(config.accumulate, count)):
                rows = slice(int(part[0]), int(part[-1]) + 1)
                weight = batch.target_weight
                embeddings = self._embed(batch.images[rows])
                part_loss, stats = self.head(
                    embeddings,
                    target[rows],
                    None if weight is None else weight[rows],
                    class_ids=class_ids,
                    return_stats=True,
                )
                part_loss = part_loss * (len(part) / count)
                loss += part_loss.detach()
                hits += stats.top1.sum()
                if part_loss.isfinite():
                    scaler.scale(part_loss).backward()
        row = {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "loss": loss.item(),
            "accuracy": hits.item() / count,
            "lr": rate,
        }
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(
                f"the loss is {row['loss']} at step {step}: lower lr (now {config.lr:g}); "
                f"earlier checkpoints are in {self.folder}"
            )
        if config.clip_norm > 0:
            scaler.unscale_(optimizers["optimizer"])
            norm = nn.utils.clip_grad_norm_(self.backbone.parameters(), config.clip_norm)
            if norm.isfinite():  # else the scaler leaves this step out
                row["gradient_norm"] = norm.item()
        for optimizer in optimizers.values():
            scaler.step(optimizer)
        scaler.update()
        self.history.append(row)
        self.lines.append(row)
        return row

    def verify(
        self, steps: int, verify: Callable[[nn.Module], Mapping[str, float]]
    ) -> dict[str, float]:
        self.backbone.eval()
        figures = dict(verify(self.backbone))
        self._train_mode()
        self.verified.append({"step": steps, "epoch": steps / self.steps_per_epoch} | figures)
        return figures

    def _embed(self, images: Tensor) -> Tensor:
        dtype = PRECISIONS[self.config.precision]
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            return self.backbone(images).float()

    def _train_mode(self) -> None:
        self.model.modules.train()
        if self.config.freeze_statistics:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()


class Lines:
    """A log of JSON objects, a line each."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def append(self, row: Mapping[str, float]) -> None:
        with self.file.open("a") as lines:
            lines.write(json.dumps(row) + "\n")

    def flush(self) -> None:
        """Sees to it that all lines are on the disk."""
        if self.file.exists():
            checkpoint.sync(self.file)

    def rewrite(self, rows: list[dict[str, float]]) -> None:
        checkpoint.write(self.file, "".join(json.dumps(row) + "\n" for row in rows))

    def read(self) -> list[dict[str, float]]:
        """Raises CheckpointError for a file that is no such log."""
        try:
            rows = [json.loads(line) for line in self.file.read_text().splitlines()]
            return [row | {"step": int(row["step"])} for row in rows]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{self.file} does not fit the checkpoint: {error}") from error


@contextmanager
def _tensorboard(output: Path, first: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
    """A function that writes figures of a step; those of later steps, of an earlier run, go."""
    from torch.utils.tensorboard import SummaryWriter  # optional: the extra tensorboard

    with SummaryWriter(str(output / "tensorboard"), purge_step=first) as writer:

        def write(step: int, figures: Mapping[str, float]) -> None:
            for name, value in figures.items():
                if name not in ("step", "epoch"):
                    writer.add_scalar(name if "/" in name else f"training/{name}", value, step)

        yield write


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
