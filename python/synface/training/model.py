"""A training run's folder: its files, what is checked before it begins, its network read back.

Nothing here reads an image: a command calls `check_start` before it decodes any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checkpoint
from ..common.check import check_folder, check_memory
from ..common.extras import extra
from ..common.files import CheckpointError
from ..common.rng import seeded, seeds, standard_defaults
from ..common.textfiles import read_json
from ..heads import MarginHead, ShardedMarginHead
from ..models.iresnet import IResNet
from ..optim import RowAdamW, RowSGD
from .config import TrainConfig
from .sources import Source

CONFIG, METRICS, TIMING = "config.json", "metrics.jsonl", "timing.jsonl"
VERIFICATION, CHECKPOINTS = "verification.jsonl", "checkpoints"
BACKBONE, CENTERS = "model.backbone.", "model.head.weight"  # in a checkpoint


def build_backbone(config: TrainConfig, image_shape: tuple[int, ...]) -> IResNet:
    """The backbone of a configuration for (H, W, C) images.

    Raises:
        ValueError: where it cannot be built, or its parameters exceed the memory that is free.
    """
    check_network(config, image_shape)
    with standard_defaults():
        return _backbone(config, image_shape)


def check_network(config: TrainConfig, image_shape: tuple[int, ...]) -> IResNet:
    """Return the backbone for (H, W, C) images on the device "meta"; raises as `build_backbone`."""
    network = shapes_of(config, image_shape)
    height, width, _ = image_shape
    check_memory(
        f"a network of widths {list(config.widths)}, depths {list(config.depths)} and "
        f"embedding_size {config.embedding_size} for images of {height}×{width}",
        sum(4 * each.numel() for each in network.parameters()),
    )
    return network


def shapes_of(config: TrainConfig, image_shape: tuple[int, ...]) -> IResNet:
    """The backbone on the device "meta", whose shapes can be compared with what comes from outside.

    Raises:
        ValueError: where it cannot be built on any machine.
    """
    with standard_defaults(), torch.device("meta"):
        try:
            return _backbone(config, image_shape)
        except RuntimeError as error:  # sizes over 2^63
            raise ValueError(f"the backbone cannot be built: {error}") from error


def _backbone(config: TrainConfig, image_shape: tuple[int, ...]) -> IResNet:
    height, width, channels = image_shape
    return IResNet(
        (height, width),
        channels,
        config.widths,
        config.depths,
        config.embedding_size,
        config.dropout,
    )


def check_start(
    config: TrainConfig,
    size: tuple[int, int],
    output: Path,
    *,
    channels: int | None = None,
    resume: bool = False,
    init: Path | None = None,
    tensorboard: bool = False,
) -> None:
    """Raise what `train` would raise before its first step, as far as that needs no image.

    Args:
        size: (H, W) of the images. channels: of them; None where they are not known yet.
        config, output, resume, init, tensorboard: of `train`.

    Raises:
        ValueError: for a network that cannot be built.
        CheckpointError: for an ``init`` that is damaged, or of a network of other shapes.
        OSError: for an output that cannot be written to.
        FileExistsError: for one that holds a run, unless ``resume`` is set.
        ImportError: where tensorboard is wanted and not installed.
    """
    check_folder("output", output)
    if not resume and (checkpoint.checkpoints(output / CHECKPOINTS) or (output / METRICS).exists()):
        raise FileExistsError(
            f"{output} holds a run already: resume it, or choose another output folder"
        )
    if init is None:
        check_network(config, (*size, channels or 1))
    elif resume:
        raise ValueError(f"init begins a new run: give either init ({init}) or resume")
    else:
        found, state = state_of(init)
        theirs = network_of(found, state)
        channels = channels or state["data"]["image_shape"][2]
        ours = check_network(config, (*size, channels or 1))
        check_backbone(found, theirs.state_dict(), ours)
    if tensorboard:
        with extra("tensorboard", "the log for TensorBoard"):
            import_module("torch.utils.tensorboard")


def check_backbone(found: Path, theirs: dict[str, Tensor], ours: IResNet) -> None:
    """Raise CheckpointError unless a backbone can begin with the parameters of a checkpoint's."""
    try:
        checkpoint.check_shapes(found, theirs, ours.state_dict())
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; a run that begins with it needs its widths, depths, embedding_size and "
            "image size"
        ) from None


