"""Files of weights that a backbone can begin with: safetensors, or torch's with plain tensors."""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.check import check_memory
from ..common.extras import extra
from ..common.files import CheckpointError
from ..models import PRESETS
from ..models.iresnet import IResNet, PublishedIResNet, insightface_names

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# Keys under which trainers store the backbone's parameters; insightface's checkpoints have the
# second one.
_CONTAINERS = ("state_dict", "state_dict_backbone", "model_state_dict", "backbone", "model", "net")
_COUNTER = "num_batches_tracked"  # of batch normalizations, which old files lack
_SHOWN = 3


class Architecture(NamedTuple):
    """The sizes of an IResNet that a file's weights tell.

    Attributes:
        widths, depths: channels and residual blocks of each stage.
        embedding_size, channels: of the output and the input.
        pixels: number of pixels after the last stage.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    embedding_size: int
    channels: int
    pixels: int

    @property
    def image_size(self) -> tuple[int, int] | None:
        """The (H, W) of square images; None if no square has so many pixels."""
        side = math.isqrt(self.pixels)
        size = side * 2 ** len(self.depths)
        return (size, size) if side * side == self.pixels else None

    @property
    def preset(self) -> str | None:
        """The name of the published network of these sizes, if there is one."""
        names = (name for name, depths in PRESETS.items() if depths == self.depths)
        return next(names, None) if self.widths == PublishedIResNet.WIDTHS else None

    def options(self) -> str:
        """Return the options of `synface train` for this network."""
        words = f"--backbone {self.preset}"
        if self.preset is None:
            sizes = (",".join(map(str, each)) for each in (self.widths, self.depths))
            words = "--widths {} --depths {}".format(*sizes)
        words += f" --embedding-size {self.embedding_size}"
        if self.image_size:
            words += " --size {}x{}".format(*self.image_size)
        return f"{words}, and images of {self.channels} channels"


def read_weights(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of weights by their names in it, on the CPU.

    Args:
        file: .safetensors, or a torch file of a state dict, which may be nested as trainers store
            it. Nothing in the file is executed.

    Raises:
        CheckpointError: for a file of another kind or content, naming it.

    Memory: the file's size; of a zipped torch file the pages that are used.
    """
    if file.suffix not in SUFFIXES:
        raise CheckpointError(
            f"{file} must be a run's folder or a file of weights ({', '.join(SUFFIXES)})"
        )
    with extra("train", "reading weights"):
        from safetensors.torch import load_file
    check_memory(f"the weights in {file}", file.stat().st_size)
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            mapped = zipfile.is_zipfile(file)
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # any exception that a damaged file causes in either reader
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file} cannot be read as weights: {reason}") from error
    while isinstance(content, Mapping):
        values = {name: v for name, v in content.items() if isinstance(v, Tensor)}
        if values and all(isinstance(name, str) for name in values):
            return values
        content = next((content[key] for key in _CONTAINERS if key in content), None)
    raise CheckpointError(f"{file} must hold tensors by name (a state dict), and holds none")


def _canonical(values: Mapping[str, Tensor], wanted: Sequence[str]) -> dict[str, Tensor]:
    """Return the backbone's tensors under insightface's names, without their prefix in a model.

    Args:
        wanted: names in that form. The prefix is that of all tensors, or the one without which most
            of these names are there, at least half of them.
    """
    firsts = (*wanted[:1], "conv1.weight", "stem.0.weight")
    prefixes = {n.removesuffix(first) for n in values for first in firsts if n.endswith(first)}
    parts = [name.split(".")[:-1] for name in values]
    of_all = ".".join([*os.path.commonprefix(parts), ""])  # noqa: RUF071 (of lists, by element)
    found, most = dict[str, Tensor](), -1
    for prefix in (of_all, *sorted(prefixes, key=len)):
        inside = {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}
        names = insightface_names(inside)
        count = len(set(wanted).intersection(names.values()))
        if count > most and (prefix == of_all or 2 * count >= len(wanted)):
            found, most = {names[name]: value for name, value in inside.items()}, count
    return found


def architecture_of(values: Mapping[str, Tensor]) -> Architecture | None:
    """Return the sizes of the IResNet that weights are of; None for another network."""
    found = _canonical(values, ("conv1.weight", "bn2.weight", "fc.weight", "features.weight"))
    blocks = [re.fullmatch(r"layer(\d+)\.(\d+)\.conv1\.weight", name) for name in found]
    stages: dict[int, int] = {}
    for block in filter(None, blocks):
        stages[int(block[1])] = max(stages.get(int(block[1]), 0), int(block[2]) + 1)
    try:
        depths = tuple(stages[i] for i in range(1, len(stages) + 1))
        widths = tuple(len(found[f"layer{i}.0.conv1.weight"]) for i in range(1, len(stages) + 1))
        embedding_size, features = found["fc.weight"].shape
        channels = found["conv1.weight"].shape[1]
        return Architecture(widths, depths, embedding_size, channels, features // widths[-1])
    except (KeyError, IndexError, ValueError):
        return None


def fitted(file: Path, values: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return a file's weights as a state dict of a network, under the network's own names.

    Names are compared without a common prefix, and an IResNet's in insightface's form too. Missing
    counters of batches become 0.

    Args:
        file: for messages. network: may be on the device "meta".

    Raises:
        CheckpointError: for weights of another architecture, naming what is missing, left over or
            of another shape.
    """
    expected = network.state_dict()
    theirs = insightface_names(expected)
    found = _canonical(values, list(theirs.values()))
    lacking = [name for name, their in theirs.items() if their not in found]
    missing = [name for name in lacking if not name.endswith(_COUNTER)]
    left_over = sorted(found.keys() - set(theirs.values()))
    shapes = [
        f"{name} must be of shape {tuple(expected[name].shape)}, got {tuple(found[their].shape)}"
        for name, their in theirs.items()
        if their in found and found[their].shape != expected[name].shape
    ]
    problems = [
        f"{kind} {', '.join(names[:_SHOWN])}"
        + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
        for kind, names in (("missing:", missing), ("left over:", left_over), ("", shapes))
        if names
    ]
    if problems:
        sizes = architecture_of(values)
        hint = f"; these weights need {sizes.options()}" if sizes else ""
        raise CheckpointError(
            f"{file} has the weights of another architecture: {'; '.join(problems)}{hint}"
        )
    zero = torch.zeros((), dtype=torch.int64, device="cpu")
    return {
        name: zero.clone() if name in lacking else found[their].to(expected[name].dtype)
        for name, their in theirs.items()
    }


def network_of_weights(file: Path) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return the IResNet that a file's weights are of, in evaluation mode, and its (H, W, C).

    Raises:
        CheckpointError: for a file that is damaged, of another network, or of images that are not
            square.

    Memory: the parameters, twice.
    """
    values = read_weights(file)
    sizes = architecture_of(values)
    if sizes is None or sizes.image_size is None:
        raise CheckpointError(
            f"{file} must have the weights of an IResNet of square images, such as those of "
            "insightface's arcface_torch; for another network give a run's folder"
        )
    try:
        with torch.device("meta"):
            network = IResNet(
                sizes.image_size, sizes.channels, sizes.widths, sizes.depths, sizes.embedding_size
            )
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    weights = fitted(file, values, network)
    network.to_empty(device="cpu").load_state_dict(weights)
    return network.eval(), (*sizes.image_size, sizes.channels)
