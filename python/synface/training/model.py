"""A training run's folder: its files, checks before the first step, loading of its network.

No image is read here: a command calls `check_start` before it decodes any.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checkpoint
from ..common.check import check_folder, check_memory
from ..common.files import CheckpointError
from ..common.rng import seeded, seeds, standard_defaults
from ..common.textfiles import read_json
from ..heads import MarginHead, ShardedMarginHead
from ..models.iresnet import IResNet, PublishedIResNet
from ..optim import RowAdamW, RowSGD
from .backbone import build_backbone, check_embeddings, shapes_of
from .backbone import check_network as check_network
from .config import BUILT_IN, MODULE, PARTS, TrainConfig, factors_of
from .initial import SUFFIXES, architecture_of, fitted, read_weights
from .loggers import Logger, check_loggers
from .sources import Source

CONFIG, METRICS, TIMING = "config.json", "metrics.jsonl", "timing.jsonl"
VERIFICATION, CHECKPOINTS = "verification.jsonl", "checkpoints"
BEST = "best"  # checkpoints of the best verifications
ALIGNMENT = "alignment.json"  # how the training faces were aligned, if `synface align` did it
BACKBONE, CENTERS = "model.backbone.", "model.head.weight"  # in a checkpoint
# Modules whose parameters all have a gradient in every step, unless frozen together.
ALWAYS_STEPPED = (IResNet, PublishedIResNet, MarginHead, ShardedMarginHead)
HEADS = ("auto", "keep", "resize", "new")  # what becomes of an initial run's head


def check_start(
    config: TrainConfig,
    size: tuple[int, int],
    output: Path,
    *,
    channels: int | None = None,
    resume: bool = False,
    init: Path | None = None,
    init_head: str = "auto",
    loggers: Sequence[str | Logger] = (),
) -> None:
    """Raise the errors of `train` that can be found without reading an image.

    Args:
        size: (H, W) of the images.
        channels: C of the images; None if it is not known yet.
        config, output, resume, init, init_head, loggers: as for `train`.

    Raises:
        ValueError: for a network that cannot be built, an unknown logger, and an unknown
            ``init_head`` or one that does not go with ``init``.
        CheckpointError: for an ``init`` that is damaged, or of a network of other shapes.
        OSError: if ``output`` cannot be written to.
        FileExistsError: if ``output`` holds a run, unless ``resume`` is set.
        ImportError: if a logger's package is not installed.
    """
    check_folder("output", output)
    if not resume and (checkpoint.checkpoints(output / CHECKPOINTS) or (output / METRICS).exists()):
        raise FileExistsError(
            f"{output} holds a run already: resume it, or choose another output folder"
        )
    theirs, weights = None, None
    if init_head not in HEADS:
        raise ValueError(f"init_head must be one of {HEADS}, got {init_head!r}")
    if init is None and init_head != "auto":
        raise ValueError(f"init_head says what becomes of init's head, got {init_head!r} alone")
    if init is not None and resume:
        raise ValueError(f"init begins a new run: give either init ({init}) or resume")
    if init is not None and init.suffix in SUFFIXES and not init.exists():
        raise FileNotFoundError(f"init does not exist: {init}")
    if init is not None and init.is_file():
        if init_head not in ("auto", "new"):
            raise ValueError(f"{init} is a file of weights without a head: init_head {init_head!r}")
        weights = read_weights(init)
        sizes = architecture_of(init, weights)
        channels = channels or (sizes.channels if sizes else None)
    elif init is not None:
        found, state = state_of(init)
        if recorded(found, state).backbone in BUILT_IN:
            theirs = network_of(found, state)
            channels = channels or state["data"]["image_shape"][2]
    ours = check_network(config, (*size, channels or 1))
    if ours is not None:  # a user's backbone is compared once it is built
        weight = torch.zeros(1, 1, dtype=torch.float32, device="meta")
        _parameter_groups(config, ours, nn.ParameterDict({"weight": weight}))
        if theirs is not None:
            check_backbone(found, theirs.state_dict(), ours)
        if init is not None and weights is not None:
            fitted(init, weights, ours)
    check_loggers(loggers)


def check_backbone(found: Path, theirs: dict[str, Tensor], ours: nn.Module) -> None:
    """Raise CheckpointError unless a backbone can load a checkpoint's parameters."""
    try:
        checkpoint.check_shapes(found, theirs, ours.state_dict())
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; a run that starts from it needs its widths, depths, embedding_size and "
            "image size, or its backbone"
        ) from None


