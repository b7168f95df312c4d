"""Files of weights that a backbone can begin with: safetensors, or torch's with plain tensors."""

from __future__ import annotations

import math
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..common.check import check_memory, first_line
from ..common.extras import extra
from ..common.files import CheckpointError
from ..common.textfiles import parse_json
from ..data.formats.decode import MAX_PIXELS
from ..models import PRESETS
from ..models.iresnet import IResNet, PublishedIResNet, insightface_names

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
# Keys under which trainers store the backbone's parameters; insightface's checkpoints have the
# second one.
_CONTAINERS = ("state_dict", "state_dict_backbone", "model_state_dict", "backbone", "model", "net")
_DEPTH = 4  # of dictionaries around the weights
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
        ValueError, OSError: if it would exceed the free memory, or cannot be opened.

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
        reason = first_line(error)
        if isinstance(error, UnpicklingError):
            reason = (
                "it holds more than tensors, such as a pickled module, or is damaged; save the "
                "module's state_dict() instead, best as .safetensors"
            )
        raise CheckpointError(f"{file} cannot be read as weights: {reason}") from error
    for _ in range(_DEPTH):
        if not isinstance(content, Mapping):
            break
        nested = [content[k] for k in _CONTAINERS if isinstance(content.get(k), Mapping)]
        if not nested:
            values = {k: v for k, v in content.items() if isinstance(v, Tensor)}
            if values and all(isinstance(name, str) for name in values):
                return _checked(file, values)
            break
        content = nested[0]
    raise CheckpointError(f"{file} must hold tensors by name (a state dict), and holds none")


def _checked(file: Path, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors; raise CheckpointError for one without numbers of its own for each element."""
    for name, value in values.items():
        plain = value.layout == torch.strided and not value.is_quantized
        if not plain or value.device.type != "cpu":
            raise CheckpointError(
                f"{file}: {name} must be a dense tensor, got {value.layout} on {value.device}"
            )
        if value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise CheckpointError(f"{file}: {name} repeats numbers, got strides {value.stride()}")
    return values


def _canonical(
    file: Path, values: Mapping[str, Tensor], wanted: Sequence[str]
) -> dict[str, Tensor]:
    """Return the backbone's tensors under insightface's names, without their prefix in a model.

    Args:
        wanted: names in that form. The prefix is that of all tensors, or the one without which most
            of these names are there, at least half of them.

    Raises:
        CheckpointError: if several prefixes do, as of two networks in one file.
    """
    firsts = (*wanted[:1], "conv1.weight", "stem.0.weight")
    prefixes = {n.removesuffix(first) for n in values for first in firsts if n.endswith(first)}
    parts = [name.split(".")[:-1] for name in values]
    of_all = ".".join([*os.path.commonprefix(parts), ""])  # noqa: RUF071 (of lists, by element)
    found: dict[str, dict[str, Tensor]] = {}
    counts: dict[str, int] = {}
    for prefix in {of_all} | prefixes:
        inside = {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}
        names = insightface_names(inside)
        count = len(set(wanted).intersection(names.values()))
        if prefix == of_all or 2 * count >= len(wanted):
            found[prefix] = {names[name]: value for name, value in inside.items()}
            counts[prefix] = count
    most = max(counts.values())
    best = sorted(prefix for prefix, count in counts.items() if count == most)
    if len(best) > 1:
        raise CheckpointError(
            f"{file} has the weights of several networks, under {', '.join(map(repr, best))}: "
            "keep those of one"
        )
    return found[best[0]]


def architecture_of(file: Path, values: Mapping[str, Tensor]) -> Architecture | None:
    """Return the sizes of the IResNet that weights are of; None for another network.

    Raises:
        CheckpointError: for the weights of several networks.
    """
    wanted = ("conv1.weight", "bn2.weight", "layer1.0.prelu.weight", "fc.weight", "features.weight")
    found = _canonical(file, values, wanted)
    if not found.keys() >= set(wanted):  # torchvision's ResNets have all but a PReLU and features
        return None
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
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
        return None


def fitted(file: Path, values: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return a file's weights as a state dict of a network, under the network's own names.

    Names are compared without a common prefix, and an IResNet's in insightface's form too. Missing
    counters of batches become 0.

    Args:
        file: for messages. network: may be on the device "meta".

    Raises:
        CheckpointError: for weights of another architecture, naming what is missing, left over or
            of another shape; for numbers of another kind, or that are not finite.
    """
    expected = network.state_dict()
    theirs = insightface_names(expected)
    found = _canonical(file, values, list(theirs.values()))
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
        sizes = architecture_of(file, values)
        hint = f"; these weights need {sizes.options()}" if sizes else ""
        raise CheckpointError(
            f"{file} has the weights of another architecture: {'; '.join(problems)}{hint}"
        )
    zero = torch.zeros((), dtype=torch.int64, device="cpu")
    return {
        name: zero.clone() if name in lacking else _as(file, their, found[their], expected[name])
        for name, their in theirs.items()
    }


def _as(file: Path, name: str, value: Tensor, expected: Tensor) -> Tensor:
    """Return a tensor in another's dtype; raise CheckpointError for one that does not fit it."""
    if value.is_floating_point() != expected.is_floating_point():
        raise CheckpointError(f"{file}: {name} must be {expected.dtype}, got {value.dtype}")
    if value.is_floating_point() and not value.isfinite().all():
        raise CheckpointError(f"{file}: {name} must be finite, and has NaN or infinite numbers")
    return value.to(expected.dtype)


def network_of_weights(file: Path) -> tuple[nn.Module, Architecture, tuple[int, int]]:
    """Return the IResNet that a file's weights are of, in evaluation mode, and its (H, W).

    Raises:
        CheckpointError: for a file that is damaged, of another network, or of images that are not
            square, unless its metadata tell their size.

    Memory: the parameters, twice.
    """
    values = read_weights(file)
    sizes = architecture_of(file, values)
    if sizes is None:
        raise CheckpointError(
            f"{file} must have the weights of an IResNet, such as those of insightface's "
            "arcface_torch; for another network give a run's folder"
        )
    size = _recorded_size(file) or sizes.image_size
    if size is None or math.prod(size) > MAX_PIXELS:
        raise CheckpointError(
            f"{file} must have the weights of a network for square images, got {sizes.pixels} "
            "features per channel; for others give a run's folder"
        )
    try:
        with torch.device("meta"):
            network = IResNet(
                size, sizes.channels, sizes.widths, sizes.depths, sizes.embedding_size
            )
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    weights = fitted(file, values, network)
    needed = sum(each.numel() * each.element_size() for each in weights.values())
    check_memory(f"the network of {file}", needed)
    network.to_empty(device="cpu").load_state_dict(weights)
    return network.eval(), sizes, size


def _recorded_size(file: Path) -> tuple[int, int] | None:
    """Return the (H, W) in the metadata of a safetensors file that `synface export` wrote."""
    if file.suffix != ".safetensors":
        return None
    with extra("train", "reading weights"):
        from safetensors import safe_open
    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get("image_size", "null")
    try:
        height, width = parse_json(text)
    except (TypeError, ValueError):
        return None
    sides = isinstance(height, int) and isinstance(width, int) and 0 < height * width <= MAX_PIXELS
    return (height, width) if sides and min(height, width) > 0 else None