def load_backbone(path: Path) -> tuple[IResNet, dict[str, Any]]:
    """The backbone of a run's newest checkpoint (or of one checkpoint), in evaluation mode.

    Returns:
        The backbone and the checkpoint's state: its configuration, data and step.

    Raises:
        CheckpointError: where there is none, or it is damaged.
    """
    found, tensors, state = read(path, _names_of_backbone)
    backbone, values = network_of(found, state), backbone_of(tensors)
    checkpoint.check_shapes(found, values, backbone.state_dict())
    backbone.to_empty(device="cpu").load_state_dict(values)
    return backbone.eval(), state


def inherited(found: Path, theirs: int, ours: int) -> str:
    """Say in words what a run takes from a checkpoint over as many or other identities."""
    if theirs == ours:
        return f"begins with the backbone and the {ours:,} class centers of {found}"
    return (
        f"begins with the backbone of {found}; the head is new: that run has {theirs:,} "
        f"identities, these data {ours:,}"
    )


def started_as(output: Path) -> dict[str, Any] | None:
    """Return how a run was started, as its folder has it; None where it does not say.

    Raises:
        CheckpointError: for a file that is damaged.
    """
    file = output / CONFIG
    if not file.exists():
        return None
    hint = "restore a copy, or move it away to go on without what else it remembers"
    try:
        started = read_json(file, CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {hint}") from error
    if not isinstance(started, dict) or not isinstance(started.get("command"), dict):
        raise CheckpointError(f"{file} must hold an object with a command; {hint}")
    return started


def state_of(path: Path) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint of a run (or one checkpoint): where it is, and its state."""
    found = checkpoint.find(path)
    return found, checkpoint.load_state(found)


def read(
    path: Path, wanted: checkpoint.Wanted, verified: slice = slice(None)
) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """The newest checkpoint of a run (or one checkpoint): where it is, what is wanted of its
    tensors, its state; ``verified`` as in `checkpoint.load`.
    """
    found = checkpoint.find(path)
    return found, *checkpoint.load(found, wanted, verified)


def _names_of_backbone(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, slice | None]:
    return {name: None for name in shapes if name.startswith(BACKBONE)}


def take_over(
    init: Path,
    backbone: IResNet,
    centers: Tensor,
    num_classes: int,
    start: int = 0,
    verified: slice = slice(None),
) -> str:
    """Puts a checkpoint's backbone, and its centers where they are as many, into a model's.

    Of the centers, only this rank's rows are read.

    Args:
        init: a run, or one of its checkpoints.
        centers: rows of the model's centers from ``start`` on. num_classes: of all its centers.
        verified: as in `checkpoint.load`.

    Returns:
        What was taken over, in words.

    Raises:
        CheckpointError: for a checkpoint that is damaged, or of a network of other shapes.
    """
    there, size = 0, centers.shape[1]

    def wanted(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, slice | None]:
        nonlocal there
        shape = shapes.get(CENTERS, (0, size))
        if shape[1:] != (size,):
            raise CheckpointError(f"{init}: {CENTERS} must be of shape (C, {size}), got {shape}")
        there = shape[0]
        rows = {CENTERS: slice(start, start + len(centers))} if there == num_classes else {}
        return _names_of_backbone(shapes) | rows

    found, tensors, _ = read(init, wanted, verified)
    theirs = backbone_of(tensors)
    check_backbone(found, theirs, backbone)
    backbone.load_state_dict(theirs)
    if there == num_classes:
        with torch.no_grad():
            centers.copy_(tensors[CENTERS])
    return inherited(found, there, num_classes)


def backbone_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's state dict among a checkpoint's tensors."""
    return {k.removeprefix(BACKBONE): v for k, v in tensors.items() if k.startswith(BACKBONE)}


def network_of(found: Path, state: Mapping[str, Any]) -> IResNet:
    """The backbone that a checkpoint's state tells of, on the device "meta"."""
    for part in ("config", "data"):
        checkpoint.check_same(found, state.get(part), {}, part)
    try:
        config = TrainConfig.from_json(state["config"])
        return shapes_of(config, tuple(state["data"]["image_shape"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{found / checkpoint.STATE}: {error}") from error


@dataclass
class Model:
    """What trains, and all that a checkpoint holds of it.

    The loss scaler serves the backbone alone: its gradients are the ones that can leave float16.
    """

    backbone: IResNet
    head: MarginHead | ShardedMarginHead
    optimizers: dict[str, torch.optim.Optimizer]
    scaler: torch.amp.GradScaler

    @property
    def modules(self) -> nn.ModuleDict:
        return nn.ModuleDict({"backbone": self.backbone, "head": self.head})

    def save(self, folder: Path, steps: int, description: dict[str, Any]) -> None:
        state = description | {"scaler": self.scaler.state_dict()}
        checkpoint.save_model(folder, steps, self.modules, self.optimizers, state)

    def load(self, found: Path, check: Callable[[dict[str, Any]], None]) -> int:
        """Takes over a checkpoint whose state `check` accepts; the steps that were done.

        Raises:
            CheckpointError: for one that is damaged, or of another model or optimizer.
        """
        check(checkpoint.load_state(found))
        state = checkpoint.load_model(found, self.modules, self.optimizers)
        scaler = state.get("scaler")
        if not isinstance(scaler, dict) or scaler.keys() != self.scaler.state_dict().keys():
            raise CheckpointError(f"{found / checkpoint.STATE}: scaler is {scaler!r}")
        if scaler:
            self.scaler.load_state_dict(scaler)
        return state["step"]

    def begin_with(self, init: Path, num_classes: int) -> str:
        """Takes over another run's backbone, and its centers where they are as many; what it took.

        Raises:
            CheckpointError: for a checkpoint that is damaged, or of a network of other shapes.
        """
        head = self.head
        if not isinstance(head, ShardedMarginHead):
            return take_over(init, self.backbone, head.weight, num_classes)
        rows = head.weight, num_classes, head.class_start
        read = partial(take_over, init, self.backbone, *rows, checkpoint.share(head.group))
        return checkpoint.together(read, head.group, CheckpointError)


def build_model(config: TrainConfig, source: Source, alone: bool, device: torch.device) -> Model:
    seed = seeds(config.seed, "parameters", 0)
    head: MarginHead | ShardedMarginHead
    with seeded(seed), standard_defaults():  # on the CPU: the same on every device
        backbone = build_backbone(config, source.image_shape).to(device)
        if alone or device.type == "cpu":  # shares on a GPU are made there
            ranks = 1 if alone else dist.get_world_size()
            needed = 4 * config.embedding_size * source.num_classes // ranks
            check_memory("the class centers", needed)
        sizes = config.embedding_size, source.num_classes, config.margin()
        if alone:
            head = MarginHead(*sizes).to(device)
        else:
            head = ShardedMarginHead(*sizes, seed=seed, device=device)
    sgd = {"momentum": 0.9, "nesterov": True} if config.optimizer == "sgd" else {}
    settings: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay} | sgd
    dense = torch.optim.SGD if config.optimizer == "sgd" else torch.optim.AdamW
    by_row = RowSGD if config.optimizer == "sgd" else RowAdamW
    centers: Any = by_row if config.sample_rate < 1 or config.fused_update else dense
    optimizers = {
        "optimizer": dense([p for p in backbone.parameters() if p.requires_grad], **settings),
        "centers": centers(head.parameters(), **settings),
    }
    if config.fused_update:
        head.fuse(optimizers["centers"])
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    return Model(backbone, head, optimizers, scaler)