def load_backbone(
    path: Path, backbone: nn.Module | str | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the backbone of a run's newest checkpoint (or of one checkpoint), to evaluate it.

    Args:
        path: the folder of the run, or of one of its checkpoints.
        backbone: the module to load the parameters into, or the name of a function that builds it,
            as ``package.module:function``; required if the run's is not built in. A function that
            only the checkpoint names is not imported.

    Returns:
        The backbone in evaluation mode, and the checkpoint's state: its configuration, data and
        step.

    Raises:
        CheckpointError: if there is none, it is damaged, or its backbone cannot be rebuilt or is
            another one.
    """
    found, tensors, state = read(path, _names_of_backbone)
    values = backbone_of(tensors)
    network = network_of(found, state, backbone)
    checkpoint.check_shapes(found, values, network.state_dict())
    if any(each.is_meta for each in network.parameters()):
        network.to_empty(device="cpu")
    network.load_state_dict(values)
    return network.eval(), state


def inherited(found: Path, theirs: int, ours: int, head: str = "auto") -> str:
    """Return a sentence on what a run loads from a checkpoint.

    Args:
        found: the checkpoint. theirs, ours: numbers of its identities, and of the new run's.
        head: as ``init_head`` of `train`.

    Raises:
        CheckpointError: if the head must be kept, and the numbers differ.
    """
    begins, counts = f"starts from the backbone of {found}", f"that run has {theirs:,} identities"
    counts += f", these data {ours:,}"
    if head == "keep" and theirs != ours:
        raise CheckpointError(f"{found}: its head cannot be kept: {counts}")
    if head == "new" or (head == "auto" and theirs != ours):
        return f"{begins}; the head is new" + (f": {counts}" if head == "auto" else "")
    if theirs == ours:
        return f"starts from the backbone and the {ours:,} class centers of {found}"
    kept = min(theirs, ours)
    return f"{begins} and its first {kept:,} class centers, which are the first here: {counts}"


def inherited_from_file(file: Path) -> str:
    """Return a sentence on what a run loads from a file of weights."""
    return f"starts from the backbone in {file}; the head is new"


def begin_with_weights(file: Path, backbone: nn.Module) -> str:
    """Load a file of weights into a backbone; return a sentence on that.

    Raises:
        CheckpointError: for a file that is damaged, or of a network of another architecture.
    """
    backbone.load_state_dict(fitted(file, read_weights(file), backbone))
    return inherited_from_file(file)


def started_as(output: Path) -> dict[str, Any] | None:
    """Return how a run was started, from its config.json; None if there is no such file.

    Raises:
        CheckpointError: for a file that is damaged.
    """
    file = output / CONFIG
    if not file.exists():
        return None
    hint = "restore a copy, or move it away to continue without its other contents"
    try:
        started = read_json(file, CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {hint}") from error
    if not isinstance(started, dict) or not isinstance(started.get("command"), dict):
        raise CheckpointError(f"{file} must hold an object with a command; {hint}")
    return started


def state_of(path: Path) -> tuple[Path, dict[str, Any]]:
    """Return the newest checkpoint of a run (or one checkpoint), and its state."""
    found = checkpoint.find(path)
    return found, checkpoint.load_state(found)


def read(
    path: Path, wanted: checkpoint.Wanted, verified: slice = slice(None)
) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Return the newest checkpoint of a run (or one checkpoint), some tensors of it, and its state.

    Args:
        path: the folder of the run, or of one of its checkpoints.
        wanted, verified: as for `checkpoint.load`.
    """
    found = checkpoint.find(path)
    return found, *checkpoint.load(found, wanted, verified)


def _names_of_backbone(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, slice | None]:
    return {name: None for name in shapes if name.startswith(BACKBONE)}


def take_over(
    init: Path,
    backbone: nn.Module,
    centers: Tensor,
    num_classes: int,
    head: str = "auto",
    start: int = 0,
    verified: slice = slice(None),
) -> str:
    """Load a checkpoint's backbone, and its centers as far as the head takes them, into a model.

    Of the centers, only this rank's rows are read.

    Args:
        init: a run, or one of its checkpoints.
        centers: rows of the model's centers from ``start`` on.
        num_classes: number of the model's centers on all ranks.
        head: as ``init_head`` of `train`.
        verified: as for `checkpoint.load`.

    Returns:
        A sentence on what was loaded.

    Raises:
        CheckpointError: for a checkpoint that is damaged, or of a network of other shapes, or of
            another number of centers if they must be kept.
    """
    there, size = 0, centers.shape[1]

    def wanted(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, slice | None]:
        nonlocal there
        shape = shapes.get(CENTERS, (0, size))
        if shape[1:] != (size,):
            raise CheckpointError(f"{init}: {CENTERS} must be of shape (C, {size}), got {shape}")
        there = shape[0]
        end = min(start + len(centers), there)
        takes = head == "resize" or (head != "new" and there == num_classes)
        rows = {CENTERS: slice(start, end)} if takes and start < end else {}
        return _names_of_backbone(shapes) | rows

    found, tensors, _ = read(init, wanted, verified)
    said = inherited(found, there, num_classes, head)
    theirs = backbone_of(tensors)
    check_backbone(found, theirs, backbone)
    backbone.load_state_dict(theirs)
    if CENTERS in tensors:
        with torch.no_grad():
            centers[: len(tensors[CENTERS])] = tensors[CENTERS]
    return said


def backbone_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the backbone's state dict among a checkpoint's tensors."""
    return {k.removeprefix(BACKBONE): v for k, v in tensors.items() if k.startswith(BACKBONE)}


def recorded(found: Path, state: Mapping[str, Any]) -> TrainConfig:
    """Return the configuration that a checkpoint's state records.

    Raises:
        CheckpointError: for a state without one, or without a description of the data.
    """
    for part in ("config", "data"):
        checkpoint.check_same(found, state.get(part), {}, part)
    try:
        return TrainConfig.from_json(state["config"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{found / checkpoint.STATE}: {error}") from error


def network_of(
    found: Path, state: Mapping[str, Any], given: nn.Module | str | None = None
) -> nn.Module:
    """Return the backbone of a checkpoint's state, without its parameters.

    A built-in one is on the device "meta".

    Args:
        found: the checkpoint, for messages.
        given: the user's backbone, or the name of a function that builds it, as
            ``package.module:function``. No other function is imported.

    Raises:
        CheckpointError: for a state that is damaged, a backbone that is not built in, or a given
            one that does not fit its images.
    """
    config = recorded(found, state)
    if given is None and config.backbone not in BUILT_IN:
        kind = "a module passed to train()" if config.backbone == MODULE else config.backbone
        raise CheckpointError(
            f"{found}: its backbone is {kind}, and code that a file names is not imported: give "
            "--backbone package.module:function (in Python, backbone=), if you trust it"
        )
    try:
        shape = tuple(state["data"]["image_shape"])
        if isinstance(given, nn.Module):
            check_embeddings(given, shape, config.embedding_size)
            return given
        config = replace(config, backbone=given or config.backbone)
        if config.backbone in BUILT_IN:
            return shapes_of(config, shape)
        with seeded(seeds(config.seed, "parameters", 0)):
            return build_backbone(config, shape)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{found / checkpoint.STATE}: {error}") from error


@dataclass
class Model:
    """The modules and optimizers of a run, which its checkpoints hold.

    The loss scaler is for the backbone only, whose gradients can exceed float16's range.
    """

    backbone: nn.Module
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
        """Load a checkpoint whose state `check` accepts, and return its number of steps.

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

    def begin_with(self, init: Path, num_classes: int, init_head: str = "auto") -> str:
        """Load another run's backbone and head, or a file of weights; return a summary.

        Args:
            init, init_head: as for `train`.

        Raises:
            CheckpointError: for a checkpoint that is damaged, or of a network of other shapes, or
                of another number of centers if they must be kept.
        """
        head = self.head
        group, start = None, 0
        if isinstance(head, ShardedMarginHead):
            group, start = head.group, head.class_start
        read = partial(begin_with_weights, init, self.backbone)
        if not init.is_file():
            rows = head.weight, num_classes, init_head, start
            read = partial(take_over, init, self.backbone, *rows, checkpoint.share(group))
        return checkpoint.together(read, group, CheckpointError)


def _parameter_groups(config: TrainConfig, *modules: nn.Module) -> dict[str, list[dict[str, Any]]]:
    """Return an optimizer's groups of the parameters of backbone and head, with their factors.

    Raises:
        ValueError: if a factor's name is that of no parameter.
    """
    factors, used = factors_of(config.lr_factors), set()
    groups: dict[str, dict[float, list[Tensor]]] = {part: {} for part in PARTS}
    names = []
    for part, module in zip(PARTS, modules, strict=True):
        for name, parameter in module.named_parameters(part):
            if parameter.requires_grad:
                fits = [each for each in factors if f"{name}.".startswith(f"{each}.")]
                used.update(fits)
                factor = factors[max(fits, key=len)] if fits else 1.0
                groups[part].setdefault(factor, []).append(parameter)
                names.append(name)
    if unknown := sorted(factors.keys() - used):
        shown = ", ".join(sorted({".".join(name.split(".")[:2]) for name in names}))
        raise ValueError(
            f"lr_factors must name parts of the model ({shown}), got {', '.join(unknown)}"
        )
    return {
        part: [{"params": each, "factor": factor} for factor, each in found.items()]
        for part, found in groups.items()
    }


def _fused(config: TrainConfig, module: nn.Module) -> bool | None:
    """Return whether an optimizer steps a module's parameters by torch's fused kernels.

    None leaves the choice to torch, which on a CPU would read all parameters once per operation.
    """
    # Torch 2.13's fused SGD initializes momentum in a group's first step alone: it fails where a
    # parameter has no gradient then, as one of a user's backbone may, or the loss scaler skips it.
    complete = type(module) in ALWAYS_STEPPED and config.precision != "float16"
    # The kernels pair the elements of a parameter and its state by their place in memory.
    fits = all(
        p.device.type == "cpu" and p.is_contiguous() and p.is_floating_point()
        for p in module.parameters()
    )
    return (complete and fits) or None


def build_model(
    config: TrainConfig,
    source: Source,
    alone: bool,
    device: torch.device,
    backbone: nn.Module | None = None,
) -> Model:
    """Return a run's model on its device, with a given backbone or the configuration's."""
    seed = seeds(config.seed, "parameters", 0)
    head: MarginHead | ShardedMarginHead
    with seeded(seed), standard_defaults():  # on the CPU: the same on every device
        if backbone is None:
            backbone = build_backbone(config, source.image_shape)
        else:
            check_embeddings(backbone, source.image_shape, config.embedding_size)
        backbone = backbone.to(device)
        if alone or device.type == "cpu":  # shards on a GPU are allocated there
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
    groups = _parameter_groups(config, backbone, head)
    centers: Any
    if config.sample_rate < 1 or config.fused_update:
        centers = by_row(groups["head"], **settings)
    else:
        centers = dense(groups["head"], **settings, fused=_fused(config, head))
    optimizers: dict[str, torch.optim.Optimizer] = {
        "optimizer": dense(groups["backbone"], **settings, fused=_fused(config, backbone)),
        "centers": centers,
    }
    if config.fused_update:
        head.step_in_backward(centers)
    scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
    return Model(backbone, head, optimizers, scaler)
